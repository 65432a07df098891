"""Who produces the vector that an instruction consumes: the def-use table of the streams of one program.

A vector on (direction, stream) moves one position per cycle, so it stays on one diagonal of space and time. A
key packs (direction, stream, diagonal, place along the flow); a consumer's vector comes from the producer
with the largest key that is not beyond its own on the same diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Int, Schedule
from mapper_lpu import isa
from mapper_lpu.check_columns import (
    ACTIVATE,
    BINARY,
    EMIT,
    GATHER,
    LOAD,
    PERMUTE,
    READ,
    SCATTER,
    VXM,
    WIDTH,
    WRITE,
    Bool,
    Cache,
    Columns,
    columns,
    operand_types,
    result_args,
)

DATA, SECOND, INDEX = 0, 1, 2
"""Operands of a consumer: its data or operand A; operand B; the index of a gather or scatter."""

_PLACES = 64  # places along the flow per diagonal; positions are within +-31
_DIAGONALS = 1 << 40


@dataclass(frozen=True)
class Uses:
    """Byte streams used, one row each, in step order and by plane within an operand.

    `width`: streams of the operand; `at`: cycle; `key`: see the module.
    """

    step: Int
    operand: Int
    plane: Int
    width: Int
    direction: Int
    stream: Int
    x: Int
    at: Int
    key: Int

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Flow:
    """`source[i]`: row of `made` that consumer row i of `used` sees, -1 for nothing. `made` is sorted by
    key."""

    made: Uses
    used: Uses
    source: Int

    def first(self) -> Int:
        """For each row of `used` the row of plane 0 of the same operand."""
        return np.arange(len(self.used)) - self.used.plane

    def consumed(self) -> Bool:
        """Which rows of `made` somebody consumes."""
        flags = np.zeros(len(self.made), bool)
        flags[self.source[self.source >= 0]] = True
        return flags


_CACHE = Cache()


def flow(schedule: Schedule, phase: str) -> Flow:
    """The def-use table of program `phase`; steps with faulty arguments take no part."""
    return _CACHE.get(schedule, phase, _flow)


def _flow(schedule: Schedule, phase: str) -> Flow:
    table = columns(schedule, phase)
    made = _expand(table, list(_producers(table)))
    order = np.argsort(made.key, kind="stable")
    made = _take(made, order)
    used = _expand(table, list(_consumers(table)))
    at = np.searchsorted(made.key, used.key, side="right") - 1
    if not len(made):
        return Flow(made, used, np.full(len(used), -1, np.int64))
    there = (at >= 0) & (made.key[at] // _PLACES == used.key // _PLACES)
    return Flow(made, used, np.where(there, at, -1))


def _take(uses: Uses, order: Int) -> Uses:
    return Uses(*(getattr(uses, name)[order] for name in Uses.__dataclass_fields__))


Part = tuple[Int, int, Int, Int, Int, Int, Int]
"""Of step-table rows: (row, operand, width, direction, first stream, position, cycle offset)."""


def _part(rows: Int, operand: int, width: Int | int, d: Int, s: Int, x: Int, offset: int) -> Part:
    return rows, operand, np.zeros(len(rows), np.int64) + width, d, s, x, np.full(len(rows), offset)


def _outward(x: Int) -> Int:
    return np.where(x > 0, isa.EAST, isa.WEST)


def _rows(table: Columns, *codes: int) -> Int:
    return np.flatnonzero((table.fault == 0) & np.isin(table.code, codes))


def _producers(table: Columns) -> Iterator[Part]:
    timing = table.timing
    for code, latency in ((READ, timing.read), (GATHER, timing.gather)):
        rows = _rows(table, code)
        a = table.args[rows].T
        yield _part(rows, DATA, 1, a[0], a[1], table.x[rows], latency)
    rows = _rows(table, *VXM)
    d, s = result_args(table.code[rows], table.args[rows])
    width = WIDTH[operand_types(table.code[rows], table.args[rows])[1]]
    out = d >= 0
    rows = rows[out]
    yield _part(rows, DATA, width[out], d[out], s[out], table.x[rows], timing.alu)
    rows = _rows(table, EMIT)
    x = table.x[rows]
    yield _part(rows, DATA, 4, 1 - _outward(x), table.args[rows, 0], x, 0)
    rows = _rows(table, PERMUTE)
    a = table.args[rows].T
    yield _part(rows, DATA, a[4], a[2], a[3], table.x[rows], timing.permute)


def _consumers(table: Columns) -> Iterator[Part]:
    for code in (WRITE, SCATTER):
        rows = _rows(table, code)
        a = table.args[rows].T
        yield _part(rows, DATA, 1, a[0], a[1], table.x[rows], 0)
    rows = _rows(table, GATHER, SCATTER)
    a = table.args[rows].T
    yield _part(rows, INDEX, 2, a[2], a[3], table.x[rows], 0)
    for operand, first, codes in ((DATA, 0, VXM), (SECOND, 3, BINARY)):
        for kind, offset in ((isa.OUTER, -table.timing.entry), (isa.INNER, 0)):
            rows = _rows(table, *codes)
            rows = rows[table.args[rows, first] == kind]
            width = WIDTH[operand_types(table.code[rows], table.args[rows])[0]]
            a = table.args[rows].T
            yield _part(rows, operand, width, a[first + 1], a[first + 2], table.x[rows], offset)
    rows = _rows(table, LOAD)
    yield _part(rows, DATA, 16, _outward(table.x[rows]), table.args[rows, 1], table.x[rows], 0)
    rows = _rows(table, ACTIVATE)
    a, x = table.args[rows].T, table.x[rows]
    yield _part(rows, DATA, np.where(a[0] == isa.F16, 2, 1), _outward(x), a[1], x, 0)
    rows = _rows(table, PERMUTE)
    a = table.args[rows].T
    yield _part(rows, DATA, a[4], a[0], a[1], table.x[rows], 0)


def _expand(table: Columns, parts: list[Part]) -> Uses:
    """The uses of all legal steps, in step order."""
    row, operand, width, d, s, x, offset = (
        np.concatenate([np.zeros(0, np.int64), *(np.broadcast_to(p[k], p[0].shape) for p in parts)])
        for k in range(7)
    )
    owner = np.repeat(np.arange(len(row)), width)
    plane = np.arange(len(owner)) - (np.cumsum(width) - width)[owner]
    order = np.argsort(row[owner], kind="stable")
    owner, plane = owner[order], plane[order]
    first = np.searchsorted(row[owner], np.arange(len(table.code) + 1))
    steps = np.flatnonzero(table.legal)
    count = np.diff(first)[table.row[steps]]
    step = np.repeat(steps, count)
    use = np.arange(len(step)) + np.repeat(first[table.row[steps]] - (np.cumsum(count) - count), count)
    owner, plane = owner[use], plane[use]
    at = table.times.start[step] + offset[owner]
    stream, along = s[owner] + plane, np.where(d == isa.EAST, x, -x)[owner]
    line = d[owner] * isa.STREAMS + stream
    key = (line * _DIAGONALS + (at - along + _DIAGONALS // 2)) * _PLACES + along + _PLACES // 2
    return Uses(step, operand[owner], plane, width[owner], d[owner], stream, x[owner], at, key)
