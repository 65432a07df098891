"""Where vectors live: allocation of MEM rows, and the buffers and ports that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mapper.errors import CapacityError
from mapper.schedule.tables import Port, PortKind
from mapper_lpu.isa import LANES, ROWS, SLICES, TYPE_BYTES, UNITS


@dataclass(eq=False)
class Stored:
    """A value of `rows` vectors of type `type` in MEM: byte plane j in slice `units[j]`, rows base[j]...

    With `ways` = w > 1 row r is in slice units[(r % w) * bytes + j] at row r // w.
    `ready[r]` is the first cycle (of the frame being scheduled) at which row r may be read; `last[r]` the
    last read.
    """

    name: str
    type: int
    rows: int
    units: tuple[int, ...]
    base: tuple[int, ...]
    buffers: tuple[int, ...]
    ways: int = 1
    temporary: bool = False
    ready: dict[int, int] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)

    @property
    def hemisphere(self) -> int:
        """0 = east, 1 = west."""
        return self.units[0] // SLICES

    @property
    def planes(self) -> int:
        """Byte planes: the bytes of one element."""
        return TYPE_BYTES[self.type]

    def place(self, row: int, plane: int) -> tuple[int, int, int]:
        """(unit, buffer, row inside the buffer) of byte plane `plane` of vector `row`."""
        index = (row % self.ways) * self.planes + plane
        return self.units[index], self.buffers[index], row // self.ways


@dataclass
class Storage:
    """A bump allocator per slice, and the rows of the buffer table."""

    top: list[int] = field(default_factory=lambda: [0] * (2 * SLICES))
    memory: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    value: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)
    temporary: list[bool] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)

    def buffer(self, unit: int, rows: int, value: str, program: str, temporary: bool) -> tuple[int, int]:
        """Allocate `rows` rows in slice `unit`. Returns (buffer, first row). Raises CapacityError."""
        base = self.top[unit]
        if base + rows > ROWS:
            raise CapacityError(
                f"{value} does not fit: MEM slice {UNITS[unit]} holds {ROWS} rows of {LANES} bytes, "
                f"{base + rows} are needed"
            )
        self.top[unit] += rows
        self.memory.append(unit)
        self.offset.append(base * LANES)
        self.bytes.append(rows * LANES)
        self.value.append(value)
        self.program.append(program)
        self.temporary.append(temporary)
        return len(self.memory) - 1, base

    def store(
        self,
        name: str,
        type: int,
        rows: int,
        units: Sequence[int],
        *,
        ways: int = 1,
        program: str = "",
        temporary: bool = False,
    ) -> Stored:
        """Allocate a value over `units` (planes x ways of them). Raises CapacityError."""
        per = -(-rows // ways)
        buffers, bases = [], []
        for index, unit in enumerate(units):
            plane = index % TYPE_BYTES[type]
            way = f".{index // TYPE_BYTES[type]}" if ways > 1 else ""
            number, base = self.buffer(unit, per, f"{name}{way}#{plane}", program, temporary)
            buffers.append(number)
            bases.append(base)
        return Stored(name, type, rows, tuple(units), tuple(bases), tuple(buffers), ways, temporary)

    def port(
        self,
        name: str,
        kind: PortKind,
        dtype: str,
        shape: Sequence[int],
        stored: Stored,
        layout: dict[str, Any],
        source: Any = None,
        programs: Sequence[str] = (),
    ) -> None:
        """Declare that the array `name` fills `stored` by `layout`."""
        self.ports.append(
            Port(name, kind, dtype, tuple(shape), stored.buffers, layout, source, tuple(programs))
        )


def mem(hemisphere: int, first: int, count: int) -> tuple[int, ...]:
    """Unit numbers of `count` MEM slices of a hemisphere, from slice `first` outward."""
    return tuple(hemisphere * SLICES + first + i for i in range(count))
