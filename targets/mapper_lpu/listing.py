"""Emission: the assembly listing of each program, one section per queue, and how long it is.

    .program decode cycles 23456
    .queue mem.e.07
    nop 12                    no instruction for 12 cycles
    read 123 > E5             row 123 of the slice to stream 5 eastward
    repeat 15 2 1             15 times more, every 2 cycles, each time 1 row further
    gather 100+64 W8 > E5     table of rows 100..163, index on W8 and W9
    write E5 > 123
    scatter E5 W8 > 100+64
    add o:E4 #0x3f800000 > W8    o: from outside, i: inner, acc: the ALU's own output, # immediate (bits)
    cast.f32.i8 i:E4 > -         "> -": the result stays in the ALU
    load 5 @16                load group 5 from streams 16..31; `repeat` moves the group
    activate f16 4
    emit 8
    permute E4 > W8 width 4 map 3

`listing_parse.py` reads it back. A repeat stands for copies of the instruction before it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.backend import Artifact
from mapper.errors import ScheduleError
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import label
from mapper_lpu import isa
from mapper_lpu.check_columns import (
    BINARY,
    CAST,
    INSTALL,
    LOAD,
    MEM,
    VXM,
    Cache,
    Columns,
    columns,
    result_args,
)

TYPES = ("i8", "i16", "i32", "f16", "f32")


@dataclass(frozen=True)
class Compressed:
    """A program's instructions queue by queue, in time order. `order`: steps; `address`: MEM row or load
    group.

    `head[i]` is the place in `order` of listed instruction i, followed by `times[i]` repetitions every
    `distance[i]` cycles with the address moved by `stride[i]`. `gap[i]`: idle cycles before it.
    """

    order: Int
    address: Int
    head: Int
    times: Int
    distance: Int
    stride: Int
    gap: Int

    def lines(self, table: Columns) -> Int:
        """Listed instructions of each queue, with nop and repeat, by row of isa.UNITS."""
        unit = table.step_unit[self.order[self.head]]
        weight = 1 + (self.times > 0) + (self.gap > 0)
        return np.bincount(unit, weight, minlength=len(isa.UNITS)).astype(np.int64)


_CACHE = Cache()
_TEXTS = Cache()


def compressed(schedule: Schedule, phase: str) -> Compressed:
    """Program `phase` with repeats folded. Raises ScheduleError for steps that no listing can state."""
    return _CACHE.get(schedule, phase, _compress)


def _compress(schedule: Schedule, phase: str) -> Compressed:
    table = columns(schedule, phase)
    times = table.times
    bad = np.flatnonzero(~table.legal | (times.start < 0))
    if len(bad):
        raise ScheduleError(f"{label(schedule, phase, times, bad[0])} cannot be listed")
    order = np.lexsort((times.start, table.step_unit))
    start, unit = times.start[order], table.step_unit[order]
    code, row = table.step_code[order], table.row[order]
    end = start + np.where(code == INSTALL, table.timing.install, 1)
    opens = np.append(True, unit[1:] != unit[:-1])[: len(order)]
    gap = start - np.where(opens, 0, np.append(0, end[:-1])[: len(order)])
    if (gap < 0).any():
        raise ScheduleError(
            f"{label(schedule, phase, times, order[np.argmax(gap < 0)])} meets another in its queue"
        )
    group = np.where(code == LOAD, table.args[row, 0], 0)
    address = np.where(np.isin(code, MEM), table.address[order], group)
    kind = _signatures(table)[row]
    lines = table.lines[order]
    link = ~opens[1:] & (kind[1:] == kind[:-1]) & (lines[1:] == lines[:-1])
    head, count = _fold(link, np.diff(start), np.diff(address))
    following = np.minimum(head + 1, len(order) - 1)
    distance, stride = start[following] - start[head], address[following] - address[head]
    return Compressed(order, address, head, count, distance, stride, gap[head])


def _signatures(table: Columns) -> Int:
    """A number per step-table row, equal for rows with the same opcode and arguments but for the load
    group."""
    keys = np.column_stack([table.code, table.args])
    keys[table.code == LOAD, 1] = 0
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _fold(link: np.typing.NDArray[np.bool_], dt: Int, da: Int) -> tuple[Int, Int]:
    """(first instruction, repetitions) of runs with one distance and one stride; a run repeats at least
    twice."""
    n = len(link) + 1
    if not len(link):
        return np.arange(min(n, 1)), np.zeros(min(n, 1), np.int64)
    fresh = np.append(True, (dt[1:] != dt[:-1]) | (da[1:] != da[:-1]) | ~link[1:] | ~link[:-1])
    begin = np.flatnonzero(fresh)
    length = np.diff(np.append(begin, len(link)))
    long = link[begin] & (length >= 2)
    times, covered = np.zeros(n, np.int64), np.zeros(n, bool)
    free = 0  # the first instruction that no run has taken
    for first, size in zip(begin[long].tolist(), length[long].tolist(), strict=True):
        last = first + size
        first = max(first, free)
        if last - first >= 2:
            times[first] = last - first
            covered[first + 1 : last + 1] = True
            free = last + 1
    head = np.flatnonzero(~covered)
    return head, times[head]


def listing(schedule: Schedule, phase: str) -> str:
    """The text of program `phase`. Raises ScheduleError for steps that no listing can state."""
    return _TEXTS.get(schedule, phase, _listing)


def _listing(schedule: Schedule, phase: str) -> str:
    table, parts = columns(schedule, phase), compressed(schedule, phase)
    if not len(table.times):
        return f".program {phase} cycles {schedule.programs[phase].cycles}\n"
    text = dict(zip(*_texts(table, table.row[parts.order[parts.head]]), strict=True))
    step = parts.order[parts.head]
    columns_ = (
        table.step_unit[step], table.row[step], parts.address[parts.head], table.lines[step], parts.gap,
        parts.times, parts.distance, parts.stride,
    )  # fmt: skip
    out = [f".program {phase} cycles {schedule.programs[phase].cycles}"]
    queue = -1
    for unit, row, address, lines, gap, times, distance, stride in zip(
        *(c.tolist() for c in columns_), strict=True
    ):
        if unit != queue:
            queue = unit
            out.append(f".queue {isa.UNITS[unit]}")
        if gap:
            out.append(f"nop {gap}")
        out.append(text[row] % ({"a": address, "n": lines}))
        if times:
            out.append(f"repeat {times} {distance} {stride}" if stride else f"repeat {times} {distance}")
    return "\n".join(out) + "\n"


def artifacts(schedule: Schedule) -> list[Artifact]:
    """`<phase>.s` of each program."""
    return [Artifact(f"{phase}.s", listing(schedule, phase).encode()) for phase in schedule.programs]


def _texts(table: Columns, rows: Int) -> tuple[list[int], Iterator[str]]:
    """Step-table rows, and the text of each, with %(a)d for the address and %(n)d for the rows of a table."""
    rows = np.unique(rows)
    out = result_args(table.code, table.args)
    lines = zip(
        table.code[rows].tolist(), table.args[rows].tolist(), out[0][rows].tolist(), out[1][rows].tolist(),
        strict=True,
    )  # fmt: skip
    return rows.tolist(), (_text(*line) for line in lines)


_MEM_TEXT = {
    "read": "read %(a)d > {0}", "write": "write {0} > %(a)d",
    "gather": "gather %(a)d+%(n)d {1} > {0}", "scatter": "scatter {0} {1} > %(a)d+%(n)d",
}  # fmt: skip


def _text(code: int, a: list[int], d: int, s: int) -> str:
    name = isa.OPCODES[code].split(".")[1]
    if code in MEM:
        return _MEM_TEXT[name].format(_stream(a[0], a[1]), _stream(a[2], a[3]))
    if code in VXM:
        operands = [_operand(*a[:3])]
        if code in BINARY:
            operands.append(_operand(*a[3:6]))
        if code == CAST:
            name = f"cast.{TYPES[a[5]]}.{TYPES[a[6]]}"
        result = _stream(d, s) if d >= 0 else "-" + (f"~{s}" if s else "")
        comment = "".join(f" ; {_float(o)}" for o in operands if o.startswith("#") and name != "iadd")
        return f"{name} {' '.join(operands)} > {result}{comment}".replace("%", "%%")
    if name == "load":
        return f"load %(a)d @{a[1]}"
    if name == "activate":
        return f"activate {TYPES[a[0]]} {a[1]}"
    if name == "emit":
        return f"emit {a[0]}"
    if name == "permute":
        return f"permute {_stream(a[0], a[1])} > {_stream(a[2], a[3])} width {a[4]} map {a[5]}"
    return name


def _stream(d: int, s: int) -> str:
    return f"{'EW'[d]}{s}"


def _operand(kind: int, d: int, s: int) -> str:
    if kind == isa.IMMEDIATE:
        return f"#{d:#x}" + (f"~{s}" if s else "")
    if kind == isa.ACC:
        return "acc" + (f"~{d}~{s}" if d or s else "")
    return f"{'o' if kind == isa.OUTER else 'i'}:{_stream(d, s)}"


def _float(operand: str) -> str:
    bits = int(operand[1:].split("~")[0], 16) & 0xFFFFFFFF
    return f"{struct.unpack('<f', struct.pack('<I', bits))[0]:.9g}"
