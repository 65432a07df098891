"""Streams: one producer per stream register and cycle, and each consumer finds the vector it is meant to
see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first, label
from mapper_lpu.check_columns import (
    ACTIVATE,
    GATHER,
    PERMUTE,
    READ,
    VXM,
    Bool,
    Columns,
    columns,
    operand_types,
)
from mapper_lpu.check_flow import INDEX, Flow, Uses, flow
from mapper_lpu.check_names import names, related


@dataclass(frozen=True)
class StreamExclusive:
    """At most one instruction produces on a (direction, stream, position, cycle)."""

    name: str = "StreamExclusive"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table, made = columns(schedule, phase), flow(schedule, phase).made
        for row in np.flatnonzero(made.key[1:] == made.key[:-1]):
            a, b = int(made.step[row]), int(made.step[row + 1])
            message = (
                f"{label(schedule, phase, table.times, a)} and {label(schedule, phase, table.times, b)} both "
                f"produce {place(made, int(row))}"
            )
            yield Violation(message, (a, b), unit(schedule, table, b), int(made.at[row]), 1)


@dataclass(frozen=True)
class StreamArrival:
    """Each consumer sees exactly the vectors that belong together and come along the graph's edges.

    - Every consumed stream carries a vector.
    - The byte streams of one operand come, in order, from one instruction of the same width, or from MEM rows
      of one value: buffers `<value>#0`, `#1`, ... at the same row, and as many as the value has.
    - The 16 streams of a weight load come from MEM rows of one byte plane of one value, in the order of its
      ways.
    - What an ALU has computed is taken as the type that it has.
    - The producer's op is the consumer's, or one that it depends on.
    """

    name: str = "StreamArrival"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table, edges = columns(schedule, phase), flow(schedule, phase)
        for row in np.flatnonzero(edges.source < 0):
            yield _violation(schedule, table, edges, int(row), "but nothing was produced there")
        for bad, why in _mismatches(schedule, table, edges):
            for row in np.flatnonzero(bad & (edges.source >= 0)):
                yield _violation(schedule, table, edges, int(row), why)


def place(uses: Uses, row: int) -> str:
    """A stream register for a message."""
    d = "EW"[uses.direction[row]]
    return f"stream {d}{uses.stream[row]} at position {uses.x[row]} in cycle {uses.at[row]}"


def unit(schedule: Schedule, table: Columns, step: int | np.integer[Any]) -> str:
    """The name of a step's unit."""
    name: str = schedule.units[int(table.times.unit[step])]
    return name


def _violation(schedule: Schedule, table: Columns, edges: Flow, row: int, why: str) -> Violation:
    used, step, source = edges.used, int(edges.used.step[row]), int(edges.source[row])
    steps: tuple[int, ...] = (step,)
    if source >= 0:
        steps = (step, int(edges.made.step[source]))
        why = f"which {label(schedule, table.phase, table.times, steps[1])} produced: {why}"
    message = f"{label(schedule, table.phase, table.times, step)} consumes {place(used, row)}, {why}"
    return Violation(message, steps, unit(schedule, table, step), int(used.at[row]))


def _mismatches(schedule: Schedule, table: Columns, edges: Flow) -> Iterator[tuple[Bool, str]]:
    """(rows of the consumed streams, what is wrong); rows without a producer may be among them."""
    used, made, source = edges.used, edges.made, edges.source
    if not len(made):
        return
    producer = made.step[source]
    code, consumer = table.step_code[producer], table.step_code[used.step]
    memory = np.isin(code, (READ, GATHER))
    load, index = used.width == 16, used.operand == INDEX
    # what takes a whole element; writes and one-byte permutes handle bytes
    typed = (
        index | np.isin(consumer, VXM) | (consumer == ACTIVATE) | ((consumer == PERMUTE) & (used.width > 1))
    )
    exact = typed & ~index & (consumer != PERMUTE)
    start = edges.first()
    head = producer[start]
    yield typed & (memory != memory[start]), "its bytes come partly from MEM"
    yield typed & ~memory & (producer != head), "its bytes come from different instructions"
    yield typed & ~memory & (made.plane[source] != used.plane), "its bytes are not in order"
    yield exact & ~memory & (made.width[source] != used.width), "the element has another width"
    results, wanted = _types(table)
    differ = (results[producer] >= 0) & (wanted[used.step] >= 0) & (results[producer] != wanted[used.step])
    yield exact & differ, "the element has another type"
    known, buffer = names(schedule), table.buffer[producer]
    first_buffer = buffer[start]
    same = (known.value[buffer] == known.value[first_buffer]) & (table.line[producer] == table.line[head])
    same &= (code == code[start]) & (known.plane[buffer] == used.plane)
    yield typed & memory & ~same, "its bytes are not the planes of one row of one value"
    yield exact & memory & (known.planes[buffer] != used.width), "the value has elements of another width"
    yield (
        typed & (code == GATHER) & (_index(table, edges)[producer] != _index(table, edges)[head]),
        ("its bytes are gathered by different indices"),
    )
    yield load & ~memory, "weights come from MEM"
    same = (known.base[buffer] == known.base[first_buffer]) & (
        known.plane[buffer] == known.plane[first_buffer]
    )
    same &= (known.way[buffer] == known.way[first_buffer] + used.plane) | (known.way[buffer] < 0)
    same &= (code == code[start]) & (table.line[producer] == table.line[head])
    yield load & memory & ~same, "its weights are not one byte plane of consecutive rows of one value"
    yield ~related(schedule, table, producer, used.step), "the graph has no such edge"


def _types(table: Columns) -> tuple[Int, Int]:
    """Type codes of each step's result and operands where its instruction tells them, else -1."""
    operand, result = operand_types(table.code, table.args)
    alu = np.isin(table.code, VXM)
    wanted = np.where(alu, operand, np.where(table.code == ACTIVATE, table.args[:, 0], -1))
    return np.where(alu, result, -1)[table.row], wanted[table.row]


def _index(table: Columns, edges: Flow) -> Int:
    """For each gather step where its index comes from: a row of MEM, or an instruction."""
    used = edges.used
    rows = np.flatnonzero((used.operand == INDEX) & (used.plane == 0) & (edges.source >= 0))
    producer = edges.made.step[edges.source[rows]]
    memory = table.step_code[producer] == READ
    place = table.buffer[producer] * (1 << 20) + table.line[producer]
    out = np.full(len(table.times), -1, np.int64)
    out[used.step[rows]] = np.where(memory, place, -2 - producer)
    return out
