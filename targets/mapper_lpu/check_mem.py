"""MEM: one aligned access per slice and cycle, and every read finds the version of the row that it is meant
to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.schedule.ranges import expand
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, buffer_label, first, label
from mapper_lpu import isa
from mapper_lpu.check_columns import GATHER, MEM, READ, SCATTER, WRITE, Bool, Columns, columns
from mapper_lpu.check_names import names, related
from mapper_lpu.check_streams import unit


@dataclass(frozen=True)
class MemPorts:
    """A MEM instruction accesses whole 320-byte rows of its own slice: one row (read, write) or one table of
    rows (gather, scatter), inside the slice and the buffer; at most one instruction per slice and cycle."""

    name: str = "MemPorts"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table = columns(schedule, phase)
        for bad, why in _port_faults(schedule, table):
            for step in np.flatnonzero(bad):
                yield _violation(schedule, table, why, int(step))
        steps = table.steps(*MEM)
        order = steps[np.lexsort((table.times.start[steps], table.step_unit[steps]))]
        start, slices = table.times.start[order], table.step_unit[order]
        for row in np.flatnonzero((start[1:] == start[:-1]) & (slices[1:] == slices[:-1])):
            yield _violation(
                schedule, table, "shares its slice and cycle", int(order[row]), int(order[row + 1])
            )


def _violation(schedule: Schedule, table: Columns, why: str, step: int, other: int = -1) -> Violation:
    message = f"{label(schedule, table.phase, table.times, step)} {why}"
    steps: tuple[int, ...] = (step,)
    if other >= 0:
        steps = (step, other)
        message += f" ({label(schedule, table.phase, table.times, other)})"
    return Violation(message, steps, unit(schedule, table, step), int(table.times.start[step]))


def _port_faults(schedule: Schedule, table: Columns) -> Iterator[tuple[Bool, str]]:
    code, mem = table.step_code, np.isin(table.step_code, MEM)
    reads = np.isin(code, (READ, GATHER))
    yield table.reads != reads, "has the wrong number of slices that it reads"
    yield table.writes != np.isin(code, (WRITE, SCATTER)), "has the wrong number of slices that it writes"
    memory = np.append(_memory_map(schedule)[schedule.buffers.column("memory").to_numpy()], -1)
    here = table.buffer >= 0
    yield mem & here & (memory[table.buffer] != table.step_unit), "accesses the memory of another slice"
    base = np.append(schedule.buffers.column("offset").to_numpy().astype(np.int64), 0)[table.buffer]
    low, high = _bytes(table)
    yield mem & here & ((base + low) % isa.LANES != 0), "is not aligned to a row"
    one = np.isin(code, (READ, WRITE))
    yield mem & here & one & (high - low != isa.LANES), "does not access exactly one row"
    yield mem & here & ((high - low) % isa.LANES != 0), "accesses part of a row"
    size = np.append(schedule.buffers.column("bytes").to_numpy().astype(np.int64), 0)[table.buffer]
    outside = (high > size) | (base + high > isa.ROWS * isa.LANES)
    yield mem & here & outside, "accesses bytes outside its buffer or slice"


def _bytes(table: Columns) -> tuple[Int, Int]:
    low, high = np.zeros((2, len(table.times)), np.int64)
    for accesses in (table.times.writes, table.times.reads):
        low[accesses.step], high[accesses.step] = accesses.low, accesses.high
    return low, high


def _memory_map(schedule: Schedule) -> Int:
    """For each of Schedule.memories the unit of its slice, or -1."""
    known = {name: number for number, name in enumerate(isa.UNITS) if name.startswith("mem.")}
    return np.array([known.get(name, -1) for name, _ in schedule.memories], np.int64)


@dataclass(frozen=True)
class MemHazards:
    """Every read finds the version of its row that it is meant to see.

    - The row was written in this run at an earlier cycle, or its buffer holds data from the start (input,
      weight, constant, state).
    - The last write went through the same value, at the same row of it: nothing else has overwritten the row.
    - The writer's op is the reader's, or one that it depends on; and no later repetition has written it
      already.
    - A gather may read each row of its table; a scatter counts as writing each row of its table.
    - A row that is written is read before it is written again, unless it is left in an output or a state.
    """

    name: str = "MemHazards"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table = columns(schedule, phase)
        usable = (table.buffer >= 0) & (table.address >= 0) & (table.address + table.lines <= isa.ROWS)
        initial, kept = _initial(schedule, phase)
        write, write_line = _lines(table, usable, WRITE, SCATTER)
        order = np.argsort(write_line * _TIME + table.times.start[write], kind="stable")
        write, write_line = write[order], write_line[order]
        key = write_line * _TIME + table.times.start[write]
        read, line = _lines(table, usable & ~_untouched(table, write_line, initial), READ, GATHER)
        at = np.searchsorted(key, line * _TIME + table.times.start[read], side="left") - 1
        writer = np.where(at >= 0, write[at], -1) if len(write) else np.full(len(read), -1, np.int64)
        writer = np.where(write_line[at] == line, writer, -1) if len(write) else writer
        for i in np.flatnonzero((writer < 0) & ~initial[line]):
            why = f"reads row {line[i] % isa.ROWS} of its slice, which nothing has written yet"
            yield _violation(schedule, table, why, int(read[i]))
        seen = writer >= 0
        yield from _versions(schedule, table, read[seen], line[seen], writer[seen])
        used = np.zeros(len(write), bool)
        used[at[seen]] = True
        last = np.append(write_line[1:] != write_line[:-1], True)[: len(write)]
        certain = table.step_code[write] == WRITE
        for i in np.flatnonzero(certain & ~used & ~(last & kept[write_line])):
            why = f"writes {buffer_label(schedule, table.buffer[write[i]])}, and nobody reads it"
            yield _violation(schedule, table, why, int(write[i]))


_TIME = 1 << 40


def _versions(schedule: Schedule, table: Columns, read: Int, line: Int, write: Int) -> Iterator[Violation]:
    """Reads whose last write belongs to something else. `line`: the row in question."""
    known, times = names(schedule), table.times
    a, b = table.buffer[read], table.buffer[write]
    row_a = line % isa.ROWS - table.address[read] + table.line[read]
    row_b = line % isa.ROWS - table.address[write] + table.line[write]
    same = (known.value[a] == known.value[b]) & (known.plane[a] == known.plane[b]) & (row_a == row_b)
    later = (times.block[read] == times.block[write]) & (times.repetition[write] > times.repetition[read])
    for bad, why in (
        (~same, "reads a row that was last written as another value"),
        (later, "reads a row that a later repetition has already overwritten"),
        (
            ~related(schedule, table, write, read),
            "reads a row that was last written by an op without an edge to its own",
        ),
    ):
        for i in np.flatnonzero(bad):
            yield _violation(schedule, table, why, int(read[i]), int(write[i]))


def _lines(table: Columns, usable: Bool, single: int, many: int) -> tuple[Int, Int]:
    """(step, row of all MEM: slice * ROWS + row) of every row that the steps access; tables are spread
    out."""
    mem = table.legal & usable & (table.step_unit < 2 * isa.SLICES)
    steps = np.flatnonzero(mem & np.isin(table.step_code, (single, many)))
    owner, row = expand(table.address[steps], table.address[steps] + table.lines[steps])
    return steps[owner], table.step_unit[steps[owner]] * isa.ROWS + row


def _untouched(table: Columns, write_line: Int, initial: Bool) -> Bool:
    """Gathers from tables that hold data from the start and are never written: nothing to look at."""
    written = np.zeros(2 * isa.SLICES * isa.ROWS, bool)
    written[write_line] = True
    below = np.concatenate([[0], np.cumsum(written | ~initial)])
    low = np.clip(table.step_unit, 0, 2 * isa.SLICES - 1) * isa.ROWS + np.clip(table.address, 0, isa.ROWS)
    high = np.clip(low + table.lines, 0, len(written))
    clean: Bool = (table.step_code == GATHER) & (below[high] == below[low])
    return clean


def _initial(schedule: Schedule, phase: str) -> tuple[Bool, Bool]:
    """Of every row of all MEM: holds data before the program starts; counts after its end."""
    out = np.zeros((2, 2 * isa.SLICES * isa.ROWS), bool)
    units = _memory_map(schedule)[schedule.buffers.column("memory").to_numpy()]
    low = schedule.buffers.column("offset").to_numpy() // isa.LANES
    high = low - (-schedule.buffers.column("bytes").to_numpy() // isa.LANES)
    for port in schedule.ports:
        mine = not port.programs or phase in port.programs
        flags = (
            port.kind in ("weight", "constant", "state") or (port.kind == "input" and mine),
            port.kind == "state" or (port.kind == "output" and mine),
        )
        for buffer in port.buffers:
            if units[buffer] >= 0:
                base = int(units[buffer]) * isa.ROWS
                part = slice(base + int(low[buffer]), base + min(int(high[buffer]), isa.ROWS))
                for row, flag in zip(out, flags, strict=True):
                    row[part] |= flag
    return out[0], out[1]
