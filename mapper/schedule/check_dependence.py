"""DependenceHolds: values are written before they are read, and not rewritten while they are being read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.schedule.check_memory import windows
from mapper.schedule.ranges import NEVER, expand, paint_min, query_max
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.timeline import Accesses, Short, Timeline, timeline
from mapper.schedule.violation import Violation, buffer_label, first, label


@dataclass(frozen=True)
class DependenceHolds:
    """Every byte that a step reads was written by a step that had completed, or was there from the start
    (input, weight, constant and state ports); and no two steps use the same byte at once if one writes it.

    A step reads at its start and has written at its end, or at the exact cycles that the plan's
    `access_timing` gives (see timeline.access_times).
    """

    name: str = "DependenceHolds"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        times = timeline(schedule, phase)
        space = _Space.of(schedule, times)
        yield from _unwritten(schedule, phase, times, space)
        yield from _races(schedule, phase, times, space)


def _int(values: npt.NDArray[Any]) -> Int:
    return np.asarray(values, np.int64)


@dataclass(frozen=True)
class _Space:
    """All buffers end to end, cut into segments where a write or a buffer begins or ends; the slices of reads
    and of writes as ranges of them. A write covers its segments whole; a read that touches a part of one
    touches all that write it."""

    size: int
    base: Int  # first byte of each buffer, and the end of the last
    edges: Int
    reads: tuple[Int, Int]
    writes: tuple[Int, Int]

    @staticmethod
    def of(schedule: Schedule, times: Timeline) -> _Space:
        """Cut the space of one program."""
        sizes = np.asarray(schedule.buffers.column("bytes").to_numpy(), np.int64)
        base = np.concatenate([[0], np.cumsum(sizes)])
        r, w = times.reads.slices, times.writes.slices
        writes = [base[w.buffer] + edge for edge in (w.low, w.high)]
        edges = np.unique(np.concatenate([base, *writes]))
        # what nobody writes, as weights, is whole buffers: no search
        made = np.zeros(len(sizes), np.bool_)
        made[w.buffer] = True
        some = np.flatnonzero(made[r.buffer])
        first = np.searchsorted(edges, base)[r.buffer]
        last = first + 1
        low, high = (base[r.buffer[some]] + edge[some] for edge in (r.low, r.high))
        first[some] = np.searchsorted(edges, low, side="right") - 1
        last[some] = np.searchsorted(edges, high, side="left")
        a, b = (np.searchsorted(edges, w) for w in writes)
        return _Space(len(edges), base, edges, (_int(first), _int(last)), (_int(a), _int(b)))

    def initial(self, schedule: Schedule, phase: str) -> tuple[Int, Int]:
        """Segment ranges that hold data before the program starts."""
        rows = [
            b
            for port in schedule.ports
            if port.kind in ("weight", "constant", "state")
            or (port.kind == "input" and (not port.programs or phase in port.programs))
            for b in port.buffers
        ]
        at = np.array(rows, np.int64)
        low, high = (np.searchsorted(self.edges, self.base[at + k]) for k in (0, 1))
        return np.asarray(low, np.int64), np.asarray(high, np.int64)


def _unwritten(schedule: Schedule, phase: str, times: Timeline, space: _Space) -> Iterator[Violation]:
    """Reads of bytes that no completed write covers."""
    low, high = space.initial(schedule, phase)
    first_end = np.full(len(space.writes[0]), NEVER)
    np.minimum.at(first_end, times.writes.part, times.writes.end)
    ready = paint_min(
        space.size,
        np.concatenate([low, space.writes[0]]),
        np.concatenate([high, space.writes[1]]),
        np.concatenate([np.full(len(low), -NEVER), first_end]),
    )
    reads = times.reads
    needed, begin = query_max(ready, *space.reads)[reads.part], reads.begin
    for row in np.flatnonzero(needed > begin):
        step, one = int(reads.step[row]), int(reads.part[row])
        buffer = int(reads.slices.buffer[one])
        part = np.arange(space.reads[0][one], space.reads[1][one])
        place = int(space.edges[part[np.argmax(ready[part])]] - space.base[buffer])
        place = max(place, int(reads.slices.low[one]))
        when = "never written" if needed[row] == NEVER else f"written at cycle {needed[row]}"
        message = (
            f"{label(schedule, phase, times, step)} reads at cycle {begin[row]} byte {place} of "
            f"{buffer_label(schedule, buffer)}, which is {when}"
        )
        yield Violation(
            message, (step,), schedule.units[times.unit[step]], int(begin[row]), float(needed[row])
        )


def _races(schedule: Schedule, phase: str, times: Timeline, space: _Space) -> Iterator[Violation]:
    """Pairs of steps that use a byte at once, where at least one writes it.

    Reads of the same bytes whose times touch are looked at as one first: where that clashes with no write,
    none of them does."""
    reads, writes = times.reads, times.writes
    if not any(True for _ in _pairs(*_joined(times, space), _Uses.of(writes), space)):
        return
    for x, y in _pairs(_Uses.of(reads), _rows(space.reads, reads.part), _Uses.of(writes), space):
        message = (
            f"{label(schedule, phase, times, x[0])} and {label(schedule, phase, times, y[0])} use the "
            f"same bytes of {buffer_label(schedule, x[1])} at once, and one writes them"
        )
        pair = (min(x[0], y[0]), max(x[0], y[0]))
        yield Violation(message, pair, None, int(max(times.start[x[0]], times.start[y[0]])))


@dataclass(frozen=True)
class _Uses:
    """Accesses whose times are their own: one may stand for several that follow each other."""

    step: Int
    buffer: Int
    begin: Int
    end: Int
    part: Int

    @staticmethod
    def of(a: Accesses) -> _Uses:
        """Each for itself."""
        return _Uses(_int(a.step), a.buffer, a.begin, a.end, _int(a.part))

    def __len__(self) -> int:
        return len(self.step)


def _rows(ranges: tuple[Int, Int], part: Int | Short) -> tuple[Int, Int]:
    """The ranges of accesses, from those of their slices."""
    return np.asarray(ranges[0][part]), np.asarray(ranges[1][part])


def _joined(times: Timeline, space: _Space) -> tuple[_Uses, tuple[Int, Int]]:
    """Reads with those of equal segments that overlap in time made one; those of steps that write the same
    buffer stay as they are. Reads of what nobody writes, as of weights, are left out."""
    reads = _written(times, space)
    count = len(times.start) + 1
    own = _in_place(reads, times.writes, count)
    used = np.unique(reads.part)
    alike = np.zeros(len(space.reads[0]), np.int64)
    ranges = space.reads[0][used] * space.size + space.reads[1][used]
    alike[used] = np.unique(ranges, return_inverse=True)[1]
    group = alike[reads.part]
    group[own] = len(alike) + np.flatnonzero(own)
    # reads are in order of their steps' starts, and mostly of their own
    order = np.argsort(reads.begin, kind="stable")
    order = order[np.argsort(group[order], kind="stable")]
    if not len(order):
        return _Uses.of(reads), _rows(space.reads, reads.part)
    key = np.concatenate([[True], group[order[1:]] != group[order[:-1]]])
    del alike, group, own
    begin, end = reads.begin[order], reads.end[order]
    # a running maximum that starts anew with each key: keys in order make growing offsets
    number = np.cumsum(key) * (np.int64(end.max()) + 1)
    reach = np.maximum.accumulate(number + end) - number
    fresh = key | np.concatenate([[True], begin[1:] >= reach[:-1]])
    del key, number, reach
    first = np.flatnonzero(fresh)
    last = np.maximum.reduceat(end, first)
    rows = order[first]
    met = _meet(reads.buffer[rows], begin[first], last, times.writes)
    rows, first, last = rows[met], first[met], last[met]
    part = _int(reads.part[rows])
    made = _Uses(_int(reads.step[rows]), reads.slices.buffer[part], begin[first], last, part)
    return made, _rows(space.reads, part)


def _in_place(reads: Accesses, writes: Accesses, count: int) -> npt.NDArray[np.bool_]:
    """Which reads are of a buffer that their step writes too."""
    each = np.bincount(writes.step, minlength=count)
    first, buffer = np.cumsum(each) - each, writes.buffer
    mine, own = reads.buffer, np.zeros(len(reads), np.bool_)
    for k in range(min(_FEW, int(each.max(initial=0)))):
        written = np.where(each > k, buffer[np.minimum(first + k, len(buffer) - 1)], -1)
        own |= written[reads.step] == mine
    many = np.flatnonzero(each[reads.step] > _FEW)
    if len(many):
        keys = writes.buffer * count + writes.step
        own[many] = _among(mine[many] * count + reads.step[many], keys)
    return own


_FEW = 2
"""Slices that most steps write at most."""


def _written(times: Timeline, space: _Space) -> Accesses:
    """The reads of buffers that the program writes."""
    reads, written = times.reads, np.zeros(len(space.base) - 1, np.bool_)
    written[times.writes.slices.buffer] = True
    mine = np.flatnonzero(written[reads.slices.buffer][reads.part])
    return replace(reads, step=reads.step[mine], part=reads.part[mine])


def _meet(buffer: Int, begin: Int, end: Int, writes: Accesses) -> npt.NDArray[np.bool_]:
    """Whether a span of time meets some write of its buffer, wherever in it."""
    if not len(writes) or not len(buffer):
        return np.zeros(len(buffer), np.bool_)
    width = np.int64(max(int(end.max()), int(writes.end.max()))) + 2
    order = np.lexsort((writes.begin, writes.buffer))
    base = writes.buffer[order] * width
    opens, reach = base + writes.begin[order], np.maximum.accumulate(base + writes.end[order])
    # the last write of the buffer that begins before the span ends; the latest end of it and those before
    at = np.searchsorted(opens, buffer * width + end, side="left") - 1
    return np.asarray((at >= 0) & (reach[np.maximum(at, 0)] > buffer * width + begin))


_WINDOW = 1 << 18
"""Segments of accesses that are looked at together: arrays of these stay in a processor's cache."""


def _pairs(
    reads: _Uses, ranges: tuple[Int, Int], writes: _Uses, space: _Space
) -> Iterator[tuple[Place, Place]]:
    """((step, buffer), (step, buffer)) of accesses that clash, each pair of steps once."""
    low, high = (np.concatenate([ranges[k], space.writes[k][writes.part]]) for k in (0, 1))
    seen: set[tuple[int, int]] = set()
    for rows, a, b in windows(low, high, space.size, _WINDOW):
        owner, segment = expand(a, b)
        access = rows[owner]
        for x, y in _clashes(reads, writes, access, segment):
            pair = (min(x[0], y[0]), max(x[0], y[0]))
            if pair not in seen:
                seen.add(pair)
                yield x, y


def _among(keys: Int, known: Int) -> npt.NDArray[np.bool_]:
    """Which keys are among the known ones. By sorting: np.isin hashes, which collides badly on such keys."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    ordered = np.sort(known)
    return np.asarray(ordered[np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)] == keys)


Place = tuple[int, int]


def _clashes(reads: _Uses, writes: _Uses, access: Int, segment: Int) -> Iterator[tuple[Place, Place]]:
    """((step, buffer), (step, buffer)) of clashing accesses. `access` numbers the reads, then the writes."""
    count = len(reads)
    written = access >= count
    touched = np.unique(segment[written])
    if not len(touched):
        return
    keep = touched[np.minimum(np.searchsorted(touched, segment), len(touched) - 1)] == segment
    access, segment, written = access[keep], segment[keep], written[keep]
    step, begin, end = (
        np.concatenate([getattr(reads, k), getattr(writes, k)])[access] for k in ("step", "begin", "end")
    )
    # a step that reads what it writes (in place) clashes with nobody more than its write does
    own = _among(segment * (1 << 31) + step, (segment * (1 << 31) + step)[written])
    alive = (written | ~own) & (end > begin)
    access, segment, written, step = access[alive], segment[alive], written[alive], step[alive]
    begin, end = begin[alive], end[alive]
    order = np.lexsort((begin, segment))
    access, segment, written, step = access[order], segment[order], written[order], step[order]
    begin, end = begin[order], end[order]
    buffer = np.concatenate([reads.buffer, writes.buffer])
    past = _Past.of(segment, end)
    for mine, against in ((written, written), (written, ~written), (~written, written)):
        busy, holder = past.latest(against)
        hit = mine & (holder >= 0) & (busy > begin) & (step != step[np.maximum(holder, 0)])
        for i in np.flatnonzero(hit):
            j = int(holder[i])
            yield (int(step[j]), int(buffer[access[j]])), (int(step[i]), int(buffer[access[i]]))


@dataclass(frozen=True)
class _Past:
    """Rows in order of segments, and how late each is over. Ends become ranks: (segment, rank) is then one
    growing key, and one running maximum serves all segments."""

    end: Int
    rank: Int
    by_rank: Int
    base: Int  # of the keys of each row's segment

    @staticmethod
    def of(segment: Int, end: Int) -> _Past:
        """Of rows whose segments are in order."""
        n = len(segment)
        order = np.argsort(end, kind="stable")
        rank, by_rank = np.empty(n, np.int64), np.concatenate([[-1], order])
        rank[order] = np.arange(1, n + 1)
        fresh = np.concatenate([np.zeros(min(n, 1), np.int64), segment[1:] != segment[:-1]])
        return _Past(end, rank, by_rank, np.cumsum(fresh) * (n + 1))

    def latest(self, mask: npt.NDArray[np.bool_]) -> tuple[Int, Int]:
        """For each row: the largest `end` among earlier rows of its segment in `mask`, and that row (or
        -1)."""
        best = np.maximum.accumulate(self.base + np.where(mask, self.rank, 0))
        before = np.concatenate([np.full(min(len(best), 1), -1), best[:-1]]) - self.base
        holder = self.by_rank[np.maximum(before, 0)]
        return np.where(holder >= 0, self.end[np.maximum(holder, 0)], -1), holder
