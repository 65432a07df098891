"""Tasks: what a kernel's grid consists of, and in which order they are handed out."""

from __future__ import annotations

from dataclasses import dataclass, field

from mapper_gpu.degrees import Near
from mapper_gpu.kernel import Kernel
from mapper_gpu.storage import Storage

OPCODES = (
    "product", "product_merge", "attention", "attention_merge", "rows", "heads", "collective", "experts",
    "route",
)  # fmt: skip
"""Kinds of tasks; the position is the opcode."""
Coordinates = tuple[int, int, int, int, int, int]
"""m0, m1, n0, n1, k0, k1."""


@dataclass(slots=True)
class Task:
    """One task of chip 0; every chip has the same. Slices are (storage, chip or -1 for the own, offset,
    bytes).

    `stage` 0 are the kernel's first tasks, 1 its merges; `join` is the tile that a task and its merge
    share. `chips` are those that have the task, counted from the group's first (None: all), `over`
    those whose memories it reads (see degrees)."""

    opcode: int
    program: int
    at: Coordinates
    reads: list[tuple[Storage, int, int, int]]
    writes: list[tuple[Storage, int, int, int]]
    op: int
    far: float
    near: float
    work: float
    engine: int
    flops: float
    lead: int
    stage: int = 0
    join: int = -1
    pages: int = 1
    chips: range | None = None
    over: Near = "own"

    def on(self, chip: int) -> bool:
        """Whether a chip of the group has the task."""
        return self.chips is None or chip in self.chips


@dataclass
class Grid:
    """The tasks of one kernel, in the order in which they are handed out."""

    kernel: Kernel
    tasks: list[Task] = field(default_factory=list)
