"""Grids of tasks as columns of a step table: on all chips, in queues, with waits and signals.

A step's immediates are FIELDS, then its waits and signals:

    waits, (counter, count in the first repetition, count in later ones) per wait, signals, counter per signal

Counters of a block are numbered 0 .. C - 1; repetition r of the block has counters base + r C + c, so that
c < 0 means one of the repetition, or block, before. The last `chips` counters of a block count its last
kernel's tasks, chip by chip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Block, Int, step_table
from mapper_gpu import persistent
from mapper_gpu.degrees import Degrees, Near
from mapper_gpu.hardware import Gpu
from mapper_gpu.queues import Stages, place, place_merges, ranks, stage_starts
from mapper_gpu.storage import Storage
from mapper_gpu.tasks import Grid, Task
from mapper_gpu.timing import KERNEL, QUEUE, Float, task_seconds

FIELDS = (
    "program", "kernel", "m0", "m1", "n0", "n1", "k0", "k1", "near", "work", "engine", "sharers", "lead",
    "pages", "page", "join", "stage",
)  # fmt: skip
"""Immediates of every step: the program and kernel it belongs to, its coordinates, bytes that it moves
through L2 or the link, operations that its engine works through, the engine and how many SMs share the
bandwidth, what comes before it (timing.LEADS), pages of shared memory, its tile's number among merges, and
the kernel's stage."""
Ragged = tuple[Int, Int, Int, Int]
Wait = tuple[int, int, int, int | Near]
"""(logical counter, count in the first repetition, in later ones, chips: a number in the machine, or
which)."""


@dataclass(frozen=True)
class Counted:
    """A block's steps with its counters: how many there are, and the counts of the last kernel's, which the
    next block waits for."""

    block: Block
    counters: int
    last: int


def cycles(gpu: Gpu, seconds: Float | float) -> Int:
    """Whole cycles, at least one."""
    return np.maximum(1, np.ceil(np.asarray(seconds) * gpu.clock - 1e-9)).astype(np.int64)


def between(gpu: Gpu, megakernel: bool) -> int:
    """Cycles between repetitions and blocks: the launch gap, or a signal."""
    return int(cycles(gpu, gpu.signal if megakernel else gpu.gap))


def sharers(gpu: Gpu, count: int) -> Int:
    """SMs that run at once with each of `count` tasks of a grid: full waves, then the ragged one."""
    full, rest = divmod(count, gpu.sms)
    return np.array([min(count, gpu.sms)] * (full * gpu.sms) + [rest] * rest, np.int64)


def block_of(
    gpu: Gpu,
    name: str,
    grids: Sequence[Grid],
    degrees: Degrees,
    start: int,
    repeat: int,
    before: int,
    base: int,
) -> Counted:
    """A block of kernels in the machine's style on the chips of a stage, of which `base` is the first.
    `before` is the count of the block before (-1: none)."""
    made = columns_of(gpu, grids, degrees, gpu.megakernel, before < 0, base)
    return made.finish(name, start, repeat, before)


def columns_of(
    gpu: Gpu, grids: Sequence[Grid], degrees: Degrees, megakernel: bool, opens: bool, base: int
) -> Columns:
    """The columns of a block's kernels; `opens` where it is the first of its program."""
    tasks: list[Task] = []
    kernel: list[int] = []
    stage: list[int] = []
    heads: list[int] = []
    for number, grid in enumerate(grids):
        ordered = sorted(grid.tasks, key=lambda t: t.stage)
        for s in range(1 + max(t.stage for t in ordered)):
            mine = [t for t in ordered if t.stage == s]
            tasks += mine
            kernel += [number] * len(mine)
            stage += [len(heads)] * len(mine)
            heads.append(int(s == 0))
    return Columns(gpu, tasks, np.array(kernel), np.array(stage), np.array(heads), degrees, megakernel, opens,
                   base)  # fmt: skip


class Columns:
    """The columns of one block while they are made; chip 0 first, then copies for the others."""

    def __init__(
        self, gpu: Gpu, tasks: list[Task], kernel: Int, stage: Int, heads: Int, degrees: Degrees,
        megakernel: bool, opens: bool, base: int,
    ) -> None:  # fmt: skip
        self.megakernel, self.opens, self.base, self.degrees = megakernel, opens, base, degrees
        self.gpu, self.tasks, self.kernel, self.stage, self.heads, self.chips = (
            gpu, tasks, kernel, stage, heads, degrees.group,
        )  # fmt: skip
        self.near = np.array([round(t.near) for t in tasks], np.int64)
        self.far = np.array([round(t.far) for t in tasks], np.int64)
        self.work = np.array([round(t.work) for t in tasks], np.int64)
        self.engine = np.array([t.engine for t in tasks], np.int64)
        self.lead = np.array([t.lead for t in tasks], np.int64)
        self.join = np.array([t.join for t in tasks], np.int64)
        self.link = np.array([t.opcode for t in tasks]) == 6
        self.shared = np.ones(len(tasks), np.int64)
        self.unit = np.zeros(len(tasks), np.int64)
        for number in range(len(heads)):
            self._lead(np.flatnonzero(stage == number), number)
        self.begin = np.zeros(len(tasks), np.int64)
        self.page = np.zeros(len(tasks), np.int64)
        self.end = 0
        self._time()
        (self._queue if megakernel else self._place)()
        crowded = [] if megakernel else self._crowded()
        if crowded:
            self.shared[np.isin(stage, crowded)] = gpu.sms
            self._time()
            self._place()

    def _time(self) -> None:
        """How long each task takes."""
        self.seconds = np.asarray(
            task_seconds(self.gpu, self.far, self.near, self.work, self.engine, self.shared, self.lead)
        )
        self.length = cycles(self.gpu, self.seconds)

    def _crowded(self) -> list[int]:
        """Stages whose tasks together take more bytes per cycle than the memory's pins pass: unequal tasks,
        of which those of the last, ragged wave begin beside many of the wave before."""
        found = []
        for number in range(len(self.heads)):
            rows = np.flatnonzero((self.stage == number) & ~self.link)
            if len(rows) <= self.gpu.sms:
                continue
            rate = self.far[rows] / self.length[rows]
            time = np.concatenate([self.begin[rows], self.begin[rows] + self.length[rows]])
            order = np.lexsort((np.concatenate([rate, -rate]), time))
            if np.cumsum(np.concatenate([rate, -rate])[order]).max() * self.gpu.clock > self.gpu.hbm:
                found.append(number)
        return found

    def _lead(self, rows: Int, number: int) -> None:
        """What comes before the tasks of a stage, and how many share the bandwidth."""
        gpu, link = self.gpu, self.link[rows]
        if self.megakernel:
            self.shared[rows] = min(len(rows), gpu.sms)
            self.lead[rows] = np.where(link, self.lead[rows], QUEUE)
        else:
            self.shared[rows] = sharers(gpu, len(rows))
        if self.heads[number] and (not self.megakernel or (self.opens and number == 0)):
            first = rows[: gpu.sms]
            self.lead[first] = np.where(link[: gpu.sms], self.lead[first], KERNEL)

    def _queue(self) -> None:
        """Queues of the whole block."""
        gpu = self.gpu
        self.raised, waits, self.logical = persistent.signals_of(self.tasks, self.stage)
        self.waited = persistent.needed(self.tasks, self.stage, waits, self.raised, self.chips, self.base)
        latency = int(cycles(gpu, gpu.signal))
        self.unit, self.begin, self.end = persistent.schedule(
            gpu, self.tasks, self.stage, self.length, self.waited, self.raised, latency
        )
        need = np.array([t.pages for t in self.tasks])
        self.page = persistent.pages(self.unit, self.begin, need, int(gpu.shared // gpu.page))
        # the links of all chips are one unit here; each has one task of a stage, so that stages take turns
        turns = np.unique(self.stage[self.link], return_inverse=True)[1]
        self.page[self.link] = turns % 2

    def _place(self) -> None:
        """Units of chip 0: SM numbers, or the link behind them."""
        gpu = self.gpu
        for number in range(len(self.heads)):
            rows = np.flatnonzero(self.stage == number)
            if self.link[rows].all():
                self.unit[rows] = gpu.sms
            elif self.heads[number]:
                self.unit[rows] = place(self.seconds[rows], gpu.sms)
            else:
                before = np.flatnonzero(self.stage == number - 1)
                end = self._ends(before)
                self.unit[rows] = place_merges(
                    end,
                    self.join[before],
                    self.unit[before],
                    self.seconds[rows],
                    gpu.sms,
                    self.join[rows].tolist(),
                )

        queue = self.unit + np.array([t.chips.start if t.chips else 0 for t in self.tasks])
        stages = Stages(self.stage, queue, ranks(self.stage, queue), self.join, self.heads)
        self.begin, self.end = stage_starts(stages, self.length, int(cycles(gpu, gpu.gap)))

    def _ends(self, rows: Int) -> Float:
        """When each task of a first stage ends on its SM, from the stage's start."""
        free = np.zeros(self.gpu.sms)
        end = np.zeros(len(rows))
        for i, row in enumerate(rows.tolist()):
            free[self.unit[row]] += self.seconds[row]
            end[i] = free[self.unit[row]]
        return end

    def finish(self, name: str, start: int, repeat: int, before: int) -> Counted:
        """The block, repeated on every chip."""
        gpu, chips, n = self.gpu, self.chips, len(self.tasks)
        begin, length = self.begin, self.length
        period = self.end + between(gpu, self.megakernel) if repeat > 1 else 0
        last = np.flatnonzero(self.stage == self.stage.max())
        counters = self._persistent_counters if self.megakernel else self._counters
        waits, signals, total = counters(before)
        here = np.ones((n, chips), bool)
        for i, t in enumerate(self.tasks):
            if t.chips is not None:
                here[i] = False
                here[i, list(t.chips)] = True
        chip, row = np.divmod(np.arange(n * chips), n)
        rows = np.flatnonzero(here[row, chip])
        unit = self.unit[row] + (self.base + chip) * (gpu.sms + 1)
        rows = rows[np.lexsort((row[rows], unit[rows], begin[row[rows]]))]
        mine = row[rows]
        args = self._immediates(waits, signals)
        opcode, op = (np.array([getattr(t, k) for t in self.tasks], np.int64) for k in ("opcode", "op"))
        flops = np.array([round(t.flops) for t in self.tasks], np.int64)
        table = step_table(
            begin[mine], length[mine], unit[rows], opcode[mine], _taken(*args, rows),
            self._slices([t.reads for t in self.tasks], mine, chip[rows]),
            self._slices([t.writes for t in self.tasks], mine, chip[rows]),
            op[mine], self.far[mine], flops[mine],
        )  # fmt: skip
        count = sum(self.tasks[i].on(0) for i in last)
        return Counted(Block(name, table, start, repeat, period), total, count)

    def _persistent_counters(self, before: int) -> tuple[list[list[Wait]], list[list[int]], int]:
        """As `_counters`, in megakernel style."""
        count = np.zeros((self.logical, self.chips), np.int64)
        for t, c in zip(self.tasks, self.raised, strict=True):
            count[c, slice(None) if t.chips is None else list(t.chips)] += 1
        waits: list[list[Wait]] = []
        for t, needed in zip(self.tasks, self.waited, strict=True):
            mine: list[Wait] = []
            own_chip = 0 if t.chips is None else t.chips.start
            for c, own in needed:
                if c >= 0:
                    asked = int(count[c, own_chip if own < 0 else own - self.base])
                    mine.append((c, asked, asked, own if own >= 0 else "own"))
                elif before >= 0:
                    # what a chip writes now, others may have read in the collective that ended the last one
                    mine.append((-1, before, int(count[-1, 0]), "replica"))
            waits.append(mine)
        return waits, [[c] for c in self.raised], self.logical * self.chips

    def _counters(self, before: int) -> tuple[list[list[Wait]], list[list[int]], int]:
        """Waits, signals per task (logical counters), counters in all.

        Logical counters: one per merged tile, then one per stage that another stage waits for; the block's
        last."""
        tiles: dict[tuple[int, int], int] = {}
        for i, t in enumerate(self.tasks):
            if t.stage == 1 and t.join >= 0:
                tiles[int(self.kernel[i]), t.join] = len(tiles)
        done: dict[int, int] = {}
        finals = [s for s in range(len(self.heads)) if s + 1 == len(self.heads) or self._full(s)]
        for s in finals:
            done[s] = len(tiles) + len(done)
        counts = {s: sum(t.on(0) for t, at in zip(self.tasks, self.stage, strict=True) if at == s)
                  for s in finals}  # fmt: skip
        parts: dict[int, int] = {}
        for i, t in enumerate(self.tasks):
            key = (int(self.kernel[i]), t.join)
            if t.stage == 0 and key in tiles:
                parts[tiles[key]] = parts.get(tiles[key], 0) + 1
        waits: list[list[Wait]] = []
        signals: list[list[int]] = []
        logical = len(tiles) + len(done)
        for i, t in enumerate(self.tasks):
            s = int(self.stage[i])
            key, own = (int(self.kernel[i]), t.join), t.over
            if t.stage == 1 and key in tiles:
                waits.append([(tiles[key], parts[tiles[key]], parts[tiles[key]], own)])
            elif s == 0:
                # what a chip writes now, others may have read in the collective that ended the last one: one
                # task that waits for all chips holds up the kernels behind its own
                own = "replica" if i == 0 else own
                waits.append([(-1, before, counts[finals[-1]], own)] if before >= 0 else [])
            else:
                waits.append([(done[s - 1], counts[s - 1], counts[s - 1], own)])
            out = [done[s]] if s in done else []
            if t.stage == 0 and key in tiles:
                out.append(tiles[key])
            signals.append(out)
        return waits, signals, logical * self.chips

    def _full(self, stage: int) -> bool:
        """Whether the stage after this one waits for all of it (it starts a kernel, or gathers shares)."""
        rows = np.flatnonzero(self.stage == stage + 1)
        return bool(self.heads[stage + 1]) or bool((self.join[rows] < 0).all())

    def _immediates(self, waits: list[list[Wait]], signals: list[list[int]]) -> tuple[Int, Int]:
        """(offsets, immediates) of all tasks of chip 0, then of the next. Few tasks differ in what they wait
        for and raise."""
        chips = self.chips
        names = ("program", "at", "engine", "pages", "join")
        program, at, engine, pages, join = (np.array([getattr(t, k) for t in self.tasks]) for k in names)
        columns = [program, self.kernel, *at.T, self.near, self.work, engine, self.shared, self.lead, pages,
                   self.page, join, self.stage]  # fmt: skip
        fixed = np.stack(columns, axis=1).astype(np.int64)
        kinds: dict[tuple[object, ...], int] = {}
        kind = np.array(
            [kinds.setdefault((tuple(w), tuple(s)), len(kinds)) for w, s in zip(waits, signals, strict=True)]
        )
        distinct = [(waits[i], signals[i]) for i in np.unique(kind, return_index=True)[1].tolist()]
        tails = [_tail(w, s, chip, self.degrees, self.base) for chip in range(chips) for w, s in distinct]
        sizes = np.array([len(t) for t in tails], np.int64)
        number = (kind + len(distinct) * np.arange(chips)[:, None]).reshape(-1)
        first = np.cumsum(sizes) - sizes
        offsets = np.concatenate([[0], np.cumsum(fixed.shape[1] + sizes[number])]).astype(np.int64)
        made = np.empty(offsets[-1], np.int64)
        made[offsets[:-1, None] + np.arange(fixed.shape[1])] = np.tile(fixed, (chips, 1))
        flat = np.array([v for t in tails for v in t], np.int64)
        behind = _ranges(offsets[:-1] + fixed.shape[1], sizes[number])
        made[behind] = flat[_ranges(first[number], sizes[number])]
        return offsets, made

    def _slices(
        self, parts: Sequence[Sequence[tuple[Storage, int, int, int]]], rows: Int, chip: Int
    ) -> Ragged:
        """Slices of tasks `rows` on chips `chip`: those of each task are given for chip 0."""
        offsets = np.cumsum([0, *(len(p) for p in parts)]).astype(np.int64)
        flat = np.array(
            [(s.first + max(own - s.base, 0), own, low, size) for p in parts for s, own, low, size in p],
            np.int64,
        ).reshape(-1, 4)
        taken, values = _taken(offsets, flat, rows)
        buffer, own, low, size = values.T
        buffer = np.where(own < 0, buffer + np.repeat(chip, np.diff(taken)), buffer)
        return taken, buffer, low, size


def _tail(waits: list[Wait], signals: list[int], chip: int, degrees: Degrees, base: int) -> list[int]:
    """Waits and signals of a task on a chip, as immediates; chips that waits name are counted from `base`."""
    chips = degrees.group
    mine = sorted({
        (c * chips + other, a, b) for c, a, b, own in waits
        for other in ([own - base] if isinstance(own, int) else degrees.near(chip, own))
    })  # fmt: skip
    return [
        len(mine),
        *(v for wait in mine for v in wait),
        len(signals),
        *(c * chips + chip for c in signals),
    ]


def _ranges(first: Int, size: Int) -> Int:
    """first[i] .. first[i] + size[i] of every i, one behind the other."""
    ends = np.cumsum(size)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + size, size)


def _taken(offsets: Int, flat: Int, rows: Int) -> tuple[Int, Int]:
    """(offsets, values) of some rows of a ragged column; a value may have columns."""
    size = np.diff(offsets)[rows]
    ends = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
    return ends, np.asarray(flat[_ranges(offsets[rows], size)])
