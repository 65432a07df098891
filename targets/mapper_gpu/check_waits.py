"""Checks of synchronisation: exact counts, no cycles, and every dependence ordered by a wait or a queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import Rows, rows_of, stage_of


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
    over when the task starts; a counter of the repetition before is waited for where there is one. A task
    raises a counter of its own block and chip. Kernels in a graph follow each other: each of their tasks
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
            yield from _elsewhere(rows, stage_of(schedule, record), len(schedule.units) // schedule.chips)
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


def _elsewhere(rows: Rows, group: range, per_chip: int) -> Iterator[Violation]:
    """Tasks that raise another chip's counter: counters go round the chips."""
    row, counter = rows.signals.T
    chip = rows["unit"][row] // per_chip - group.start
    for r in np.unique(row[counter % len(group) != chip]).tolist():
        yield Violation(f"{rows.name(r)} raises a counter of another chip", (r,))


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
        if self._forward(rows, counters):
            return
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

    def _forward(self, rows: Rows, counters: int) -> bool:
        """Whether time alone shows that there is no cycle: tasks take time, signals come at their ends, and
        who waits for a counter starts after all of its signals. Queues are in order of starts."""
        _, end = _totals(rows, counters)
        inside = rows.waits[(rows.waits[:, 1] >= 0) & (rows.waits[:, 1] < counters)]
        return bool((rows["duration"] > 0).all() and (end[inside[:, 1]] <= rows["start"][inside[:, 0]]).all())


Columns = dict[str, Int]
"""Accesses as columns: row, buffer, low, high, write (0 or 1); later also order, unit, mask, known, stage."""


@dataclass
class _Sets:
    """Sets of counters as numbers: of each its bits, and the unions that were made. Few differ, because the
    tasks of a kernel wait for the same."""

    bits: list[int] = field(default_factory=lambda: [0])
    number: dict[int, int] = field(default_factory=lambda: {0: 0})
    unions: dict[tuple[int, int], int] = field(default_factory=dict)
    ones: dict[int, int] = field(default_factory=dict)

    def of(self, bits: int) -> int:
        """The number of a set."""
        if bits not in self.number:
            self.number[bits] = len(self.bits)
            self.bits.append(bits)
        return self.number[bits]

    def one(self, counter: int) -> int:
        """The number of the set of one counter; nothing is known of those before the first."""
        if counter not in self.ones:
            self.ones[counter] = self.of(1 << counter if counter >= 0 else 0)
        return self.ones[counter]

    def union(self, a: int, b: int) -> int:
        """The number of the union of two."""
        if not a:
            return b
        made = self.unions.get((a, b))
        if made is None:
            made = self.unions[a, b] = self.of(self.bits[a] | self.bits[b])
        return made


@dataclass
class _Past:
    """The program so far: accesses by buffer [fields, accesses], the sets of counters that its tasks knew and
    raised, what is known once a counter is over, and what each unit's last task knew. `tasks` keeps what the
    tasks of a block wait for and raise."""

    buffers: dict[int, Int] = field(default_factory=dict)
    tasks: dict[int, tuple[list[list[int]], list[list[int]]]] = field(default_factory=dict)
    sets: _Sets = field(default_factory=_Sets)
    closure: dict[int, int] = field(default_factory=dict)
    queue: dict[int, int] = field(default_factory=dict)


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
        past = _Past()
        order = base = 0
        for rows, counters, repetition in _instances(schedule, phase):
            known, raised = _knowledge(rows, base, past)
            yield from _ordered(rows, _accesses(rows, repetition), known, raised, past, order)
            order += len(known)
            base += counters


def _instances(schedule: Schedule, phase: str) -> Iterator[tuple[Rows, int, int]]:
    for rows, record in rows_of(schedule):
        if rows.phase == phase:
            repeat = rows.block.repeat
            for r in sorted({0, min(1, repeat - 1), max(0, repeat - 2), repeat - 1}):
                yield rows, int(record["counters"]), r


def _knowledge(rows: Rows, base: int, past: _Past) -> tuple[Int, Int]:
    """Per row the number of the set of counters that are known to be over when it starts, and of the set of
    those that it raises."""
    n, sets, closure, queue = len(rows.block.steps), past.sets, past.closure, past.queue
    if rows.number not in past.tasks:
        past.tasks[rows.number] = _listed(n, rows.waits), _listed(n, rows.signals)
    waits, raised = past.tasks[rows.number]
    after: dict[int, int] = {}
    known, masks = [0] * n, [0] * n
    for row, unit in enumerate(rows["unit"].tolist()):
        mine = queue.get(unit, 0)
        for relative in waits[row]:
            c = base + relative
            if c not in after:
                after[c] = sets.union(closure.get(c, 0), sets.one(c))
            mine = sets.union(mine, after[c])
        known[row] = mine
        for relative in raised[row]:
            c = base + relative
            # a wait is for all signals, so whoever waited knows what any of them knew
            if closure.get(c) != mine:
                closure[c] = sets.union(closure.get(c, 0), mine)
                after.pop(c, None)
            masks[row] = sets.union(masks[row], sets.one(c))
        queue[unit] = mine
    return np.array(known, np.int64), np.array(masks, np.int64)


def _listed(n: int, pairs: Int) -> list[list[int]]:
    """The counters of each of n rows, from (row, counter, ...)."""
    found: list[list[int]] = [[] for _ in range(n)]
    for row, counter in pairs[:, :2].tolist():
        found[row].append(counter)
    return found


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
    rows: Rows, accesses: Columns, known: Int, raised: Int, past: _Past, order: int
) -> Iterator[Violation]:
    written = np.unique(accesses["buffer"][accesses["write"] == 1])
    mine = np.isin(accesses["buffer"], [*written.tolist(), *past.buffers])
    found = {k: v[mine] for k, v in accesses.items()}
    row = found["row"]
    found |= {"order": order + row, "unit": rows["unit"][row], "mask": raised[row], "known": known[row]}
    found["stage"] = rows["stage"][row]
    by = np.lexsort([found[k] for k in (*_ALIKE, "buffer")])
    table = np.stack([found[k][by] for k in _FIELDS])
    buffer = found["buffer"][by]
    new = np.concatenate([[True], buffer[1:] != buffer[:-1]]) if len(by) else np.zeros(0, np.bool_)
    fresh = new.copy()
    for k in _ALIKE:
        column = found[k][by]
        fresh[1:] |= column[1:] != column[:-1]
    for a, b in pairwise([*np.flatnonzero(new).tolist(), len(by)]):
        here, number = table[:, a:b], int(buffer[a])
        before = past.buffers.get(number)
        earlier = here if before is None else np.concatenate([before, here], axis=1)
        past.buffers[number] = earlier
        for i in _unwaited(here, fresh[a:b], earlier, past.sets.bits):
            late = int(here[_ROW, i])
            where = f"bytes {here[_LOW, i]}..{here[_HIGH, i]} of buffer {number}"
            message = f"{rows.name(late)} has not waited for who used {where}"
            yield Violation(message, (late,), None, int(rows["start"][late]))


def _unwaited(here: Int, fresh: npt.NDArray[np.bool_], earlier: Int, sets: list[int]) -> Iterator[int]:
    """Columns of `here`, accesses of one buffer, that have not waited for one of `earlier`, and have to.
    Those alike, each group of which begins where `fresh`, are looked at as one, each for itself only where
    that one has not waited for all."""
    asked = np.flatnonzero(fresh)
    marks, mark = np.unique(earlier[_MASK], return_inverse=True)
    knows, know = np.unique(here[_KNOWN, asked], return_inverse=True)
    waited: npt.NDArray[np.bool_] = np.array(
        [[sets[m] & sets[k] != 0 for m in marks.tolist()] for k in knows.tolist()]
    )
    # what all have waited for takes no comparison
    left = np.flatnonzero(~np.all(waited, axis=0)[mark])
    if not len(left):
        return
    earlier, mark = earlier[:, left], mark[left]
    last = np.append(asked[1:], here.shape[1]) - 1
    step = max(1, _PAIRS // len(mark))
    for begin in range(0, len(asked), step):
        group = slice(begin, begin + step)
        near = _clash(here[:, asked[group]], here[_ORDER, last[group]], earlier)
        near &= ~waited[know[group][:, None], mark]
        for g in np.flatnonzero(near.any(axis=1)).tolist():
            alike = np.arange(asked[begin + g], last[begin + g] + 1)
            of = earlier[:, np.flatnonzero(near[g])]
            each = _clash(here[:, alike], here[_ORDER, alike], of) & (
                of[_UNIT] != here[_UNIT, alike][:, None]
            )
            yield from alike[each.any(1)].tolist()


def _clash(some: Int, order: Int, earlier: Int) -> npt.NDArray[np.bool_]:
    """[some, earlier]: which use the same bytes, one of them writing, the earlier one before `order`."""
    near = (earlier[_LOW] < some[_HIGH][:, None]) & (earlier[_HIGH] > some[_LOW][:, None])
    near &= earlier[_ORDER] < order[:, None]
    return np.asarray(near & ((earlier[_WRITE] == 1) | (some[_WRITE][:, None] == 1)))


_ALIKE = ("low", "high", "write", "known", "stage")
_FIELDS = ("low", "high", "write", "order", "unit", "mask", "known", "row")
_LOW, _HIGH, _WRITE, _ORDER, _UNIT, _MASK, _KNOWN, _ROW = range(len(_FIELDS))
_PAIRS = 1 << 22
"""Pairs of accesses that are compared at once."""


CHECKS = (WaitsExact(), QueuesAcyclic(), DependencesWaited())
