"""The VXM: what each ALU can do, which streams it is wired to, and what its output register holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Violation, first, label
from mapper_lpu import isa
from mapper_lpu.check_columns import BINARY, CODE, VXM, Bool, Columns, columns, operand_types
from mapper_lpu.check_flow import Flow, flow
from mapper_lpu.check_names import related
from mapper_lpu.check_streams import unit
from mapper_lpu.check_values import accumulators

_FIRST_ALU = isa.UNITS.index("vxm.00")
_SMALL = np.array([CODE[name] for name in sorted(isa.SMALL_OPS)])
_LARGE_ALUS = np.array(sorted(isa.LARGE_ALUS))


@dataclass(frozen=True)
class VxmWiring:
    """Wiring and registers of the ALUs.

    - max, min, relu, exp2, rsqrt, tanh and cast need a large ALU.
    - Operands of row r are on SG4 2r..2r+3 (mod 8); one ALU does not take an SG4 index from both directions.
    - An inner operand was produced at x = 0 in that very cycle by an ALU: of lower rank on E, of higher rank
      on W.
    - An accumulator operand follows an instruction that the same ALU has completed, of the operand's type.
    """

    name: str = "VxmWiring"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table, edges = columns(schedule, phase), flow(schedule, phase)
        vxm = (table.fault == 0) & np.isin(table.code, VXM)
        for bad, why in _static(table):
            # the first step of each faulty row
            for row in np.flatnonzero(bad & vxm)[:1]:
                for step in np.flatnonzero(table.row == row)[:1]:
                    yield _violation(schedule, table, int(step), why)
        for step, why, other in (*_inner(table, edges), *_acc(schedule, table)):
            yield _violation(schedule, table, step, why, other)


def _violation(schedule: Schedule, table: Columns, step: int, why: str, other: int = -1) -> Violation:
    message = f"{label(schedule, table.phase, table.times, step)} {why}"
    steps: tuple[int, ...] = (step,)
    if other >= 0:
        steps = (step, other)
        message += f" ({label(schedule, table.phase, table.times, other)})"
    return Violation(message, steps, unit(schedule, table, step), int(table.times.start[step]))


def _static(table: Columns) -> Iterator[tuple[Bool, str]]:
    """(rows, what is wrong with them), from the rows alone."""
    alu = table.unit - _FIRST_ALU
    small = ~np.isin(alu, _LARGE_ALUS)
    yield small & ~np.isin(table.code, _SMALL), "needs a large ALU"
    a = table.args.T
    binary = np.isin(table.code, BINARY)
    flows = [(a[0] == isa.OUTER) | (a[0] == isa.INNER), binary & ((a[3] == isa.OUTER) | (a[3] == isa.INNER))]
    group = [a[2] // 4, a[5] // 4]
    for here, g in zip(flows, group, strict=True):
        yield (
            here & ((g - 2 * (alu // 4)) % 8 > 3),
            "takes an operand from a stream group not wired to its row",
        )
    both = flows[0] & flows[1] & (group[0] == group[1]) & (a[1] != a[4])
    yield both, "takes one stream group index from both directions"


def _inner(table: Columns, edges: Flow) -> Iterator[tuple[int, str, int]]:
    """Inner operands that no ALU of the right rank has produced in that cycle."""
    used = edges.used
    rows = np.flatnonzero(np.isin(table.step_code[used.step], VXM) & (used.plane == 0) & (edges.source >= 0))
    args = table.args[table.row[used.step[rows]]]
    kind = np.where(used.operand[rows] == 0, args[:, 0], args[:, 3])
    rows = rows[kind == isa.INNER]
    source = edges.source[rows]
    producer, step = edges.made.step[source], used.step[rows]
    fresh = (edges.made.at[source] == used.at[rows]) & np.isin(table.step_code[producer], VXM)
    for row in np.flatnonzero(~fresh):
        yield int(step[row]), "takes an inner operand that no ALU gives in that cycle", int(producer[row])
    rank = (table.step_unit - _FIRST_ALU) % 4
    lower = rank[producer] < rank[step]
    higher = rank[producer] > rank[step]
    wrong = fresh & ~np.where(used.direction[rows] == isa.EAST, lower, higher)
    for row in np.flatnonzero(wrong):
        yield int(step[row]), "takes an inner operand from an ALU of the wrong rank", int(producer[row])


def _acc(schedule: Schedule, table: Columns) -> Iterator[tuple[int, str, int]]:
    step, _, before = accumulators(table)
    for row in np.flatnonzero(before < 0):
        yield int(step[row]), "takes the ALU's output before any instruction has completed", -1
    step, before = step[before >= 0], before[before >= 0]
    result = operand_types(table.code, table.args)[1][table.row[before]]
    wanted = operand_types(table.code, table.args)[0][table.row[step]]
    for row in np.flatnonzero(result != wanted):
        yield int(step[row]), "takes an accumulator of another type", int(before[row])
    for row in np.flatnonzero(~related(schedule, table, before, step)):
        yield int(step[row]), "takes an accumulator that the graph has no edge for", int(before[row])
