"""Chains: what is scheduled as one rigid piece. Vectors stream from MEM or the MXM through VXM ALUs back to
MEM.

A chain handles `count` vectors, one per cycle. Its operations form a dataflow graph; an edge inside the VXM
takes exactly one ALU latency, because a value on a stream passes an ALU in one cycle only. Operands from
outside arrive just in time, since their reads are issued when needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mapper_lpu.isa import F32
from mapper_lpu.storage import Stored

_NEVER = 1 << 40


@dataclass(eq=False)
class Tile:
    """One use of an MXM: weights are loaded into hemisphere `hemisphere`, installed, and met by activations.

    `loads[g]` lists what load group g reads: for each plane's 16 streams (value, row, byte plane), plane
    after plane.
    `installed` and `last_activation` are cycles, known once placed.
    """

    name: str
    hemisphere: int
    loads: tuple[tuple[tuple[Stored, int, int], ...], ...]
    op: int
    planes: tuple[int, ...] = (0, 1)  # (0, 1): an fp16 pair; one plane: int8
    installed: int | None = None
    first_load: int = 0
    first_activation: int = _NEVER
    last_activation: int = -_NEVER

    def reset(self) -> None:
        """Forget the placement."""
        self.installed, self.first_load = None, 0
        self.first_activation, self.last_activation = _NEVER, -_NEVER


@dataclass(frozen=True)
class Mem:
    """Operand: row rows[i] of `value` for vector i, read from MEM and flowing inward."""

    value: Stored
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Gather:
    """Operand: the table row named by index row `index_row`, for a single vector."""

    table: Stored
    index: Stored
    index_rows: tuple[int, ...]


@dataclass(frozen=True)
class Mxm:
    """Operand: what `plane` of the tile's MXM makes of the activation rows[i] of `value`."""

    tile: Tile
    plane: int
    value: Stored
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Res:
    """Operand: the result of operation `op` of the same chain, passed on inside the VXM."""

    op: int


@dataclass(frozen=True)
class Hold:
    """Operand: the result of operation `op`, still in the output register of the same ALU (single-vector
    chains).
    """

    op: int


@dataclass(frozen=True)
class Self:
    """Operand: the ALU's own result of one ALU latency ago; the first vectors have none and are copied."""


@dataclass(frozen=True)
class Imm:
    """Operand: an f32 immediate."""

    value: float


Operand = Mem | Gather | Mxm | Res | Hold | Self | Imm


@dataclass(frozen=True)
class Op:
    """One VXM operation of a chain. `b` is None for unary operations; `out` is the type of the result."""

    opcode: str
    a: Operand
    b: Operand | None = None
    type: int = F32
    out: int = F32
    ir: int = -1
    count: int = 0  # vectors that it handles; 0: all of the chain's


@dataclass(frozen=True)
class Scatter:
    """Where a result goes when its row is data: index vector `index` (row `index_row`), stored in the same
    half.
    """

    index: Stored
    index_row: int


@dataclass(frozen=True)
class Out:
    """Result of operation `op` is written to `value`, vector i to row rows[i] (-1: not written)."""

    op: int
    value: Stored
    rows: tuple[int, ...]
    scatter: Scatter | None = None


@dataclass
class Chain:
    """Operations in topological order and their outputs. `name` is for messages and traces."""

    name: str
    count: int
    ops: list[Op] = field(default_factory=list)
    outs: list[Out] = field(default_factory=list)
    ir: int = -1

    def add(
        self,
        opcode: str,
        a: Operand,
        b: Operand | None = None,
        *,
        type: int = F32,
        out: int = F32,
        count: int = 0,
    ) -> Res:
        """Append an operation on the first `count` vectors (0: all); returns the operand that stands for its
        result.
        """
        self.ops.append(Op(opcode, a, b, type, out, self.ir, count))
        return Res(len(self.ops) - 1)

    def cast(self, a: Operand, out: int, type: int = F32) -> Res:
        """Append a cast from `type` to `out`."""
        return self.add("vxm.cast", a, type=type, out=out)

    def write(self, result: Res, value: Stored, rows: Sequence[int], scatter: Scatter | None = None) -> None:
        """Write a result's vectors to rows of `value`."""
        self.outs.append(Out(result.op, value, tuple(rows), scatter))
