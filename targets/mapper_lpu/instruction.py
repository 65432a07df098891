"""Instructions at relative cycles, and what a rigid piece of them needs and makes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from mapper.machine import Machine
from mapper_lpu import calendar
from mapper_lpu.chain import Chain, Tile
from mapper_lpu.isa import SLICES, UNITS, mxm_position, position
from mapper_lpu.storage import Stored

FIRST_ALU = UNITS.index("vxm.00")
_UNIT = {name: number for number, name in enumerate(UNITS)}


class Instruction(NamedTuple):
    """One instruction at a relative cycle. mode 0: no memory operand, 1: reads, 2: writes `rows` rows of
    `buffer`.
    """

    cycle: int
    unit: int
    opcode: str
    args: tuple[int, ...]
    ir: int
    mode: int = 0
    buffer: int = -1
    row: int = 0
    rows: int = 1
    duration: int = 1
    flops: int = 0

    def at(self, cycle: int) -> Instruction:
        """The same instruction, `cycle` cycles later."""
        return Instruction(self[0] + cycle, *self[1:])


@dataclass(frozen=True)
class Latencies:
    """The machine's constants in cycles, read once."""

    read: int
    gather: int
    entry: int
    alu: int
    mxm: int
    install: int
    permute: int
    crossing: int
    edge: int  # position of the MXM

    @staticmethod
    def of(machine: Machine) -> Latencies:
        """From a machine file."""
        return Latencies(
            machine.whole("mem.read"),
            machine.whole("mem.gather"),
            machine.whole("vxm.entry"),
            machine.whole("vxm.alu"),
            machine.whole("mxm.latency"),
            machine.whole("mxm.install"),
            machine.whole("sxm.permute"),
            machine.whole("sxm.crossing"),
            mxm_position(machine),
        )


CONSTANTS = (
    "mem.read",
    "mem.gather",
    "vxm.entry",
    "vxm.alu",
    "mxm.latency",
    "mxm.install",
    "sxm.crossing",
)
Form = tuple[int, ...]
"""How often each of CONSTANTS counts in a relative cycle: what retiming with other constants needs."""


def form(**counts: int) -> Form:
    """A Form from counts by constant, dots as underscores."""
    return tuple(counts.get(name.replace(".", "_"), 0) for name in CONSTANTS)


@dataclass
class Template:
    """A chain made rigid. `uses` are calendar uses; the lists below hold (what, relative cycle, form of the
    cycle).
    """

    chain: Chain
    instructions: list[Instruction] = field(default_factory=list)
    uses: list[calendar.Use] = field(default_factory=list)
    reads: list[tuple[Stored, int, int, Form]] = field(default_factory=list)
    writes: list[tuple[Stored, int, int, Form]] = field(default_factory=list)
    activations: list[tuple[Tile, int, Form]] = field(default_factory=list)


def unit(name: str) -> int:
    """Number of a unit by name."""
    return _UNIT[name]


_DISTANCE = tuple(abs(position(number, 0)) for number in range(2 * SLICES))


def distance(number: int) -> int:
    """|x| of a MEM unit."""
    return _DISTANCE[number]


def immediate(value: float) -> int:
    """The bits of an f32 as an int."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
