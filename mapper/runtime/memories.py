"""The memories that a schedule is executed on: byte-accurate, poisoned until something is written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mapper.errors import CapacityError, ExecutionFault, ScheduleError
from mapper.runtime.numa import interleave, own_nodes
from mapper.runtime.written import Written
from mapper.schedule.tables import Int, Schedule

POISON = 0xFF
"""Not a number in every IEEE format, -1 in every integer format: an unwritten value that is used shows."""

Bytes = npt.NDArray[np.uint8]
HUGE = 4 << 20
"""Memory of this many bytes or more is asked to lie on huge pages."""


@dataclass(frozen=True)
class PoisonedMemories:
    """All memories of one schedule. `bytes` is None for a memory whose buffers are `mapped` one by one;
    `places` has (memory, first byte, end) of every buffer. See interface.Memories."""

    bytes: tuple[Bytes | None, ...]
    marks: tuple[Written, ...]
    places: Int
    mapped: Mapping[int, Bytes] = field(default_factory=dict)

    def data(self, memory: int) -> Bytes:
        """All bytes of a memory, up to the last that a buffer uses. Raises ExecutionFault."""
        found = self.bytes[memory]
        if found is None:
            raise ExecutionFault(f"memory {memory} is mapped from files, buffer by buffer")
        return found

    def bytes_of(self, number: int) -> Bytes:
        """The bytes of a buffer."""
        if number in self.mapped:
            return self.mapped[number]
        memory, low, high = self.places[number].tolist()
        return self.data(memory)[low:high]

    def written(self, memory: int) -> Written:
        """Which bytes of `data(memory)` have been written."""
        return self.marks[memory]


def allocate(schedule: Schedule, mapped: Mapping[int, Bytes] | None = None) -> PoisonedMemories:
    """Poisoned memories for a validated schedule, each as large as its buffers reach. `mapped` holds the
    bytes of all buffers of some memories, which count as written and are not allocated.

    Raises ScheduleError where a buffer lies outside its memory, or this computer's memory does not suffice.
    """
    mapped = mapped or {}
    memory, low = _column(schedule, "memory"), _column(schedule, "offset")
    end = low + _column(schedule, "bytes")
    used = np.zeros(len(schedule.memories), np.int64)
    np.maximum.at(used, memory, end)
    for (name, size), need in zip(schedule.memories, used, strict=True):
        if need > size:
            raise ScheduleError(f"buffers reach byte {need} of memory {name}, which has {size}")
    elsewhere = {int(memory[number]) for number in mapped}
    needed = sum(int(n) for i, n in enumerate(used) if i not in elsewhere)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > here:
        raise ScheduleError(f"executing needs {needed} bytes of memory; this computer has {here}")
    marks = tuple(Written(int(n)) for n in used)
    for number in mapped:
        marks[memory[number]].add(int(low[number]), int(end[number]))
    return PoisonedMemories(
        tuple(None if i in elsewhere else _poisoned(int(n)) for i, n in enumerate(used)),
        marks,
        np.stack([memory, low, end], axis=1),
        mapped,
    )


def _poisoned(size: int) -> Bytes:
    made = empty(size)
    made.fill(POISON)
    return made


def empty(size: int) -> Bytes:
    """`size` new bytes; where there are many, on huge pages and on all memory nodes by turns, if the system
    has such. CapacityError where it does not give them."""
    try:
        if size < HUGE:
            return np.empty(size, np.uint8)
        if hasattr(mmap, "MAP_PRIVATE"):  # shared memory, the default, would not lie on huge pages
            made = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            made = mmap.mmap(-1, size)
    except (OSError, MemoryError) as error:
        raise CapacityError(f"the system does not give {size} bytes of memory") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            made.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(made, np.uint8)
    interleave(found.ctypes.data, size, own_nodes())
    return found


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
