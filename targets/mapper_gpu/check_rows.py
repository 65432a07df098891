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


LINK, NETWORK = 4, 5
"""Leads of what passes inside, and between, link domains."""
ITEM = {"i64": 8, "u8": 1, "f32": 4, "bf16": 2, "f16": 2}
"""Bytes of an element by its format."""
EXCHANGES = ("exchange", "dispatch", "collect")
"""Kinds of nodes that pass something between replicas."""


def exchanges(kernel: Any) -> str:
    """Which exchange between replicas a kernel of the plan is; "" for others."""
    return next((str(n["kind"]) for n in kernel["nodes"] if n["kind"] in EXCHANGES), "")


def sends(kernel: Any) -> bool:
    """Whether a kernel of the plan receives what an earlier stage of a pipeline made."""
    return bool(kernel.get("collective", {}).get("algorithm") == "send")


def replicas_of(schedule: Schedule) -> int:
    """Replicas with sequences of their own."""
    plan: Any = schedule.plan
    return max(1, int(plan.get("replicas", 1)))


def replica_of(schedule: Schedule, group: range, chip: int) -> range:
    """The chips of a stage that do the same sequences as one of them."""
    size = len(group) // replicas_of(schedule)
    first = group.start + (chip - group.start) // size * size
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
    at, end = offsets[:-1] + fixed, offsets[1:]
    n = flat[at]
    second = at + 1 + 3 * n
    inside = (n >= 0) & (second < end)
    m = flat[np.where(inside, second, at)]
    wrong = np.flatnonzero(~inside | (second + 1 + m != end))
    if len(wrong):
        raise ValueError(f"{phase}, block {number}, row {wrong[0]}: immediates that are no waits and signals")
    rows = np.arange(count)
    triples = flat[_ranges(at + 1, 3 * n)].reshape(-1, 3)
    waits = np.concatenate([np.repeat(rows, n)[:, None], triples], axis=1)
    signals = np.stack([np.repeat(rows, m), flat[_ranges(second + 1, m)]], axis=1)
    return Rows(phase, number, block, table, waits, signals)


def _ranges(begin: Int, size: Int) -> Int:
    """begin[i] .. begin[i] + size[i] of every i, one behind the other."""
    ends = np.cumsum(size)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - ends + size, size)
