"""Checks over time: one step at a time per unit, no more bytes per cycle than a memory delivers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mapper import machine as machines
from mapper.schedule.tables import Schedule
from mapper.schedule.timeline import Short, Timeline, timeline
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
    lists in `gather` reads only part of its slices, chosen by data, and moves the step's `bytes`. A memory
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
        times = timeline(schedule, phase)
        memory_of = np.asarray(schedule.buffers.column("memory").to_numpy(), np.int64)
        accesses = (times.reads, times.writes)
        step = np.concatenate([a.step for a in accesses])
        size = np.concatenate([(a.slices.high - a.slices.low)[a.part] for a in accesses]).astype(np.float64)
        memory = np.concatenate([memory_of[a.slices.buffer][a.part] for a in accesses])
        share = _share(schedule, times, step, size)
        # accesses by memory; sorting 16-bit numbers takes no comparisons
        order = np.argsort(memory.astype(np.uint16 if len(limits) <= 1 << 16 else np.int64), kind="stable")
        bounds = np.searchsorted(memory[order], np.arange(len(limits) + 1))
        for number in np.flatnonzero(np.isfinite(limits)):
            here = order[bounds[number] : bounds[number + 1]]
            moved = np.bincount(step[here], size[here], minlength=len(times)) * share
            found = _peak(times, moved, float(limits[number]))
            if found is not None:
                cycle, rate, steps = found
                name = schedule.memories[number][0]
                message = (
                    f"{phase} cycle {cycle}: {rate:.6g} bytes per cycle to and from memory {name}, which "
                    f"moves {limits[number]:.6g}; running: "
                    + "; ".join(label(schedule, phase, times, s) for s in steps[:3])
                )
                yield Violation(message, tuple(steps[:16]), name, cycle, float(limits[number]))


def _share(schedule: Schedule, times: Timeline, step: Short, size: Float) -> Float:
    """The part of its slices that each step moves: all, but of a gathering step what it says it moves."""
    plan = schedule.plan if isinstance(schedule.plan, dict) else {}
    gather = [i for i, name in enumerate(schedule.opcodes) if name in plan.get("gather", ())]
    total = np.bincount(step, size, minlength=len(times))
    part = np.minimum(1, times.bytes / np.maximum(total, 1))
    return np.where(np.isin(times.opcode, gather), part, 1.0)


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


def _peak(times: Timeline, moved: Float, limit: float) -> tuple[int, float, list[int]] | None:
    """(cycle, bytes per cycle, running steps) of the highest rate where it exceeds `limit`; `moved` are the
    bytes of each step."""
    step = np.flatnonzero(moved)
    if not len(step):
        return None
    begin = times.start[step]
    end = np.maximum(times.end[step], begin + 1)
    rate = moved[step] / (end - begin)
    over = np.argsort(end, kind="stable")
    at, change = np.concatenate([begin, end[over]]), np.concatenate([rate, -rate[over]])
    order = np.argsort(at, kind="stable")  # of two columns in order
    at, total = at[order], np.cumsum(change[order])
    # the rate of a cycle is there after its last change
    final = np.flatnonzero(np.concatenate([at[1:] != at[:-1], [True]]))
    highest = final[int(np.argmax(total[final]))]
    # the sum of many rates carries rounding errors of its own
    if total[highest] <= limit * (1 + 1e-9) + 1e-6:
        return None
    cycle = int(at[highest])
    running = step[(begin <= cycle) & (end > cycle)]
    return cycle, float(total[highest]), [int(s) for s in running]
