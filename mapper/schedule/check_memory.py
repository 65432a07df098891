"""Checks of memories: everything fits, no byte belongs to two values at once, weights stay as loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mapper import machine as machines
from mapper.schedule.ranges import NEVER, expand
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.timeline import Accesses, timeline
from mapper.schedule.violation import Violation, buffer_label, first, label


def _int(schedule: Schedule, name: str) -> Int:
    return np.asarray(schedule.buffers.column(name).to_numpy(), np.int64)


@dataclass(frozen=True)
class CapacityFits:
    """Every buffer lies inside its memory, every slice inside its buffer, no memory is larger than the
    machine constant `memory.<name>.capacity` [B] says (`sram.3` may be declared as `memory.sram`)."""

    name: str = "CapacityFits"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        constants = machines.parse(schedule.machine_toml, schedule.machine).constants
        for name, size in schedule.memories:
            keys = (f"memory.{name}.capacity", f"memory.{name.split('.')[0]}.capacity")
            declared = next((constants[k].value for k in keys if k in constants), None)
            if declared is not None and size > declared:
                message = f"memory {name} has {size} bytes here and {declared:.0f} on the machine"
                yield Violation(message, unit=name, limit=declared)
        capacity = np.array([size for _, size in schedule.memories] or [0], np.int64)
        memory, end = _int(schedule, "memory"), _int(schedule, "offset") + _int(schedule, "bytes")
        for row in np.flatnonzero(end > capacity[memory]):
            name, size = schedule.memories[memory[row]]
            message = (
                f"{buffer_label(schedule, row)} ends at byte {end[row]} of memory {name}, which has {size}"
            )
            yield Violation(message, unit=name, limit=size)
        yield from self._slices(schedule)

    def _slices(self, schedule: Schedule) -> Iterator[Violation]:
        size = _int(schedule, "bytes")
        for phase in schedule.programs:
            times = timeline(schedule, phase)
            for accesses in (times.reads, times.writes):
                slices = accesses.slices
                outside = slices.high > size[slices.buffer]
                rows = np.flatnonzero(outside[accesses.part]) if outside.any() else ()
                for row in rows:
                    step, one = int(accesses.step[row]), int(accesses.part[row])
                    buffer = int(slices.buffer[one])
                    message = (
                        f"{label(schedule, phase, times, step)} reaches byte {slices.high[one]} of "
                        f"{buffer_label(schedule, buffer)}, which has {size[buffer]}"
                    )
                    yield Violation(message, (step,), None, int(times.start[step]), float(size[buffer]))


@dataclass(frozen=True)
class LifetimesDisjoint:
    """Buffers that share bytes of a memory are never alive at once, and none is accessed outside its life.

    A buffer lives from cycle `first` to cycle `last`, both included. One that lives from before the start to
    beyond the end (-1, -1), or is shared by the programs, keeps its bytes during the other program too.
    """

    name: str = "LifetimesDisjoint"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        begin, end = _lives(schedule)
        times = timeline(schedule, phase)
        for accesses in (times.reads, times.writes):
            # most buffers live throughout
            mortal = (begin >= 0) | (end < NEVER)
            some = np.flatnonzero(mortal[accesses.slices.buffer][accesses.part])
            at, owner = accesses.step[some], accesses.slices.buffer[accesses.part[some]]
            since, until = (of[at] for of in accesses.spans)
            last = np.maximum(until - 1, since)
            for row in np.flatnonzero((since < begin[owner]) | (last > end[owner])):
                step, buffer = int(at[row]), int(owner[row])
                message = (
                    f"{label(schedule, phase, times, step)} uses {buffer_label(schedule, buffer)} during "
                    f"{since[row]}..{last[row]}, outside its life {begin[buffer]}..{end[buffer]}"
                )
                yield Violation(message, (step,), None, int(since[row]), float(end[buffer]))
        permanent = (begin < 0) & (end == NEVER)
        program = schedule.buffers.column("program").to_numpy(zero_copy_only=False)
        alive = np.flatnonzero(
            ((program == phase) | (program == "") | permanent) & (_int(schedule, "bytes") > 0)
        )
        for a, b in _overlaps(schedule, alive, begin, end):
            name = schedule.memories[_int(schedule, "memory")[a]][0]
            message = (
                f"{phase}: {buffer_label(schedule, a)} and {buffer_label(schedule, b)} share bytes of memory "
                f"{name} and are both alive in cycle {max(begin[a], begin[b])}"
            )
            yield Violation(message, (), name, int(max(begin[a], begin[b])), float(min(end[a], end[b])))


def _lives(schedule: Schedule) -> tuple[Int, Int]:
    begin, end = _int(schedule, "first"), _int(schedule, "last")
    return begin, np.where(end < 0, NEVER, end)


def windows(low: Int, high: Int, size: int, most: int = 1 << 24) -> Iterator[tuple[Int, Int, Int]]:
    """Cut ranges [low, high) of 0..size into windows that together hold at most about `most` elements each:
    (rows, low, high) clipped to the window. Bounds the memory that `expand` takes."""
    depth = np.zeros(size + 1, np.int64)
    np.add.at(depth, low, 1)
    np.add.at(depth, high, -1)
    total = np.cumsum(np.cumsum(depth))
    count = int(total[-1] // most) + 1
    cuts = np.unique(np.concatenate([[0], np.searchsorted(total, np.arange(1, count) * most), [size]]))
    for a, b in pairwise(cuts):
        rows = np.flatnonzero((low < b) & (high > a))
        yield rows, np.maximum(low[rows], a), np.minimum(high[rows], b)


def _overlaps(schedule: Schedule, rows: Int, begin: Int, end: Int) -> Iterator[tuple[int, int]]:
    """Pairs of buffers that share bytes while both are alive : not all, but some where there are any."""
    memory, offset, size = (_int(schedule, k)[rows] for k in ("memory", "offset", "bytes"))
    base = np.concatenate([[0], np.cumsum([s + 1 for _, s in schedule.memories])])[memory]
    edges, position = np.unique(np.concatenate([base + offset, base + offset + size]), return_inverse=True)
    low, high = position[: len(rows)], position[len(rows) :]
    seen: set[tuple[int, int]] = set()
    for part, a, b in windows(low, high, len(edges)):
        owner, segment = expand(a, b)
        buffer = rows[part][owner]
        order = np.lexsort((begin[buffer], segment))
        buffer, segment = buffer[order], segment[order]
        clash = (segment[1:] == segment[:-1]) & (end[buffer[:-1]] >= begin[buffer[1:]])
        for i in np.flatnonzero(clash):
            pair = (int(buffer[i]), int(buffer[i + 1]))
            if pair not in seen:
                seen.add(pair)
                yield pair


@dataclass(frozen=True)
class WeightsIntact:
    """No step writes into the buffers of a weight or constant, and these keep their bytes throughout."""

    name: str = "WeightsIntact"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        fixed = np.zeros(schedule.buffers.num_rows, bool)
        for port in schedule.ports:
            if port.kind in ("weight", "constant"):
                fixed[list(port.buffers)] = True
        lost = fixed & ((_int(schedule, "first") != -1) | (_int(schedule, "last") != -1))
        for row in np.flatnonzero(lost):
            yield Violation(f"{buffer_label(schedule, row)} holds a weight but does not live throughout")
        for phase in schedule.programs:
            times = timeline(schedule, phase)
            writes: Accesses = times.writes
            for row in np.flatnonzero(fixed[writes.slices.buffer][writes.part]):
                step = int(writes.step[row])
                message = (
                    f"{label(schedule, phase, times, step)} overwrites a weight in "
                    f"{buffer_label(schedule, int(writes.slices.buffer[writes.part[row]]))}"
                )
                yield Violation(message, (step,), None, int(times.start[step]))
