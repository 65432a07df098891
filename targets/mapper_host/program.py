"""A program while it is being built: storages, steps and blocks, with every operand a slice of a storage.

Lifetimes are counted in step positions of the whole program (a repeated block counts once); `assemble.py`
turns them into cycles and addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mapper_host.opcodes import CODES, SIZES, extents

Memory = Literal["weights", "state", "io", "arena"]
MEMORIES: tuple[Memory, ...] = ("weights", "state", "io", "arena")


@dataclass(eq=False)
class Storage:
    """Bytes that hold one value. Those of memory "arena" are temporaries, given addresses by lifetime."""

    name: str
    bytes: int
    memory: Memory = "arena"


@dataclass(frozen=True, eq=False)
class Value:
    """A contiguous row-major array in a storage, from its first byte on."""

    storage: Storage
    shape: tuple[int, ...]
    dtype: str

    @property
    def items(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def code(self) -> int:
        """Type code of the elements."""
        return CODES[self.dtype]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.items * SIZES[self.code]


@dataclass(frozen=True)
class Slice:
    """`bytes` bytes at `offset` of a storage."""

    storage: Storage
    offset: int
    bytes: int


@dataclass(eq=False)
class Step:
    """One step. `op` is the row of the program's op list that it is part of."""

    opcode: int
    args: tuple[int, ...]
    reads: list[Slice]
    writes: list[Slice]
    op: int
    bytes: int
    flops: int


@dataclass(eq=False)
class BlockSteps:
    """Steps that run `repeat` times. `bindings`: storage used in the steps -> the one that stands for it, per
    repetition."""

    name: str
    repeat: int = 1
    steps: list[Step] = field(default_factory=list)
    bindings: dict[Storage, tuple[Storage, ...]] = field(default_factory=dict)


def step(
    opcode: int,
    args: Sequence[int],
    operands: Sequence[Value | Slice],
    writes: int,
    op: int,
    flops: int,
    bytes: int = -1,
) -> Step:
    """A step whose last `writes` operands are written and the others read.

    Slices are as long as the opcode needs; `bytes` moved default to the sum of all operands.
    """
    sizes = extents(opcode, args)
    if len(sizes) != len(operands):
        raise ValueError(f"opcode {opcode} takes {len(sizes)} operands, not {len(operands)}")
    made = [
        v if isinstance(v, Slice) else Slice(v.storage, 0, size)
        for v, size in zip(operands, sizes, strict=True)
    ]
    cut = len(made) - writes
    moved = sum(s.bytes for s in made) if bytes < 0 else bytes
    return Step(opcode, tuple(int(a) for a in args), made[:cut], made[cut:], op, moved, max(0, int(flops)))
