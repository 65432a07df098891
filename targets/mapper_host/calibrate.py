"""Measuring this computer: the constants of the timing model, each as the median of several runs with its
spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_host.team import thread_count

F32 = npt.NDArray[np.float32]
RUNS = 15
"""Measurements per constant."""
CONTENDED = 1.5
"""Runs slower than this many times the fastest are rejected."""
_FAR = 192 << 20
"""Bytes of a working set that no last-level cache holds."""


@dataclass(frozen=True)
class Measured:
    """A constant: median, lowest and highest of the runs, and how it was measured."""

    value: float
    low: float
    high: float
    unit: str
    source: str

    @staticmethod
    def of(values: Sequence[float], unit: str, source: str) -> Measured:
        """The summary of repeated measurements."""
        return Measured(statistics.median(values), min(values), max(values), unit, source)

    def toml(self) -> str:
        """As a table of a machine file."""
        return (
            f'{{ value = {self.value:.6g}, unit = "{self.unit}", kind = "measured", '
            f'source = "{self.source}", low = {self.low:.6g}, high = {self.high:.6g} }}'
        )


def seconds(run: Callable[[], Any], times: int = 1) -> list[float]:
    """Time of one call, up to RUNS times, each the mean over `times` calls; after one call that is not
    counted.

    Runs that took more than CONTENDED times the shortest one were disturbed by other load, and are left out.
    """
    run()
    found = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(times):
            run()
        found.append((time.perf_counter() - begin) / times)
    return [s for s in found if s <= CONTENDED * min(found)]


def calibrated() -> str:
    """TOML text of a machine "host" measured on this computer now. Takes some seconds; other load disturbs
    it."""
    cache = cache_bytes()
    probe, threads = Probe(), thread_count(None)
    constants = {
        "memory.bandwidth": Measured.of(
            probe.bandwidth(_FAR), "B/s", f"matrix-vector products over {_FAR >> 20} MB of weights"
        ),
        "cache.bandwidth": Measured.of(
            probe.bandwidth(min(cache // 4, 4 << 20)), "B/s", "matrix-vector products over cached weights"
        ),
        "rate.vector": Measured.of(
            probe.vector_rate(), "flop/s", "matrix product of 16 rows, [512, 512] weights"
        ),
        "rate.rows": Measured.of(
            probe.rows_rate(), "flop/s", "gated SiLU of 16384 elements, 5 operations each"
        ),
        "rate.generic": Measured.of(
            probe.generic_rate(), "element/s", "copies of a transposed [128, 512] matrix, element by element"
        ),
        "step.overhead": Measured.of(
            probe.step_overhead(), "s", "sums of 64 elements, 512 steps in one program"
        ),
        "program.overhead": Measured.of(probe.entry_overhead(), "s", "an empty program, called from Python"),
    }
    lines = [
        'name = "host"',
        'target = "host"',
        f'summary = "{platform.machine()} processor, {threads} threads, '
        'measured by mapper machines calibrate"',
        "",
        f'cache.bytes = {{ value = {cache}, unit = "B", kind = "published", source = "{_CACHE_SOURCE}", '
        f"low = {cache // 4}, high = {cache} }}",
    ]
    return "\n".join([*lines, *(f"{name} = {m.toml()}" for name, m in constants.items())]) + "\n"


_CACHE_SOURCE = "last-level cache as the system reports it; other cores may take their share"


def cache_bytes() -> int:
    """Size of the last-level cache; 16 MB where the system does not tell."""
    from pathlib import Path

    found = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        found.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(found, default=16 << 20)


class Probe:
    """Programs of single opcodes, timed in the interpreter itself, on all threads."""

    def _steps(
        self, opcode: int, args: Sequence[int], addresses: Sequence[Sequence[int]]
    ) -> Callable[[], None]:
        from mapper_host.interpreter import SERVING
        from mapper_host.opcodes import OPERANDS
        from mapper_host.scratch import scratch_bytes
        from mapper_host.team import Team

        assert opcode in SERVING
        rows = np.zeros((len(addresses), 2 + OPERANDS), np.int64)
        rows[:, 0] = opcode
        for i, operands in enumerate(addresses):
            rows[i, 2 : 2 + len(operands)] = operands
        flat = np.array([*args, 0], np.int64)
        team = Team(rows, flat, flat.view(np.float64), scratch_bytes(rows, flat), thread_count(None))

        def run() -> None:
            team.run(0, len(rows))

        return run

    def bandwidth(self, working_set: int) -> list[float]:
        """Bytes per second of matrix-vector products that sweep over `working_set` bytes of weights."""
        from mapper_host.opcodes import PROJECT

        k = 2048
        n = min(1024, working_set // (16 * k))
        weights = np.ones(working_set // 4 // (k * n) * k * n, np.float32)
        x, y = np.ones(k, np.float32), np.empty(n, np.float32)
        block = 4 * k * n
        places = [
            [x.ctypes.data, weights.ctypes.data + i * block, y.ctypes.data]
            for i in range(weights.nbytes // block)
        ]
        run = self._steps(PROJECT, [1, k, *[0] * 7, 1, n, 0, 0, 0], places)
        times = max(1, (64 << 20) // weights.nbytes)
        return [weights.nbytes / s for s in seconds(run, times)]

    def vector_rate(self) -> list[float]:
        """Operations per second of a matrix product whose operands are cached."""
        from mapper_host.opcodes import PROJECT

        m, n, k = 16, 512, 512
        x, w, y = (np.ones(s, np.float32) for s in ((m, k), (n, k), (m, n)))
        args = [m, k, *[0] * 7, 1, n, 0, 0, 0]
        run = self._steps(PROJECT, args, [[a.ctypes.data for a in (x, w, y)]] * 4)
        return [4 * 2 * m * n * k / s for s in seconds(run, 4)]

    def rows_rate(self) -> list[float]:
        """Operations per second of gated activations (5 per element)."""
        from mapper_host.opcodes import GATE

        x, y = np.ones(16384, np.float32), np.empty(16384, np.float32)
        run = self._steps(GATE, [x.size, 0], [[x.ctypes.data, x.ctypes.data, y.ctypes.data]] * 4)
        return [4 * 5 * x.size / s for s in seconds(run, 2)]

    def generic_rate(self) -> list[float]:
        """Elements per second of strided copies."""
        from mapper_host.opcodes import COPY

        x, y = np.ones((128, 512), np.float32), np.empty((512, 128), np.float32)
        args = [4, 2, 0, 0, 512, 128, 1, 512, 128, 1]
        run = self._steps(COPY, args, [[x.ctypes.data, y.ctypes.data]] * 8)
        return [8 * x.size / s for s in seconds(run, 4)]

    def step_overhead(self) -> list[float]:
        """Seconds of a step that has next to nothing to do."""
        from mapper_host.opcodes import VECTOR

        x = np.ones(64, np.float32)
        run = self._steps(VECTOR, [2, 64, 0], [[x.ctypes.data] * 3] * 512)
        return [s / 512 for s in seconds(run, 4)]

    def entry_overhead(self) -> list[float]:
        """Seconds to enter and leave the interpreter."""
        from mapper_host.opcodes import VECTOR

        x = np.ones(64, np.float32)
        return seconds(self._steps(VECTOR, [2, 64, 0], [[x.ctypes.data] * 3]), 200)
