"""Megakernel style: one persistent kernel, a queue per SM for the whole program, waits for exactly what is
read.

Counters: the tasks of a kernel's last stage that the same readers need raise one counter together. A reader
waits for the counters of all tasks whose bytes it reads; what it overwrites was read by tasks that come
before these."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mapper.schedule.tables import Int
from mapper_gpu.hardware import Gpu
from mapper_gpu.tasks import Task

Wait = tuple[int, int]
"""(logical counter, chip: -1 for the task's own)."""


def signals_of(tasks: Sequence[Task], stage: Int) -> tuple[list[int], list[list[Wait]], int]:
    """(logical counter that each task raises, waits of each task inside the block, counters).

    A wait for counter -1 is one for the block, or repetition, before. The last counter is the last stage's
    alone."""
    written: dict[object, list[tuple[int, int, int]]] = {}
    for i, t in enumerate(tasks):
        for s, _, low, size in t.writes:
            written.setdefault(s, []).append((low, low + size, i))
    arrays = {s: np.array(v, np.int64) for s, v in written.items()}
    readers: list[set[object]] = [set() for _ in tasks]
    needs: list[list[tuple[int, Int]]] = []
    found: dict[tuple[object, int, int], Int] = {}
    for t, mine in zip(tasks, stage.tolist(), strict=True):
        need = []
        for s, own, low, size in t.reads:
            if s not in arrays:
                continue
            key = (s, low, size)
            if key not in found:
                a = arrays[s]
                hit = (a[:, 0] < low + size) & (a[:, 1] > low)
                found[key] = np.unique(a[hit, 2])
                for i in found[key].tolist():
                    readers[i].add(key)
            earlier = found[key][stage[found[key]] < mine]
            if len(earlier):
                need.append((own, earlier))
        needs.append(need)
    last = int(stage.max())
    groups: dict[Any, int] = {}
    keys: list[Any] = [
        (int(s), frozenset(r)) if s < last else "last" for s, r in zip(stage.tolist(), readers, strict=True)
    ]
    for mark in keys:
        if mark != "last":
            groups.setdefault(mark, len(groups))
    groups["last"] = len(groups)
    raised = [groups[k] for k in keys]
    waits = [
        sorted({(raised[i], own) for own, earlier in need for i in earlier.tolist()}) or [(-1, -1)]
        for need in needs
    ]
    return raised, waits, len(groups)


def needed(
    tasks: Sequence[Task], stage: Int, waits: list[list[Wait]], raised: list[int], chips: int, base: int
) -> list[list[Wait]]:
    """The waits without those that follow from others of the same task: whoever waited for a counter knows
    what all that raised it waited for. `base` is the first of the chips."""
    known: dict[int, int] = {}
    kept: list[list[Wait]] = [[] for _ in tasks]
    order = np.argsort(stage, kind="stable").tolist()
    for _, group in groupby(order, key=lambda i: int(stage[i])):
        made: dict[int, int] = {}
        for i in group:
            here = tasks[i].chips or range(chips)
            implied = set(waits[i])
            for chip in here:
                bits = {w: w[0] * chips + (chip if w[1] < 0 else w[1] - base) for w in waits[i] if w[0] >= 0}
                behind = 0
                for b in bits.values():
                    behind |= known.get(b, 0)
                implied &= {w for w, b in bits.items() if behind >> b & 1}
                mine = raised[i] * chips + chip
                made[mine] = made.get(mine, 0) | behind | sum(1 << b for b in set(bits.values()))
            kept[i] = [w for w in waits[i] if w not in implied]
        known |= made
    return kept


def schedule(
    gpu: Gpu, tasks: Sequence[Task], stage: Int, length: Int, waits: list[list[Wait]], raised: list[int],
    latency: int,
) -> tuple[Int, Int, int]:  # fmt: skip
    """(unit, start in cycles, end of all) of chip 0's tasks: list scheduling, stages nearest to the
    program's end last (a chain's longest path to the end is its stage), each task on the SM that is free
    first.

    The other chips do the same at the same time, so that their counters are this one's."""
    free = [(0, i) for i in range(gpu.sms)]
    heapq.heapify(free)
    links = {-1: 0}  # when each chip's link is free; -1: that of any other
    over: dict[int, int] = {}
    unit, start = np.zeros(len(tasks), np.int64), np.zeros(len(tasks), np.int64)
    end = 0
    for i in np.argsort(stage, kind="stable").tolist():
        ready = max((over[c] + latency for c, _ in waits[i] if c >= 0), default=0)
        if tasks[i].opcode == 6:
            mine = tasks[i].chips
            before = links.values() if mine is None else [links.get(c, links[-1]) for c in mine]
            unit[i], start[i] = gpu.sms, max(ready, *before)
            over_at = int(start[i] + length[i])
            links = {-1: over_at} if mine is None else links | dict.fromkeys(mine, over_at)
        else:
            at, sm = heapq.heappop(free)
            unit[i], start[i] = sm, max(at, ready)
            heapq.heappush(free, (int(start[i] + length[i]), sm))
        done = int(start[i] + length[i])
        over[raised[i]] = max(over.get(raised[i], 0), done)
        end = max(end, done)
    return unit, start, end


def queue_starts(
    unit: Sequence[int],
    duration: Sequence[int],
    waits: Sequence[Sequence[int]],
    raised: Sequence[Sequence[int]],
    latency: int,
) -> tuple[list[int], int]:
    """(start of each row, end of all) with the rows in queue order: each after its unit's last and, by the
    signal's latency, after the counters of its own block that it waits for."""
    free: dict[int, int] = {}
    over: dict[int, int] = {}
    start: list[int] = []
    end = 0
    for u, d, need, mine in zip(unit, duration, waits, raised, strict=True):
        at = free.get(u, 0)
        for c in need:
            if c >= 0:
                at = max(at, over[c] + latency)
        start.append(at)
        free[u] = at + d
        end = max(end, at + d)
        for c in mine:
            over[c] = max(over.get(c, 0), at + d)
    return start, end


def pages(unit: Int, start: Int, need: Int, room: int) -> Int:
    """First page of shared memory of each task. A task's pages are filled while the task before it on its
    SM runs, so neighbours in a queue need different ones: colouring of intervals in order of their
    starts."""
    first = np.zeros(len(unit), np.int64)
    held: dict[int, tuple[int, int]] = {}
    for i in np.lexsort((start, unit)).tolist():
        low, high = held.get(int(unit[i]), (0, 0))
        n = int(need[i])
        first[i] = 0 if n <= low else high
        if first[i] + n > room:
            first[i] = max(0, room - n) if room - n >= high or n <= low else 0
        held[int(unit[i])] = (int(first[i]), int(first[i]) + n)
    return first
