"""Queues and the program as a whole: legal instructions, one per queue and cycle, an end that is late
enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Violation, first, label
from mapper_lpu import isa
from mapper_lpu.check_columns import INSTALL, MEM, columns, programs
from mapper_lpu.check_flow import flow
from mapper_lpu.check_streams import unit


@dataclass(frozen=True)
class QueueOrder:
    """Every instruction belongs to its queue, its arguments are in range and aligned, and no queue issues an
    instruction before the one before has left it (one cycle; an install takes `mxm.install`)."""

    name: str = "QueueOrder"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table = columns(schedule, phase)
        times = table.times
        for step in np.flatnonzero(~table.legal):
            why = table.faults[table.fault[table.row[step]]] or "is beyond the longest program"
            message = f"{label(schedule, phase, times, step)} {why}"
            yield Violation(message, (int(step),), unit(schedule, table, step), int(times.start[step]))
        order = np.lexsort((times.start, times.unit))
        length = np.where(table.step_code == INSTALL, table.timing.install, 1)
        free = times.start[order[:-1]] + length[order[:-1]]
        same = times.unit[order[1:]] == times.unit[order[:-1]]
        for pair in np.flatnonzero(same & (times.start[order[1:]] < free)):
            a, b = int(order[pair]), int(order[pair + 1])
            message = (
                f"{label(schedule, phase, times, b)} is issued while "
                f"{label(schedule, phase, times, a)} takes the queue until cycle {free[pair]}"
            )
            yield Violation(message, (a, b), unit(schedule, table, b), int(times.start[b]), int(free[pair]))


@dataclass(frozen=True)
class ProgramEnds:
    """Issue starts at cycle 0 or later, and Program.cycles >= last effect + `chip.tiles`."""

    name: str = "ProgramEnds"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        for table in programs(schedule):
            times, made = table.times, flow(schedule, table.phase).made
            for step in np.flatnonzero(times.start < 0)[:1]:
                message = f"{label(schedule, table.phase, times, step)} is issued before the program starts"
                yield Violation(message, (int(step),), unit(schedule, table, step), int(times.start[step]), 0)
            if not len(times):
                continue
            effect = times.end.copy()
            np.maximum.at(effect, made.step, made.at)
            last = int(np.argmax(effect))
            limit, cycles = int(effect[last]) + table.timing.tiles, schedule.programs[table.phase].cycles
            if cycles < limit:
                who = label(schedule, table.phase, times, last)
                message = f"the program ends at cycle {cycles}, {who} only at {limit}"
                yield Violation(message, (last,), unit(schedule, table, last), int(effect[last]), limit)


@dataclass(frozen=True)
class TimingDataIndependent:
    """No instruction's time depends on data: only opcodes and units of the machine, each opcode of fixed
    duration and latency, no step without a queue, and no address from data outside of gather and scatter."""

    name: str = "TimingDataIndependent"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        for what, have, known in (
            ("opcode", schedule.opcodes, isa.OPCODES),
            ("unit", schedule.units, isa.UNITS),
        ):
            for name in have:
                if name not in known:
                    yield Violation(f"{what} {name!r} is not in the machine model: its timing is unknown")
        for table in programs(schedule):
            times = table.times
            fixed = np.where(table.step_code == INSTALL, table.timing.install, 1)
            moves = (table.reads + table.writes) != np.isin(table.step_code, MEM)
            wrong = (table.step_code >= 0) & ((times.end - times.start != fixed) | moves)
            for step in np.flatnonzero(wrong):
                message = f"{label(schedule, table.phase, times, step)} has another duration or other memory"
                message += (
                    f" operands than its opcode ({table.reads[step]} reads, {table.writes[step]} writes)"
                )
                yield Violation(message, (int(step),), unit(schedule, table, step), int(times.start[step]))
