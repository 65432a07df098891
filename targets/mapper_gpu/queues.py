"""Task queues: which SM does which task, in which order, and when.

Graph style: a kernel's tasks are handed out in order to the SM that is free first, and the next kernel
starts when all of them are done and the launch gap is over. Megakernel style: every SM has one queue for
the whole program; a task waits for the counters of exactly the tasks that make what it reads; tasks are
placed by list scheduling, those with the longest path to the end first.

`stage_starts` and `queue_starts` give starts from durations alone, so that the same order can be timed with
other constants."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Int
from mapper_gpu.timing import Float


@dataclass(frozen=True)
class Stages:
    """Rows of a block in stages: `stage` of each row (ascending), its `unit`, its position `rank` in that
    unit's queue within the stage, and `join`: rows of one merge tile share a number (-1: none); a merge
    starts after the rows of its tile. `head` marks stages that start a kernel: they come a launch gap after
    the stage before."""

    stage: Int
    unit: Int
    rank: Int
    join: Int
    head: Int


def ranks(stage: Int, unit: Int) -> Int:
    """The position of each row in its unit's queue of its stage, in row order."""
    order = np.lexsort((np.arange(len(stage)), unit, stage))
    key = stage[order] * (int(unit.max(initial=0)) + 1) + unit[order]
    first = np.concatenate([[True], key[1:] != key[:-1]])
    begin = np.maximum.accumulate(np.where(first, np.arange(len(key)), 0))
    out = np.empty(len(stage), np.int64)
    out[order] = np.arange(len(key)) - begin
    return out


def stage_starts(s: Stages, duration: Int, gap: int) -> tuple[Int, int]:
    """(start of each row, end of all) in cycles, the first stage at 0."""
    start = np.zeros(len(duration), np.int64)
    units = int(s.unit.max(initial=0)) + 1
    at = 0
    for number in range(int(s.stage.max(initial=-1)) + 1):
        rows = np.flatnonzero(s.stage == number)
        if not len(rows):
            continue
        base = at + (gap if s.head[number] and number else 0)
        ready = np.full(len(rows), base, np.int64)
        if (s.join[rows] >= 0).any() and not s.head[number]:
            ready = _merges(s, rows, start, duration)
        free = np.zeros(units, np.int64)
        for rank in range(int(s.rank[rows].max()) + 1):
            here = s.rank[rows] == rank
            mine = rows[here]
            start[mine] = np.maximum(free[s.unit[mine]], ready[here])
            free[s.unit[mine]] = start[mine] + duration[mine]
        at = max(at, int((start[rows] + duration[rows]).max()))
    return start, at


def _merges(s: Stages, rows: Int, start: Int, duration: Int) -> Int:
    """When the parts of each merge's tile are done, and its unit is free of them."""
    before = np.flatnonzero(s.stage == s.stage[rows[0]] - 1)
    end = start[before] + duration[before]
    done = np.zeros(int(s.join[before].max()) + 1, np.int64)
    np.maximum.at(done, s.join[before], end)
    free = np.zeros(int(s.unit.max()) + 1, np.int64)
    np.maximum.at(free, s.unit[before], end)
    return np.maximum(done[s.join[rows]], free[s.unit[rows]])


def place(duration: Float, sms: int) -> Int:
    """The SM of each task, handed out in order to the one that is free first."""
    free = [(0.0, i) for i in range(sms)]
    placed = np.empty(len(duration), np.int64)
    for i, d in enumerate(duration.tolist()):
        at, sm = heapq.heappop(free)
        placed[i] = sm
        heapq.heappush(free, (at + d, sm))
    return placed


def place_merges(end: Float, join: Int, unit: Int, duration: Float, sms: int, merges: Sequence[int]) -> Int:
    """The SM of each merge: the one among its tile's own that is free first (it holds the last part)."""
    free = np.zeros(sms)
    np.maximum.at(free, unit, end)
    placed = np.empty(len(merges), np.int64)
    by_tile: dict[int, list[int]] = {}
    for row, tile in enumerate(join.tolist()):
        by_tile.setdefault(tile, []).append(row)
    for i, tile in enumerate(merges):
        own = by_tile[tile]
        best = min(own, key=lambda r: (free[unit[r]], unit[r]))
        placed[i] = unit[best]
        free[unit[best]] = max(free[unit[best]], max(end[r] for r in own)) + duration[i]
    return placed
