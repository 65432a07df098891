"""Runs the emitted Triton kernels of a schedule, on a GPU or under Triton's interpreter.

The kernels work on the schedule's memory image: one tensor of bytes per chip's memory, buffers where the
buffer table has them. `TritonSemantics` lets the runtime execute and verify a schedule by these kernels;
`Runner` holds the bound launches, which triton_timing captures and times."""

from __future__ import annotations

import importlib.util
import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mapper.backend import Memories
from mapper.errors import ScheduleError, UsageError
from mapper.schedule.tables import Block, Phase, Schedule
from mapper_gpu.semantics import GpuSemantics
from mapper_gpu.triton_emit import Launch, extents, source

if TYPE_CHECKING:
    import torch

NAME = "triton_{}.py"
"""The file of a phase's kernels in a schedule's directory."""
TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i64": "int64", "u8": "uint8"}


@dataclass(frozen=True)
class Bound:
    """A launch with the buffers of one repetition."""

    launch: Launch
    buffers: tuple[int, ...]


def bound(schedule: Schedule, phase: Phase) -> list[Bound]:
    """All launches of a program in order, repetitions unrolled."""
    found: list[Bound] = []
    blocks = source(schedule, phase).blocks
    for block, (repeat, launches) in zip(schedule.programs[phase].blocks, blocks, strict=True):
        other = _bindings(block)
        for r in range(repeat):
            found += [
                Bound(launch, tuple(other.get((b, r), b) for b in launch.buffers)) for launch in launches
            ]
    return found


def _bindings(block: Block) -> dict[tuple[int, int], int]:
    if block.bindings is None:
        return {}
    slot, repetition, buffer = (np.asarray(block.bindings.column(i).to_numpy()).tolist() for i in range(3))
    return {(s, r): b for s, r, b in zip(slot, repetition, buffer, strict=True)}


def module(schedule: Schedule, phase: Phase, folder: str | Path) -> ModuleType:
    """The kernels of a phase, imported from the schedule's directory.

    Raises ScheduleError where the file is not there, or not what the schedule's tables give."""
    path = Path(folder) / NAME.format(phase)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"{path}: {error.strerror}") from error
    if text != source(schedule, phase).text:
        raise ScheduleError(f"{path} is not what the schedule's tables give")
    return imported(path)


def imported(path: Path) -> ModuleType:
    """A file of kernels as a module; its source is read now, so that the file may go. Raises UsageError
    without triton."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
        raise UsageError("this needs torch and triton: pip install 'inference-mapper[gpu]'")
    import triton

    if triton.knobs.runtime.interpret:
        from mapper_gpu.triton_interpret import mend

        mend()
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_{abs(hash(str(path.resolve())))}", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    linecache.checkcache(str(path))
    spec.loader.exec_module(made)
    return made


class Runner:
    """A program's launches on memories that are torch tensors of bytes, all on one device."""

    def __init__(self, schedule: Schedule, phase: Phase, kernels: ModuleType, memory: torch.Tensor) -> None:
        import torch

        if schedule.chips != 1:
            raise UsageError("emitted Triton kernels run on one chip")
        self.phase, self.memory = phase, memory
        self._offset, self._size = extents(schedule)
        self.launches: list[tuple[Bound, Any, list[torch.Tensor]]] = []
        for b in bound(schedule, phase):
            tensors = [
                self.buffer(number, getattr(torch, TORCH[form]))
                for number, form in zip(b.buffers, b.launch.formats, strict=True)
            ]
            self.launches.append((b, getattr(kernels, b.launch.kernel), tensors))

    def buffer(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer as a flat tensor, sharing memory."""
        low = self._offset[number]
        return self.memory[low : low + self._size[number]].view(dtype)

    @staticmethod
    def launch(b: Bound, kernel: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Run one kernel. Raises UsageError where the device has less than the schedule's machine."""
        from triton.runtime.errors import OutOfResources

        try:
            kernel[(b.launch.grid,)](*tensors, num_warps=b.launch.warps, num_stages=b.launch.stages)
        except OutOfResources as error:
            raise UsageError(f"{b.launch.kernel} does not fit this device: {error}") from error

    def run(self) -> None:
        """All kernels in order."""
        for launch in self.launches:
            self.launch(*launch)


class TritonSemantics(GpuSemantics):
    """The schedule's meaning by its emitted kernels (see Semantics): on this computer's memories in place, or
    on a GPU's copy of them, which inputs and states enter and results and states leave."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        self._folder, self._device = Path(folder), device
        self._runners: dict[str, Runner] = {}
        self._memory: torch.Tensor | None = None
        self.launched = 0

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Run the kernels of a phase. The buffers that they store into count as written."""
        import torch

        here = torch.from_numpy(memories.data(0))
        if self._memory is None:
            self._memory = here.to(self._device)
        if phase not in self._runners:
            kernels = module(schedule, phase, self._folder)
            self._runners[phase] = Runner(schedule, phase, kernels, self._memory)
        runner = self._runners[phase]
        self._copy(schedule, phase, here, self._memory, "input", "state")
        runner.run()
        self._copy(schedule, phase, self._memory, here, "output", "state")
        self.launched += len(runner.launches)
        for low, high in _stored(schedule, phase):
            memories.written(0)[low:high] = True
        return schedule.programs[phase].cycles

    def _copy(
        self, schedule: Schedule, phase: Phase, source: torch.Tensor, to: torch.Tensor, *kinds: str
    ) -> None:
        if self._device == "cpu":
            return
        offset, size = extents(schedule)
        for port in schedule.ports:
            if port.kind in kinds and (not port.programs or phase in port.programs):
                for b in port.buffers:
                    part = slice(offset[b], offset[b] + size[b])
                    to[part].copy_(source[part])


def image_bytes(schedule: Schedule) -> int:
    """Bytes of the memory image of one chip."""
    offset, size = extents(schedule)
    return max(a + b for a, b in zip(offset, size, strict=True))


def _stored(schedule: Schedule, phase: Phase) -> list[tuple[int, int]]:
    """(first byte, end) of the buffers of a phase's results."""
    names = {o["value"] for p in schedule.plan["programs"][phase] for o in p["writes"]}
    values, programs = (schedule.buffers.column(c).to_pylist() for c in ("value", "program"))
    first, size = extents(schedule)
    return [(low, low + n) for name, program, low, n in zip(values, programs, first, size, strict=True)
            if name in names and program in ("", phase)]  # fmt: skip
