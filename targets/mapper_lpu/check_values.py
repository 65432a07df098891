"""Values in MEM: where the byte planes of a result go, and that nothing is computed or stored for nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, buffer_label, first, label
from mapper_lpu import isa
from mapper_lpu.check_columns import (
    BINARY,
    EMIT,
    GATHER,
    INSTALL,
    LOAD,
    PERMUTE,
    READ,
    SCATTER,
    VXM,
    WRITE,
    Bool,
    Columns,
    columns,
)
from mapper_lpu.check_flow import DATA, Flow, flow
from mapper_lpu.check_names import names
from mapper_lpu.check_streams import unit


@dataclass(frozen=True)
class ValueNames:
    """Byte plane j of a result is stored in a buffer named `<value>#j`, all planes of the value at one row.

    A byte that is only moved (read or gathered, perhaps permuted) keeps its plane.
    """

    name: str = "ValueNames"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table, edges, known = columns(schedule, phase), flow(schedule, phase), names(schedule)
        used, made = edges.used, edges.made
        stored = np.isin(table.step_code[used.step], (WRITE, SCATTER)) & (used.operand == DATA)
        rows = np.flatnonzero(stored & (edges.source >= 0))
        step, source = used.step[rows], edges.source[rows]
        producer, plane = made.step[source], made.plane[source]
        buffer = table.buffer[step]
        moved = np.isin(table.step_code[producer], (READ, GATHER))
        plane = np.where(moved, known.plane[table.buffer[producer]], plane)
        # a one-byte permute says nothing of the byte's plane
        told = (table.step_code[producer] != PERMUTE) | (made.width[source] > 1)
        for row in np.flatnonzero(told & (known.plane[buffer] != plane)):
            message = (
                f"{label(schedule, phase, table.times, step[row])} stores byte {plane[row]} of "
                f"{label(schedule, phase, table.times, producer[row])} in "
                f"{buffer_label(schedule, buffer[row])}"
            )
            steps = (int(step[row]), int(producer[row]))
            yield Violation(
                message, steps, unit(schedule, table, step[row]), int(table.times.start[step[row]])
            )
        whole = np.isin(table.step_code[producer], (*VXM, EMIT)) & (table.step_code[step] == WRITE)
        yield from self._planes(schedule, table, step[whole], producer[whole], made.width[source[whole]])

    def _planes(
        self, schedule: Schedule, table: Columns, step: Int, producer: Int, width: Int
    ) -> Iterator[Violation]:
        known, buffer = names(schedule), table.buffer[step]
        if not len(step):
            return
        keys = np.stack([producer, known.value[buffer], table.line[step]])
        _, index, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        planes = np.zeros(len(index), np.int64)
        np.bitwise_or.at(planes, group.reshape(-1), 1 << np.clip(known.plane[buffer], 0, 8))
        count = np.bincount(group.reshape(-1))
        full = (planes == (1 << width[index]) - 1) & (count == width[index])
        full &= known.planes[buffer[index]] == width[index]
        for at in index[~full]:
            message = (
                f"{label(schedule, table.phase, table.times, producer[at])} has a result of {width[at]} "
                f"bytes, but not each of them is stored once in the planes of "
                f"{buffer_label(schedule, buffer[at])}"
            )
            steps = (int(producer[at]), int(step[at]))
            yield Violation(message, steps, unit(schedule, table, step[at]), int(table.times.start[step[at]]))


@dataclass(frozen=True)
class NothingIdle:
    """Of every vector that an instruction produces at least one byte stream is consumed; a result that only
    stays in its ALU is used there. (Weights and rows that nobody uses: see MxmWeights and MemHazards.)"""

    name: str = "NothingIdle"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table, edges = columns(schedule, phase), flow(schedule, phase)
        useful = np.zeros(len(table.times), bool)
        useful[edges.made.step[edges.consumed()]] = True
        useful[np.isin(table.step_code, (WRITE, SCATTER, LOAD, INSTALL)) | ~table.legal] = True
        useful[~_produces(table, edges) & ~np.isin(table.step_code, VXM)] = True
        _, _, before = accumulators(table)
        useful[before[before >= 0]] = True
        for step in np.flatnonzero(~useful):
            message = f"{label(schedule, phase, table.times, step)} produces what nobody uses"
            yield Violation(message, (int(step),), unit(schedule, table, step), int(table.times.start[step]))


def _produces(table: Columns, edges: Flow) -> Bool:
    flags = np.zeros(len(table.times), bool)
    flags[edges.made.step] = True
    return flags


def accumulators(table: Columns) -> tuple[Int, Int, Int]:
    """(step, first argument of the operand, step whose result it finds in the ALU's output register or
    -1)."""
    alu = table.steps(*VXM)
    args = table.args[table.row[alu]]
    is_acc = [args[:, 0] == isa.ACC, (args[:, 3] == isa.ACC) & np.isin(table.step_code[alu], BINARY)]
    step = np.concatenate([alu[flag] for flag in is_acc])
    operand = np.concatenate([np.full(int(flag.sum()), 3 * k) for k, flag in enumerate(is_acc)])
    time = 1 << 40
    key = table.step_unit[alu] * time + table.times.start[alu] + (1 << 39)
    order = np.argsort(key, kind="stable")
    wanted = table.step_unit[step] * time + table.times.start[step] - table.timing.alu + (1 << 39)
    at = np.searchsorted(key[order], wanted, side="right") - 1
    found = alu[order[np.maximum(at, 0)]] if len(alu) else np.zeros(0, np.int64)
    there = (at >= 0) & (table.step_unit[found] == table.step_unit[step])
    return step, operand, np.where(there, found, -1)
