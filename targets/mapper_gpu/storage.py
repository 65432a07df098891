"""Where values live: storages of one chip's memory, each with a layout of panels.

A panel layout keeps a [rows, width] array as width/panel blocks of [rows, panel], so that a tile of whole
panels and all rows is one run of bytes; panel = width is row-major. Weights [n, k] are the same with rows n
and columns k, or columns of blocks of K: the parts of a low-bit weight, whose elements may be packed, a row
of a panel to whole bytes. A cache is [heads, batch, positions, elements]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mapper_gpu.hardware import element_bytes

ALIGN = 256
"""Bytes: every buffer starts at a multiple (cudaMalloc's own alignment)."""
NUMPY = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i64": "int64", "u8": "uint8"}
"""Storage formats that can be executed, and their NumPy names."""


@dataclass(eq=False)
class Storage:
    """One value on every chip of a stage, whose first chip is `base`: the same number of bytes at the same
    offset, one buffer per chip. `count` arrays [rows, width] behind each other are a stack, of which a task
    reads what its data says.

    `bits` is the size of packed elements (0: `dtype`'s own); a column stands for `per` columns of K."""

    name: str
    rows: int
    width: int
    dtype: str
    panel: int = 0
    program: str = ""
    first: int = -1
    offset: int = -1
    count: int = 1
    bits: int = 0
    per: int = 1
    base: int = 0

    def __post_init__(self) -> None:
        self.panel = self.panel or self.width

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return {"i64": 8, "u8": 1}.get(self.dtype) or int(element_bytes(self.dtype))

    def span(self, columns: int) -> int:
        """Bytes of some columns of one row."""
        return -(-columns * self.bits // 8) if self.bits else columns * self.item

    @property
    def bytes(self) -> int:
        """Bytes on one chip."""
        return self.count * self.rows * (self.width // self.panel) * self.span(self.panel)

    def cover(self, r0: int, r1: int, c0: int, c1: int) -> tuple[int, int]:
        """(offset, bytes) of the shortest run that holds rows r0..r1-1 of the panels with columns
        c0..c1-1."""
        low, high = c0 // self.panel, -(-c1 // self.panel)
        begin, end = low * self.rows + r0, (high - 1) * self.rows + r1
        row = self.span(self.panel)
        return begin * row, (end - begin) * row

    def runs(self, r0: int, r1: int, c0: int, c1: int) -> list[tuple[int, int]]:
        """(offset, bytes) of the runs that hold exactly rows r0..r1-1 and columns c0..c1-1: whole panels,
        or columns of a single row. Raises ValueError where the columns cut a panel."""
        if self.rows == 1:
            return [(c0 * self.item, (c1 - c0) * self.item)]
        if c0 % self.panel or c1 % self.panel:
            raise ValueError(f"{self.name}: columns {c0}..{c1} cut panels of {self.panel}")
        if r0 == 0 and r1 == self.rows:
            return [self.cover(r0, r1, c0, c1)]
        return [self.cover(r0, r1, c, c + self.panel) for c in range(c0, c1, self.panel)]


@dataclass(eq=False)
class Memory:
    """All storages in order of their addresses; `stages` groups of chips have storages of their own, and
    `tensor` chips of a group are a replica (0: all of it). The first row of the buffer table is number 0."""

    chips: int
    stages: int = 1
    tensor: int = 0
    storages: list[Storage] = field(default_factory=list)
    tops: dict[int, int] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Chips of a stage."""
        return self.chips // self.stages

    @property
    def replicas(self) -> int:
        """Replicas of a stage."""
        return self.group // (self.tensor or self.group)

    @property
    def top(self) -> int:
        """Bytes that the fullest chip holds."""
        return max(self.tops.values(), default=0)

    def add(self, storage: Storage) -> Storage:
        """Give a storage its rows and its address."""
        storage.first = len(self.storages) * self.group
        storage.offset = self.tops.get(storage.base, 0)
        self.tops[storage.base] = storage.offset + math.ceil(max(1, storage.bytes) / ALIGN) * ALIGN
        self.storages.append(storage)
        return storage

    def rows(self) -> dict[str, list[Any]]:
        """Columns of the buffer table."""
        n = self.group
        flat = [s for s in self.storages for _ in range(n)]
        chips = [s.base + c for s in self.storages for c in range(n)]
        return {
            "memory": chips, "offset": [s.offset for s in flat],
            "bytes": [s.bytes for s in flat], "value": [s.name for s in flat],
            "first": [-1] * len(flat), "last": [-1] * len(flat), "program": [s.program for s in flat],
        }  # fmt: skip
