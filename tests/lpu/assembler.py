"""A tiny assembler for hand-written lpu programs, and memories to run them on."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import mapper_lpu
from mapper.runtime.written import Written
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    ModelRef,
    Port,
    Program,
    Request,
    Schedule,
    StepTable,
    step_table,
)
from mapper_lpu import isa
from mapper_lpu.execute import Executor

MACHINE = (Path(mapper_lpu.__file__).parent / "machines" / "groq-lpu1.toml").read_text(encoding="utf-8")
E, W = isa.EAST, isa.WEST
READS = ("mem.read", "mem.gather")
Bytes = npt.NDArray[np.uint8]


def bits(value: float) -> int:
    """The bits of an f32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@dataclass
class Line:
    """One instruction: `at` = (buffer, byte offset, bytes) of a MEM operand."""

    cycle: int
    unit: str
    opcode: str
    args: Sequence[int] = ()
    at: tuple[int, int, int] | None = None


def table(lines: Sequence[Line]) -> StepTable:
    """A StepTable of these lines, in the order given."""
    reads = [x.at if x.at and x.opcode in READS else None for x in lines]
    writes = [x.at if x.at and x.opcode not in READS else None for x in lines]
    offsets = np.cumsum([0] + [len(x.args) for x in lines])
    flat = np.array([a for x in lines for a in x.args], np.int64)
    return step_table(
        [x.cycle for x in lines],
        [2 if x.opcode == "mxm.install" else 1 for x in lines],
        [isa.UNITS.index(x.unit) for x in lines],
        [isa.OPCODES.index(x.opcode) for x in lines],
        (offsets, flat),
        _slices(reads),
        _slices(writes),
        *([0] * len(lines) for _ in range(3)),
    )


def _slices(items: Sequence[tuple[int, int, int] | None]) -> Any:
    there = np.array([i for i in items if i is not None], np.int64).reshape(-1, 3)
    return (np.cumsum([0] + [i is not None for i in items]), there[:, 0], there[:, 1], there[:, 2])


@dataclass
class Bench:
    """Memories and buffers for hand-written programs; data is put in and looked at by slice name and row."""

    rows: int = 64
    buffers: list[tuple[int, int, int]] = field(default_factory=list)
    data_of: dict[int, Bytes] = field(default_factory=dict)
    written_of: dict[int, Written] = field(default_factory=dict)

    def data(self, memory: int) -> Bytes:
        """Bytes of a slice."""
        return self.data_of.setdefault(memory, np.zeros(self.rows * 320, np.uint8))

    def bytes_of(self, number: int) -> Bytes:
        """Bytes of a buffer."""
        memory, low, size = self.buffers[number]
        return self.data(memory)[low : low + size]

    def written(self, memory: int) -> Written:
        """Which bytes of a slice have been written."""
        return self.written_of.setdefault(memory, Written(self.rows * 320))

    def buffer(self, unit: str, row: int = 0, rows: int = 1) -> int:
        """A buffer of some rows of a slice."""
        self.buffers.append((isa.UNITS.index(unit), row * 320, rows * 320))
        return len(self.buffers) - 1

    def put(self, unit: str, row: int, lanes: npt.NDArray[Any]) -> int:
        """Fill a row with 320 bytes, and a buffer of that row."""
        memory = isa.UNITS.index(unit)
        self.data(memory)[row * 320 : row * 320 + 320] = lanes
        self.written(memory)[row * 320 : row * 320 + 320] = True
        return self.buffer(unit, row)

    def row(self, unit: str, row: int = 0) -> Bytes:
        """A row's 320 bytes. It must have been written."""
        memory = isa.UNITS.index(unit)
        assert self.written(memory)[row * 320 : row * 320 + 320].all(), f"{unit} row {row} was not written"
        return self.data(memory)[row * 320 : row * 320 + 320].copy()

    def planes(self, units: Sequence[str], row: int, values: npt.NDArray[Any]) -> list[int]:
        """Store 320 numbers, one byte plane per slice, low byte first."""
        spread = np.ascontiguousarray(values).view(np.uint8).reshape(320, -1)
        return [self.put(u, row, spread[:, i]) for i, u in enumerate(units)]

    def numbers(self, units: Sequence[str], row: int, dtype: Any) -> Any:
        """320 numbers from their byte planes."""
        stacked: Any = np.stack([self.row(u, row) for u in units], axis=1)
        return stacked.copy().view(dtype)[:, 0]

    def schedule(
        self,
        blocks: Sequence[Block],
        *,
        cycles: int = 1000,
        plan: Any = None,
        ports: Sequence[Port] = (),
        constants: Mapping[str, npt.NDArray[Any]] | None = None,
        machine: str = MACHINE,
    ) -> Schedule:
        """A one-program schedule over these buffers."""
        memory, offset, size = (
            (list(c) for c in zip(*self.buffers, strict=True)) if self.buffers else ([], [], [])
        )
        count = len(memory)
        columns = [memory, offset, size, [""] * count, [-1] * count, [-1] * count, [""] * count]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, BUFFER_SCHEMA, strict=True)]
        return Schedule(
            target="lpu",
            machine="groq-lpu1",
            machine_toml=machine,
            chips=1,
            request=Request(),
            model=ModelRef("", ""),
            clock_hz=9e8,
            units=isa.UNITS,
            memories=tuple((u, isa.ROWS * 320) for u in isa.UNITS[:88]),
            opcodes=isa.OPCODES,
            programs={"decode": Program("decode", tuple(blocks), cycles, 1)},
            buffers=pa.Table.from_arrays(arrays, schema=BUFFER_SCHEMA),
            ops=OP_SCHEMA.empty_table(),
            ports=tuple(ports),
            constants=constants or {},
            plan=plan,
        )

    def run(self, lines: Sequence[Line], **options: Any) -> int:
        """Execute one block of lines."""
        return Executor().run(self.schedule([Block("all", table(lines))], **options), "decode", self)


def bindings(rows: Sequence[tuple[int, int, int]]) -> pa.Table:
    """A binding table of (slot, repetition, buffer)."""
    columns = list(zip(*rows, strict=True))
    return pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, BINDING_SCHEMA, strict=True)], schema=BINDING_SCHEMA
    )
