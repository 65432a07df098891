"""Checks of synchronisation: exact counts, no cycles, and every dependence ordered by a wait or a queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import Rows, rows_of


def _ends(rows: Rows) -> Int:
    return rows["start"] + rows["duration"]


def _totals(rows: Rows, counters: int) -> tuple[Int, Int]:
    """(signals, latest end of a signal from the block's start) of each of the block's counters."""
    count, end = np.zeros(counters, np.int64), np.full(counters, -1, np.int64)
    known = (rows.signals[:, 1] >= 0) & (rows.signals[:, 1] < counters)
    row, counter = rows.signals[known].T
    np.add.at(count, counter, 1)
    np.maximum.at(end, counter, _ends(rows)[row])
    return count, end


@dataclass(frozen=True)
class WaitsExact:
    """A task waits until a counter has exactly the count that all its signals make, the last of which is
    over when the task starts; a counter of the repetition before is waited for where there is one. Every
    task raises a counter, and of its own block. Kernels in a graph follow each other: each of their tasks
    waits for something, but those of the first."""

    name: str = "WaitsExact"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        before: tuple[str, Int, Int, int] | None = None
        for rows, record in rows_of(schedule):
            counters = int(record["counters"])
            if ((rows.signals[:, 1] < 0) | (rows.signals[:, 1] >= counters)).any():
                yield Violation(f"{rows.name(0)}: a signal to a counter that the block does not have")
                continue
            for row in np.setdiff1d(np.arange(len(rows.block.steps)), rows.signals[:, 0]).tolist():
                yield Violation(f"{rows.name(row)} tells nobody that it is over", (row,))
            if schedule.plan["style"] == "graph":
                yield from _unordered(rows)
            count, end = _totals(rows, counters)
            previous = before if before is not None and before[0] == rows.phase else None
            yield from self._block(rows, count, end, previous)
            block = rows.block
            before = (rows.phase, count, end, block.start + (block.repeat - 1) * block.period)

    def _block(
        self, rows: Rows, count: Int, end: Int, before: tuple[str, Int, Int, int] | None
    ) -> Iterator[Violation]:
        block, start = rows.block, rows["start"]
        for row, counter, once, rest in rows.waits.tolist():
            if not -len(count) <= counter < len(count):
                yield Violation(f"{rows.name(row)} waits for counter {counter} of {len(count)}", (row,))
                continue
            shift = block.period if counter < 0 else 0
            if counter >= 0 or block.repeat > 1:
                yield from _one(
                    rows, row, counter, rest, int(count[counter]), int(end[counter]) - shift, start
                )
            if counter >= 0:
                yield from _one(rows, row, counter, once, int(count[counter]), int(end[counter]), start)
            elif before is None or -counter > len(before[1]):
                yield Violation(f"{rows.name(row)} waits for a block before the first", (row,))
            else:
                over = int(before[2][counter]) + before[3] - block.start
                yield from _one(rows, row, counter, once, int(before[1][counter]), over, start)


def _unordered(rows: Rows) -> Iterator[Violation]:
    """Tasks of a graph's later kernels that wait for nothing."""
    later = np.flatnonzero((rows["kernel"] > 0) | (rows.number > 0))
    for row in np.setdiff1d(later, rows.waits[:, 0]).tolist():
        yield Violation(f"{rows.name(row)} does not wait for the kernel before its own", (row,))


def _one(
    rows: Rows, row: int, counter: int, asked: int, count: int, over: int, start: Int
) -> Iterator[Violation]:
    if asked != count or not count:
        yield Violation(
            f"{rows.name(row)} waits for {asked} signals of counter {counter}, which gets {count}",
            (row,),
            limit=float(count),
        )
    elif over > start[row]:
        message = (
            f"{rows.name(row)} starts at {start[row]}, the last signal of counter {counter} comes at {over}"
        )
        yield Violation(message, (row,), None, int(start[row]), float(over))


@dataclass(frozen=True)
class QueuesAcyclic:
    """The order of each unit's queue and the waits have no cycle: no SM waits for a task behind its own."""

    name: str = "QueuesAcyclic"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(
            v for rows, record in rows_of(schedule) for v in self._block(rows, int(record["counters"]))
        )

    def _block(self, rows: Rows, counters: int) -> Iterator[Violation]:
        n = len(rows.block.steps)
        after: list[list[int]] = [[] for _ in range(n + counters)]
        need = np.zeros(n + counters, np.int64)
        unit = rows["unit"]
        order = np.lexsort((np.arange(n), rows["start"], unit)).tolist()
        edges = [(a, b) for a, b in pairwise(order) if unit[a] == unit[b]]
        edges += [(row, n + c) for row, c in rows.signals.tolist() if 0 <= c < counters]
        edges += [(n + c, row) for row, c, _, _ in rows.waits.tolist() if 0 <= c < counters]
        for a, b in edges:
            after[a].append(b)
            need[b] += 1
        ready = deque(np.flatnonzero(need == 0).tolist())
        seen = 0
        while ready:
            seen += 1
            for b in after[ready.popleft()]:
                need[b] -= 1
                if need[b] == 0:
                    ready.append(b)
        if seen < n + counters:
            stuck = int(np.flatnonzero(need[:n] > 0)[0]) if (need[:n] > 0).any() else 0
            yield Violation(f"{rows.name(stuck)} waits for itself through queues and counters", (stuck,))


Columns = dict[str, Int]
"""Accesses as columns: row, buffer, low, high, write (0 or 1); later also order, unit, mask, known, stage."""


@dataclass
class _Past:
    """Accesses of the program so far by buffer, and the sets of counters that their masks number."""

    buffers: dict[int, list[Columns]] = field(default_factory=dict)
    masks: dict[int, int] = field(default_factory=dict)

    def number(self, mask: int) -> int:
        """The number of a set of counters."""
        return self.masks.setdefault(mask, len(self.masks))


@dataclass(frozen=True)
class DependencesWaited:
    """Two tasks that use the same bytes, one of them writing, are ordered: the later one has waited, itself
    or through what it waited for, for a counter that the earlier one raises, or comes behind it in a queue.

    Repeated blocks are looked at for their first two and last two repetitions, with their own buffers; all
    others are in the place of these."""

    name: str = "DependencesWaited"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        instances = list(_instances(schedule, phase))
        closure: dict[int, int] = {}
        queue: dict[int, int] = {}
        past = _Past()
        order = 0
        base = 0
        for rows, counters, repetition in instances:
            known, masks = _knowledge(rows, counters, base, closure, queue)
            yield from _ordered(rows, _accesses(rows, repetition), known, masks, past, order)
            order += len(known)
            base += counters


def _instances(schedule: Schedule, phase: str) -> Iterator[tuple[Rows, int, int]]:
    for rows, record in rows_of(schedule):
        if rows.phase == phase:
            repeat = rows.block.repeat
            for r in sorted({0, min(1, repeat - 1), max(0, repeat - 2), repeat - 1}):
                yield rows, int(record["counters"]), r


def _knowledge(
    rows: Rows, counters: int, base: int, closure: dict[int, int], queue: dict[int, int]
) -> tuple[list[int], list[int]]:
    """Per row the set of counters (bits) that are known to be over when it starts, and those that it raises.

    `closure` maps a counter to what is known once it is over; `queue` a unit to what its last task knew."""
    n = len(rows.block.steps)
    waits: list[list[int]] = [[] for _ in range(n)]
    raised: list[list[int]] = [[] for _ in range(n)]
    for row, c, _, _ in rows.waits.tolist():
        waits[row].append(base + c)
    for row, c in rows.signals.tolist():
        raised[row].append(base + c)
    unit = rows["unit"].tolist()
    known, masks = [0] * n, [0] * n
    for row in range(n):
        mine = queue.get(unit[row], 0)
        for c in waits[row]:
            mine |= closure.get(c, 0) | (1 << c if c >= 0 else 0)
        known[row] = mine
        for c in raised[row]:
            # a wait is for all signals, so whoever waited knows what any of them knew
            closure[c] = closure.get(c, 0) | mine
            masks[row] |= 1 << c
        queue[unit[row]] = mine
    return known, masks


def _accesses(rows: Rows, repetition: int) -> Columns:
    """The block's accesses with the repetition's buffers."""
    bound = np.arange(1 + max(int(rows.block.steps.slices(w)[1].max(initial=0)) for w in ("reads", "writes")))
    table = rows.block.bindings
    if table is not None:
        slot, at, to = (np.asarray(table.column(k).to_numpy(), np.int64) for k in range(3))
        here = (at == repetition) & (slot < len(bound))
        bound[slot[here]] = to[here]
    parts = []
    for write, which in enumerate(("reads", "writes")):
        offsets, buffer, low, size = rows.block.steps.slices("reads" if which == "reads" else "writes")
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        parts.append((row, bound[buffer], low, low + size, np.full(len(row), write)))
    names = ("row", "buffer", "low", "high", "write")
    return {k: np.concatenate([p[i] for p in parts]) for i, k in enumerate(names)}


def _ordered(
    rows: Rows, accesses: Columns, known: list[int], masks: list[int], past: _Past, order: int
) -> Iterator[Violation]:
    written = np.unique(accesses["buffer"][accesses["write"] == 1])
    mine = np.isin(accesses["buffer"], [*written.tolist(), *past.buffers])
    found = {k: v[mine] for k, v in accesses.items()}
    row = found["row"]
    found["order"], found["unit"] = order + row, rows["unit"][row]
    found["mask"] = np.array([past.number(m) for m in masks], np.int64)[row]
    found["known"] = np.array([past.number(m) for m in known], np.int64)[row]
    found["stage"] = rows["stage"][row]
    sets = list(past.masks)
    by = np.argsort(found["buffer"], kind="stable")
    ends = np.flatnonzero(np.diff(found["buffer"][by], append=-1)) + 1
    for part in np.split(by, ends[:-1]):
        if len(part):
            here = {k: v[part] for k, v in found.items()}
            parts = past.buffers.setdefault(int(here["buffer"][0]), [])
            parts.append(here)
            yield from _one_buffer(rows, here, parts, sets)


def _one_buffer(rows: Rows, here: Columns, parts: list[Columns], sets: list[int]) -> Iterator[Violation]:
    """Accesses of one buffer that have not waited for earlier ones, those alike looked at once."""
    key = np.lexsort([here[k] for k in _ALIKE])
    same = np.logical_and.reduce([here[k][key[1:]] == here[k][key[:-1]] for k in _ALIKE])
    asked = key[np.concatenate([[True], ~same])]
    names = ("low", "high", "write", "order", "unit", "mask")
    earlier = {k: np.concatenate([p[k] for p in parts]) for k in names}
    marks, mark = np.unique(earlier["mask"], return_inverse=True)
    knows, know = np.unique(here["known"][asked], return_inverse=True)
    waited = np.array([[sets[m] & sets[k] != 0 for m in marks.tolist()] for k in knows.tolist()])
    step = max(1, _PAIRS // len(mark))
    for begin in range(0, len(asked), step):
        q = asked[begin : begin + step]
        low, high, write, order, unit = (here[k][q][:, None] for k in names[:5])
        near = (earlier["low"] < high) & (earlier["high"] > low) & (earlier["order"] < order)
        near &= (earlier["unit"] != unit) & ((earlier["write"] == 1) | (write == 1))
        near &= ~waited[know[begin : begin + step][:, None], mark]
        for i in q[near.any(1)].tolist():
            row, buffer = int(here["row"][i]), int(here["buffer"][i])
            where = f"bytes {here['low'][i]}..{here['high'][i]} of buffer {buffer}"
            message = f"{rows.name(row)} has not waited for who used {where}"
            yield Violation(message, (row,), None, int(rows["start"][row]))


_ALIKE = ("low", "high", "write", "known", "stage")
_PAIRS = 1 << 22
"""Pairs of accesses that are compared at once."""


CHECKS = (WaitsExact(), QueuesAcyclic(), DependencesWaited())
