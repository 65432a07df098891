"""The memories that a schedule is executed on: byte-accurate, poisoned until something is written."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault, ScheduleError
from mapper.schedule.tables import Int, Schedule

POISON = 0xFF
"""Not a number in every IEEE format, -1 in every integer format: an unwritten value that is used shows."""

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PoisonedMemories:
    """All memories of one schedule: bytes, and a flag per byte for "written". See interface.Memories."""

    bytes: tuple[Bytes, ...]
    flags: tuple[Flags, ...]

    def data(self, memory: int) -> Bytes:
        """All bytes of a memory, up to the last that a buffer uses."""
        return self.bytes[memory]

    def written(self, memory: int) -> Flags:
        """One flag per byte of `data(memory)`."""
        return self.flags[memory]


def allocate(schedule: Schedule) -> PoisonedMemories:
    """Poisoned memories for a validated schedule, each as large as its buffers reach.

    Raises ScheduleError where a buffer lies outside its memory, or this computer's memory does not suffice.
    """
    memory, end = _column(schedule, "memory"), _column(schedule, "offset") + _column(schedule, "bytes")
    used = np.zeros(len(schedule.memories), np.int64)
    np.maximum.at(used, memory, end)
    for (name, size), need in zip(schedule.memories, used, strict=True):
        if need > size:
            raise ScheduleError(f"buffers reach byte {need} of memory {name}, which has {size}")
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * int(used.sum()) > here:
        raise ScheduleError(
            f"executing needs {2 * int(used.sum())} bytes of memory; this computer has {here}"
        )
    return PoisonedMemories(
        tuple(np.full(int(n), POISON, np.uint8) for n in used),
        tuple(np.zeros(int(n), np.bool_) for n in used),
    )


def _column(schedule: Schedule, name: str) -> Int:
    return np.asarray(schedule.buffers.column(name).to_numpy(), np.int64)


def temporaries(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(memory, first byte, end) of all bytes that hold nothing between runs: buffers of no weight, constant
    or state. Neighbours are merged, bytes of lasting buffers are left out."""
    lasting = np.zeros(schedule.buffers.num_rows, np.bool_)
    for port in schedule.ports:
        if port.kind in ("weight", "constant", "state"):
            lasting[list(port.buffers)] = True
    memory, low = _column(schedule, "memory"), _column(schedule, "offset")
    high = low + _column(schedule, "bytes")
    out = []
    for number in range(len(schedule.memories)):
        here = memory == number
        kept = _merge(low[here & lasting], high[here & lasting])
        for a, b in _merge(low[here & ~lasting], high[here & ~lasting]):
            out += [(number, x, y) for x, y in _without(a, b, kept)]
    return out


def _merge(low: Int, high: Int) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for i in np.argsort(low, kind="stable"):
        a, b = int(low[i]), int(high[i])
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], b))
        elif b > a:
            merged.append((a, b))
    return merged


def _without(a: int, b: int, kept: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out = []
    for x, y in kept:
        if y <= a or x >= b:
            continue
        if x > a:
            out.append((a, x))
        a = max(a, y)
    return [*out, (a, b)] if a < b else out


def require_written(flags: Flags, low: int, high: int, what: str) -> None:
    """Raises ExecutionFault, naming `what` and the byte, where a byte of [low, high) has not been written."""
    part = flags[low:high]
    if not part.all():
        raise ExecutionFault(f"{what}: byte {int(np.argmin(part))} is read and was never written")
