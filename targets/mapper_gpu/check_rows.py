"""What the checks of this target share: a block's immediates as columns. Knows the table's layout, no
scheduler."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper.schedule.tables import Block, Int, Schedule

FIXED = (
    "program", "kernel", "m0", "m1", "n0", "n1", "k0", "k1", "near", "work", "engine", "sharers", "lead",
    "pages", "page", "join", "stage",
)  # fmt: skip
KINDS = (
    "product",
    "product_merge",
    "attention",
    "attention_merge",
    "rows",
    "heads",
    "collective",
    "experts",
    "route",
)


@dataclass(frozen=True)
class Rows:
    """A block's rows: fixed immediates by name, waits as (row, counter, first, rest), signals as (row,
    counter)."""

    phase: str
    number: int
    block: Block
    fixed: dict[str, Int]
    waits: Int
    signals: Int

    def __getitem__(self, name: str) -> Int:
        return self.fixed[name] if name in self.fixed else self.block.steps.column(name)

    def kernel(self, number: int) -> str:
        """A kernel for a message."""
        return f"{self.phase}, block {self.number}, kernel {number}"

    def name(self, row: int) -> str:
        """A row for a message."""
        return f"{self.phase}, block {self.number}, row {row}"


def stage_of(schedule: Schedule, record: Any) -> range:
    """The chips that share a block: those of its stage, or all."""
    plan: Any = schedule.plan
    size = schedule.chips // max(1, int(plan.get("stages", 1)))
    first = int(record.get("stage", 0)) * size
    return range(first, first + size)


_CACHE: dict[int, tuple[weakref.ref[Schedule], list[tuple[Rows, Any]]]] = {}


def rows_of(schedule: Schedule) -> Iterator[tuple[Rows, Any]]:
    """Every block's rows, and the plan's record of the block; kept for as long as the schedule lives. Raises
    ValueError where immediates are malformed."""
    key = id(schedule)
    if key not in _CACHE:
        found = list(_all(schedule))
        _CACHE[key] = (weakref.ref(schedule, lambda _: _CACHE.pop(key, None)), found)
    yield from _CACHE[key][1]


def _all(schedule: Schedule) -> Iterator[tuple[Rows, Any]]:
    for phase, program in schedule.programs.items():
        records = schedule.plan["blocks"][phase]
        if len(records) != len(program.blocks):
            raise ValueError(f"{phase}: the plan describes {len(records)} of {len(program.blocks)} blocks")
        for number, (block, record) in enumerate(zip(program.blocks, records, strict=True)):
            yield _rows(phase, number, block), record


def _rows(phase: str, number: int, block: Block) -> Rows:
    offsets, flat = block.steps.args()
    count, fixed = len(block.steps), len(FIXED)
    if count and int(np.diff(offsets).min()) < fixed + 2:
        raise ValueError(f"{phase}, block {number}: a row with too few immediates")
    table = {name: flat[offsets[:-1] + i] for i, name in enumerate(FIXED)}
    waits: list[tuple[int, int, int, int]] = []
    signals: list[tuple[int, int]] = []
    values = flat.tolist()
    for row, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        at = begin + fixed
        n = values[at]
        at += 1
        for _ in range(n):
            waits.append((row, *values[at : at + 3]))
            at += 3
        m = values[at]
        signals += [(row, c) for c in values[at + 1 : at + 1 + m]]
        if at + 1 + m != end or n < 0 or m < 0:
            raise ValueError(f"{phase}, block {number}, row {row}: immediates that are no waits and signals")
    return Rows(
        phase, number, block, table, np.array(waits, np.int64).reshape(-1, 4),
        np.array(signals, np.int64).reshape(-1, 2),
    )  # fmt: skip
