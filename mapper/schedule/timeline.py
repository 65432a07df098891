"""A program unrolled in time: its steps and memory accesses as flat columns. What checks and executors read.

Repetitions are expanded, slots are bound to buffers, starts are absolute cycles of the program.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mapper.schedule.tables import Block, Int, Program, Schedule

Side = Literal["reads", "writes"]
Short = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Slices:
    """Bytes [low, high) of buffers, after binding: what accesses are of. Most are used by many."""

    buffer: Int
    low: Int
    high: Int


@dataclass(frozen=True)
class Accesses:
    """Memory accesses, one row each: the step (row of the Timeline) and the bytes [low, high) of a buffer.

    A read takes its bytes at `begin`; a write can be read from `end` on. In between the bytes are in use.
    `part` numbers the `slices`, and `spans` are (begin, end) of each step, not of each access: a program may
    have millions. All other columns are made anew each time that they are asked for.
    """

    step: Short
    part: Short
    slices: Slices
    spans: tuple[Int, Int]

    def __len__(self) -> int:
        return len(self.step)

    @property
    def buffer(self) -> Int:
        """The buffer of each access, after binding."""
        return np.asarray(self.slices.buffer[self.part])

    @property
    def low(self) -> Int:
        """The first byte of each access."""
        return np.asarray(self.slices.low[self.part])

    @property
    def high(self) -> Int:
        """The byte behind the last one of each access."""
        return np.asarray(self.slices.high[self.part])

    @property
    def begin(self) -> Int:
        """When each access begins."""
        return np.asarray(self.spans[0][self.step])

    @property
    def end(self) -> Int:
        """When each access is over."""
        return np.asarray(self.spans[1][self.step])


@dataclass(frozen=True)
class Timeline:
    """All steps of one program in time order (start, then unit, then table order).

    `block`, `row` and `repetition` say where in the program's blocks a step comes from.
    """

    start: Int
    end: Int  # start + duration
    unit: Int
    opcode: Int
    op: Int
    bytes: Int
    flops: Int
    block: Int
    row: Int
    repetition: Int
    reads: Accesses
    writes: Accesses

    def __len__(self) -> int:
        return len(self.start)

    def name(self, step: int | np.integer[Any]) -> str:
        """The step's place: "block 1 row 20 repetition 3"."""
        return f"block {self.block[step]} row {self.row[step]} repetition {self.repetition[step]}"


_CACHE: dict[int, tuple[weakref.ref[Schedule], dict[str, Timeline]]] = {}


def timeline(schedule: Schedule, phase: str) -> Timeline:
    """The unrolled program `phase` of a validated schedule. Kept for as long as the schedule lives."""
    key = id(schedule)
    if key not in _CACHE:
        reference = weakref.ref(schedule, lambda _: _CACHE.pop(key, None))
        _CACHE[key] = (reference, {})
    known = _CACHE[key][1]
    if phase not in known:
        known[phase] = _unroll(schedule, schedule.programs[phase])
    return known[phase]


def access_times(schedule: Schedule) -> tuple[Int, Int] | None:
    """(read offset, write offset) per opcode from plan["access_timing"], or None where the plan has none.

    On a machine with exact times a step's read takes place at start + read offset, and what it writes can be
    read from cycle start + write offset on. Without an entry (-1) a step reads at its start
    and has written at its end.
    """
    plan: Any = schedule.plan
    timing = plan.get("access_timing") if isinstance(plan, dict) else None
    if not timing:
        return None
    read, write = np.full((2, len(schedule.opcodes)), -1, np.int64)
    for number, name in enumerate(schedule.opcodes):
        if name in timing:
            read[number], write[number] = timing[name]
    return read, write


def _unroll(schedule: Schedule, program: Program) -> Timeline:
    parts = [_unroll_block(block, number) for number, block in enumerate(program.blocks)]
    base = np.cumsum([0] + [len(p["start"]) for p in parts])
    # a program may have millions of steps: what is no longer needed goes at once
    columns = {k: _cat([p.pop(k) for p in parts]) for k in _SCALARS}
    place = np.arange(len(columns["start"]), dtype=np.int32)
    # the columns are in order of block, repetition and row; where these follow each other in time that is all
    if not _in_time(columns["start"], columns["unit"]):
        order = np.lexsort((columns["unit"], columns["start"]))  # a stable sort
        for k in _SCALARS:
            columns[k] = columns[k][order]
        place[order] = np.arange(len(order))
        del order
    timing = access_times(schedule)
    reads, writes = (
        _join([_unroll_slices(b, which) for b in program.blocks], base, place, columns, which, timing)
        for which in _SIDES
    )
    return Timeline(**columns, reads=reads, writes=writes)


def _in_time(start: Int, unit: Int) -> bool:
    """Whether steps are in order of their starts, and of units where these are equal."""
    before, after = start[:-1], start[1:]
    return not ((after < before) | ((after == before) & (unit[1:] < unit[:-1]))).any()


_SIDES: tuple[Side, Side] = ("reads", "writes")


_SCALARS = ("start", "end", "unit", "opcode", "op", "bytes", "flops", "block", "row", "repetition")


def _cat(parts: list[Int]) -> Int:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _unroll_block(block: Block, number: int) -> dict[str, Int]:
    steps, n, times = block.steps, len(block.steps), block.repeat
    turn = np.arange(times)[:, None]
    each = {k: steps.column(k) for k in ("unit", "opcode", "op", "bytes", "flops")}
    each["start"] = steps.column("start") + block.start + turn * block.period
    each["end"] = each["start"] + steps.column("duration")
    each |= {"block": np.array(number), "row": np.arange(n), "repetition": turn}
    return {k: np.broadcast_to(v, (times, n)).reshape(-1) for k, v in each.items()}


def _unroll_slices(block: Block, which: Side) -> tuple[Short, Short, Slices]:
    """(step within the unrolled block, slice) of each access, and the slices: those of buffers that are bound
    anew with each repetition once per repetition, the others once."""
    offsets, slot, low, length = block.steps.slices(which)
    n, times = len(block.steps), block.repeat
    keep = np.flatnonzero(length > 0)
    step = np.repeat(np.arange(n), np.diff(offsets))[keep]
    distinct, part = _distinct((slot[keep], low[keep], length[keep]))
    slot, low, high = slot[keep][distinct], low[keep][distinct], (low + length)[keep][distinct]
    moved = np.zeros(len(slot), np.bool_)
    bound = np.zeros((times, 0), np.int64)
    if block.bindings is not None and block.bindings.num_rows and len(slot):
        slots, at, to = (np.asarray(block.bindings.column(k).to_numpy(), np.int64) for k in range(3))
        known = np.unique(slots)
        table = np.tile(known, (times, 1))
        here = (at >= 0) & (at < times)
        table[at[here], np.searchsorted(known, slots[here])] = to[here]
        place = np.minimum(np.searchsorted(known, slot), len(known) - 1)
        moved = known[place] == slot
        bound = table[:, place[moved]]
    fixed, moving = np.flatnonzero(~moved), np.flatnonzero(moved)
    number = np.empty(len(slot), np.int64)
    number[fixed], number[moving] = np.arange(len(fixed)), len(fixed) + np.arange(len(moving))
    turn = np.arange(times, dtype=np.int32)[:, None]
    steps = step.astype(np.int32) + turn * np.int32(n)
    parts = number[part].astype(np.int32) + turn * (len(moving) * moved[part]).astype(np.int32)
    slices = Slices(
        np.concatenate([slot[fixed], bound.reshape(-1)]),
        np.concatenate([low[fixed], np.tile(low[moving], times)]),
        np.concatenate([high[fixed], np.tile(high[moving], times)]),
    )
    return steps.reshape(-1), parts.reshape(-1), slices


def _distinct(columns: tuple[Int, ...]) -> tuple[Int, Int]:
    """(rows that differ from each other, which of them each row is like)."""
    order = np.lexsort(columns)
    fresh = np.ones(len(order), np.bool_)
    fresh[1:] = np.logical_or.reduce([c[order[1:]] != c[order[:-1]] for c in columns])
    like = np.empty(len(order), np.int64)
    like[order] = np.cumsum(fresh) - 1
    return order[fresh], like


def _join(
    parts: list[tuple[Short, Short, Slices]],
    base: Int,
    place: Short,
    columns: dict[str, Int],
    which: Side,
    timing: tuple[Int, Int] | None,
) -> Accesses:
    step = np.concatenate([_NONE, *(place[p[0] + b] for p, b in zip(parts, base, strict=False))])
    first = np.cumsum([0, *(len(p[2].buffer) for p in parts)])
    part = np.concatenate([_NONE, *(p[1] + np.int32(f) for p, f in zip(parts, first, strict=False))])
    slices = Slices(*(_cat([getattr(p[2], k) for p in parts]) for k in ("buffer", "low", "high")))
    parts.clear()
    if (step[1:] < step[:-1]).any():
        order = np.argsort(step, kind="stable")
        step, part = step[order], part[order]
    begin, end = columns["start"], columns["end"]
    if timing is not None:
        offset = timing[_SIDES.index(which)][columns["opcode"]]
        exact = columns["start"] + offset
        begin, end = np.where(offset >= 0, exact, begin), np.where(offset >= 0, exact, end)
    return Accesses(step, part, slices, (begin, end))


_NONE = np.zeros(0, np.int32)
