"""The emitted listing: it fits the instruction memory, and read back it equals the step tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper import machine as machines
from mapper.errors import ScheduleError
from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Violation, first, label
from mapper_lpu import isa
from mapper_lpu.check_columns import MEM, Columns, columns
from mapper_lpu.check_streams import unit
from mapper_lpu.listing import compressed, listing
from mapper_lpu.listing_parse import Instructions, parse


@dataclass(frozen=True)
class InstructionMemory:
    """The listing of each queue has at most `icu.instructions` lines, where the machine file limits them (>
    0)."""

    name: str = "InstructionMemory"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        limit = machine.whole("icu.instructions") if "icu.instructions" in machine.constants else 0
        if limit <= 0:
            return
        for phase in schedule.programs:
            try:
                lines = compressed(schedule, phase).lines(columns(schedule, phase))
            except ScheduleError as error:
                yield Violation(f"{phase}: {error}")
                continue
            for queue in np.flatnonzero(lines > limit):
                name = isa.UNITS[queue]
                message = f"{phase}: queue {name} needs {lines[queue]} instructions, it holds {limit}"
                yield Violation(message, (), name, None, limit)


@dataclass(frozen=True)
class ListingMatches:
    """The listing, read back by a parser of its own, gives exactly the instructions of the step tables."""

    name: str = "ListingMatches"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        for phase in schedule.programs:
            table = columns(schedule, phase)
            try:
                found = parse(listing(schedule, phase), table.timing.install)
            except ScheduleError as error:
                yield Violation(f"{phase}: {error}")
                continue
            yield from differences(schedule, table, found)


def differences(schedule: Schedule, table: Columns, found: Instructions) -> Iterator[Violation]:
    """Where a listing that was read back is not the program."""
    if found.cycles != schedule.programs[table.phase].cycles:
        yield Violation(
            f"{table.phase}: the listing has {found.cycles} cycles",
            limit=schedule.programs[table.phase].cycles,
        )
    if len(found.unit) != len(table.times):
        message = (
            f"{table.phase}: the listing has {len(found.unit)} instructions, the tables {len(table.times)}"
        )
        yield Violation(message, limit=len(table.times))
        return
    order = np.lexsort((table.times.start, table.step_unit))
    mem = np.isin(table.step_code[order], MEM)
    row = table.row[order]
    pairs = (
        (found.unit, table.step_unit[order]),
        (found.cycle, table.times.start[order]),
        (found.opcode, table.step_code[order]),
        (found.row, np.where(mem, table.address[order], 0)),
        (found.rows, np.where(mem, table.lines[order], 0)),
    )
    wrong = (found.args != table.args[row]).any(axis=1)
    for a, b in pairs:
        wrong |= a != b
    for at in np.flatnonzero(wrong):
        step = int(order[at])
        message = (
            f"{label(schedule, table.phase, table.times, step)} is not what the listing says at its place"
        )
        yield Violation(message, (step,), unit(schedule, table, step), int(table.times.start[step]))
