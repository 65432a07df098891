"""Checks over time: one step at a time per unit, no more bytes per cycle than a memory delivers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mapper import machine as machines
from mapper.schedule.tables import Block, Int, Schedule, StepTable
from mapper.schedule.timeline import Short, timeline
from mapper.schedule.violation import Violation, first, label

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UnitExclusive:
    """No two steps occupy a unit at once, also not those of overlapping repetitions; none before cycle 0 or
    after the program's end."""

    name: str = "UnitExclusive"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        times = timeline(schedule, phase)
        cycles = schedule.programs[phase].cycles
        for step in np.flatnonzero((times.start < 0) | (times.end > cycles)):
            message = f"{label(schedule, phase, times, step)} is not inside the program's {cycles} cycles"
            unit = schedule.units[times.unit[step]]
            yield Violation(message, (int(step),), unit, int(times.start[step]), cycles)
        busy = np.flatnonzero(times.end > times.start)
        order = busy[np.lexsort((times.start[busy], times.unit[busy]))]
        same = times.unit[order[1:]] == times.unit[order[:-1]]
        for pair in np.flatnonzero(same & (times.start[order[1:]] < times.end[order[:-1]])):
            a, b = int(order[pair]), int(order[pair + 1])
            unit = schedule.units[times.unit[a]]
            message = (
                f"{label(schedule, phase, times, b)} starts while {label(schedule, phase, times, a)} "
                f"occupies the unit until cycle {times.end[a]}"
            )
            yield Violation(message, (a, b), unit, int(times.start[b]), float(times.end[a]))


@dataclass(frozen=True)
class BandwidthHolds:
    """At no time do the running steps move more bytes per cycle than a memory's declared bandwidth.

    A step moves its slices' bytes evenly over its duration (at least one cycle); an opcode that the plan
    lists in `gather` reads only part of its slices, chosen by data, and moves the step's `bytes`. All
    repetitions count, as they lie in time; of each only the cycles at which a rate changes are kept. A memory
    `sram.3` is limited by the machine constant `memory.sram.3.bandwidth`, or else `memory.sram.bandwidth`
    [B/s]; without one it is not limited here.
    """

    name: str = "BandwidthHolds"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        limits = _limits(schedule)
        if not np.isfinite(limits).any():
            return []
        return first(v for phase in schedule.programs for v in self._program(schedule, phase, limits))

    def _program(self, schedule: Schedule, phase: str, limits: Float) -> Iterator[Violation]:
        memory_of = np.asarray(schedule.buffers.column("memory").to_numpy(), np.int64)
        gather = _gather(schedule)
        blocks = schedule.programs[phase].blocks
        moves = [m for block in blocks for m in _moves(block, gather, memory_of, len(limits))]
        for number in np.flatnonzero(np.isfinite(limits)).tolist():
            found = _peak([m.changes(number) for m in moves], float(limits[number]))
            if found is not None:
                cycle, rate = found
                steps = _running(schedule, phase, memory_of == number, cycle)
                name, times = schedule.memories[number][0], timeline(schedule, phase)
                message = (
                    f"{phase} cycle {cycle}: {rate:.6g} bytes per cycle to and from memory {name}, which "
                    f"moves {limits[number]:.6g}; running: "
                    + "; ".join(label(schedule, phase, times, s) for s in steps[:3])
                )
                yield Violation(message, tuple(steps[:16]), name, cycle, float(limits[number]))


def _gather(schedule: Schedule) -> Int:
    """The opcodes that move a part of their slices."""
    plan = schedule.plan if isinstance(schedule.plan, dict) else {}
    names = plan.get("gather", ())
    return np.array([i for i, name in enumerate(schedule.opcodes) if name in names], np.int64)


def _limits(schedule: Schedule) -> Float:
    """Bytes per cycle of each memory; infinite where the machine does not say."""
    constants = machines.parse(schedule.machine_toml, schedule.machine).constants
    limits = np.full(len(schedule.memories), np.inf)
    for number, (name, _) in enumerate(schedule.memories):
        for key in (f"memory.{name}.bandwidth", f"memory.{name.split('.')[0]}.bandwidth"):
            if key in constants:
                limits[number] = constants[key].value / schedule.clock_hz
                break
    return limits


@dataclass(frozen=True)
class _Moves:
    """What a block moves in those of its repetitions whose slices lie in the same memories.

    `origins` are the cycles at which these repetitions begin, `at` the distinct cycles, from there, at which
    steps begin or are over. Each access moves `rate` bytes per cycle from at[begin] until at[end]; those of
    memory m are number bounds[m] to bounds[m + 1].
    """

    origins: Int
    at: Int
    begin: Short
    end: Short
    rate: Float
    bounds: Int

    def changes(self, memory: int) -> tuple[Int, Float]:
        """(cycle, bytes per cycle more than before) of one memory, for all of these repetitions."""
        here = slice(self.bounds[memory], self.bounds[memory + 1])
        rate, count = self.rate[here], len(self.at)
        more = np.bincount(self.begin[here], rate, count) - np.bincount(self.end[here], rate, count)
        some = np.flatnonzero(more)
        return (self.origins[:, None] + self.at[some]).reshape(-1), np.tile(more[some], len(self.origins))


def _moves(block: Block, gather: Int, memory_of: Int, memories: int) -> Iterator[_Moves]:
    sides = [block.steps.slices(which) for which in _SIDES]
    row = np.concatenate([np.repeat(np.arange(len(s[0]) - 1, dtype=np.int32), np.diff(s[0])) for s in sides])
    slot, size = (np.concatenate([s[k] for s in sides]) for k in (1, 3))
    start = block.steps.column("start")
    length = np.maximum(block.steps.column("duration"), 1)
    rate = size * (_share(block.steps, gather, row, size) / length)[row]
    at = np.concatenate([start, start + length])
    at.sort(kind="stable")  # two columns in order or nearly so
    at = at[np.concatenate([[True], at[1:] != at[:-1]])] if len(at) else at
    begin, end = (np.searchsorted(at, cycle).astype(np.int32)[row] for cycle in (start, start + length))
    for turns, memory in _placed(block, slot, memory_of):
        # sorting 16-bit numbers takes no comparisons
        order = np.argsort(memory.astype(np.uint16 if memories <= 1 << 16 else np.int64), kind="stable")
        bounds = np.searchsorted(memory[order], np.arange(memories + 1))
        yield _Moves(block.start + turns * block.period, at, begin[order], end[order], rate[order], bounds)


_SIDES: tuple[Literal["reads"], Literal["writes"]] = ("reads", "writes")


def _share(steps: StepTable, gather: Int, row: Short, size: Int) -> Float:
    """The part of its slices that each step moves: all, but of a gathering step what it says it moves."""
    total = np.bincount(row, size, minlength=len(steps))
    part = np.minimum(1, steps.column("bytes") / np.maximum(total, 1))
    return np.where(np.isin(steps.column("opcode"), gather), part, 1.0)


def _placed(block: Block, slot: Int, memory_of: Int) -> Iterator[tuple[Int, Int]]:
    """(repetitions, memory of each access): where bindings name buffers of the same memories, as they mostly
    do, these are all repetitions at once."""
    fixed = memory_of[slot]
    if block.bindings is None or not block.bindings.num_rows or not len(slot):
        yield np.arange(block.repeat), fixed
        return
    slots, turn, to = (np.asarray(block.bindings.column(k).to_numpy(), np.int64) for k in range(3))
    known = np.unique(slots)
    table = np.tile(memory_of[known], (block.repeat, 1))
    there = (turn >= 0) & (turn < block.repeat)
    table[turn[there], np.searchsorted(known, slots[there])] = memory_of[to[there]]
    place = np.minimum(np.searchsorted(known, slot), len(known) - 1)
    bound = known[place] == slot
    kinds, kind = np.unique(table, axis=0, return_inverse=True)
    for number, here in enumerate(kinds):
        yield np.flatnonzero(kind.reshape(-1) == number), np.where(bound, here[place], fixed)


def _peak(changes: list[tuple[Int, Float]], limit: float) -> tuple[int, float] | None:
    """(cycle, bytes per cycle) of the highest rate where it exceeds `limit`."""
    at = np.concatenate([np.zeros(0, np.int64), *(c[0] for c in changes)])
    if not len(at):
        return None
    order = np.argsort(at, kind="stable")
    at, total = at[order], np.cumsum(np.concatenate([c[1] for c in changes])[order])
    # the rate of a cycle is there after its last change
    final = np.flatnonzero(np.concatenate([at[1:] != at[:-1], [True]]))
    highest = final[int(np.argmax(total[final]))]
    # the sum of many rates carries rounding errors of its own
    if total[highest] <= limit * (1 + 1e-9) + 1e-6:
        return None
    return int(at[highest]), float(total[highest])


def _running(schedule: Schedule, phase: str, inside: npt.NDArray[np.bool_], cycle: int) -> list[int]:
    """The steps of the Timeline that move bytes of buffers `inside` the memory in a cycle."""
    times = timeline(schedule, phase)
    still = np.isin(times.opcode, _gather(schedule)) & (times.bytes <= 0)
    now = (times.start <= cycle) & (np.maximum(times.end, times.start + 1) > cycle) & ~still
    used = np.zeros(len(times), np.bool_)
    for accesses in (times.reads, times.writes):
        some = now[accesses.step]
        some &= inside[accesses.slices.buffer][accesses.part]
        used[accesses.step[some]] = True
    return [int(s) for s in np.flatnonzero(used)]
