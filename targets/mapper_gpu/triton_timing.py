"""Measured time of emitted kernels beside the modelled: every fused kernel in a CUDA graph of its own.

A graph holds all repetitions of one fused kernel, one after the other, so that nothing waits for the CPU and
each repetition reads weights that the L2 does not hold any more; its time over their number is a kernel with
its launch gap, which the model's figure has too. Where there is no GPU, `Cpu` runs the same code without
graphs: its times say nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from mapper.schedule.tables import Schedule

if TYPE_CHECKING:
    from mapper_gpu.triton_run import Bound, Runner

WARM = 3
"""Runs before a capture (compilation, workspaces), and replays before a measurement (clocks)."""
Entry = tuple["Bound", Any, Sequence[Any]]


class Device(Protocol):
    """What runs and times work."""

    @property
    def name(self) -> str:
        """What it calls itself."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same work without the CPU's part in it."""

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median seconds of captured work."""


class Cuda:
    """The current CUDA device."""

    @property
    def name(self) -> str:
        """See Device."""
        import torch

        return str(torch.cuda.get_device_name())

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph's replay, after warm-up on a side stream, which capturing asks for: inside of a
        capture nothing may be compiled, and no memory be allocated but from the graph's pool."""
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            run()
        replay: Callable[[], object] = graph.replay
        return replay

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """By CUDA events between replays that follow each other: the device never waits for the CPU."""
        import torch

        for _ in range(WARM):
            run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return float(statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))) * 1e-3


class Cpu:
    """Triton's interpreter, and PyTorch on the CPU."""

    name = "CPU, Triton's interpreter"

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """The work itself, after a first run."""
        run()
        return run

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Of one run."""
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


@dataclass(frozen=True)
class Timed:
    """One fused kernel: how many launches it takes (merges are launches of their own) and how often it runs
    in a step; measured and modelled seconds of one run, with one launch gap; HBM bytes of one run."""

    kernel: str
    launches: int
    count: int
    measured: float
    modelled: float
    bytes: float


def timed(schedule: Schedule, runner: Runner, device: Device, repeats: int = 20) -> list[Timed]:
    """All fused kernels of a program, in order."""
    from mapper.machine import parse
    from mapper_gpu.hardware import gpu

    gap = gpu(parse(schedule.machine_toml, schedule.machine)).gap
    found = []
    for runs in fused(runner.launches).values():
        entries = [entry for run in runs for entry in run]
        replay = device.capture(partial(_all, runner, entries))
        first = runs[0][0][0].launch
        seconds = device.seconds(replay, repeats) / len(runs)
        found.append(Timed(first.kernel, len(runs[0]), len(runs), seconds, first.seconds + gap, first.bytes))
    return found


def _all(runner: Runner, entries: Sequence[Entry]) -> None:
    for entry in entries:
        runner.launch(*entry)


def fused(launches: Sequence[Entry]) -> dict[str, list[list[Entry]]]:
    """Fused kernel -> its runs, each the launches of its stages."""
    found: dict[str, list[list[Entry]]] = {}
    for entry in launches:
        launch = entry[0].launch
        if launch.number == 0:
            mine = found.setdefault(launch.kernel, [])
            mine.append([])
        mine[-1].append(entry)
    return found
