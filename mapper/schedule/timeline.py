"""A program unrolled in time: its steps and memory accesses as flat columns. What checks and executors read.

Repetitions are expanded, slots are bound to buffers, starts are absolute cycles of the program.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mapper.schedule.tables import Block, Int, Program, Schedule

Side = Literal["reads", "writes"]


@dataclass(frozen=True)
class Accesses:
    """Memory accesses, one row each: the step (row of the Timeline) and the bytes [low, high) of a buffer.

    A read takes its bytes at `begin`; a write can be read from `end` on. In between the bytes are in use.
    `spans` are (begin, end) of each step, not of each access: a program may have millions.
    """

    step: Int
    buffer: Int  # after binding
    low: Int
    high: Int
    spans: tuple[Int, Int]

    def __len__(self) -> int:
        return len(self.step)

    @property
    def begin(self) -> Int:
        """When each access begins; made anew each time."""
        return np.asarray(self.spans[0][self.step])

    @property
    def end(self) -> Int:
        """When each access is over; made anew each time."""
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
    order = np.lexsort(
        (columns["row"], columns["repetition"], columns["block"], columns["unit"], columns["start"])
    )
    for k in _SCALARS:
        columns[k] = columns[k][order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    del order
    timing = access_times(schedule)
    reads, writes = (
        _join([_unroll_slices(b, which) for b in program.blocks], base, place, columns, which, timing)
        for which in _SIDES
    )
    return Timeline(**columns, reads=reads, writes=writes)


_SIDES: tuple[Side, Side] = ("reads", "writes")


_SCALARS = ("start", "end", "unit", "opcode", "op", "bytes", "flops", "block", "row", "repetition")


def _cat(parts: list[Int]) -> Int:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _unroll_block(block: Block, number: int) -> dict[str, Int]:
    steps, n, times = block.steps, len(block.steps), block.repeat
    repetition = np.repeat(np.arange(times), n)
    columns = {
        k: np.tile(steps.column(k), times) for k in ("start", "unit", "opcode", "op", "bytes", "flops")
    }
    columns["start"] += block.start + repetition * block.period
    columns["end"] = columns["start"] + np.tile(steps.column("duration"), times)
    columns["block"] = np.full(n * times, number)
    columns["row"] = np.tile(np.arange(n), times)
    columns["repetition"] = repetition
    return columns


def _unroll_slices(block: Block, which: Side) -> list[Int]:
    """[step within the unrolled block, bound buffer, low, high], one row per access."""
    offsets, buffer, low, length = block.steps.slices(which)
    n, times, count = len(block.steps), block.repeat, len(buffer)
    step = np.repeat(np.arange(n), np.diff(offsets))
    repetition = np.repeat(np.arange(times), count)
    bound = np.tile(buffer, times)
    if block.bindings is not None and block.bindings.num_rows and count:
        slots, at, to = (np.asarray(block.bindings.column(k).to_numpy(), np.int64) for k in range(3))
        keys = slots * times + at
        order = np.argsort(keys)
        keys, to = keys[order], to[order]
        wanted = bound * times + repetition
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        bound = np.where(keys[found] == wanted, to[found], bound)
    return [np.tile(step, times) + repetition * n, bound, np.tile(low, times), np.tile(low + length, times)]


def _join(
    parts: list[list[Int]],
    base: Int,
    place: Int,
    columns: dict[str, Int],
    which: Side,
    timing: tuple[Int, Int] | None,
) -> Accesses:
    step = place[_cat([p[0] + b for p, b in zip(parts, base, strict=False)])]
    flat = [step] + [_cat([p[k] for p in parts]) for k in (1, 2, 3)]
    parts.clear()
    del step
    keep = np.flatnonzero(flat[3] > flat[2])
    keep = keep[np.argsort(flat[0][keep], kind="stable")]
    for k in range(4):
        flat[k] = flat[k][keep]
    step, buffer, low, high = flat
    del keep
    begin, end = columns["start"], columns["end"]
    if timing is not None:
        offset = timing[_SIDES.index(which)][columns["opcode"]]
        exact = columns["start"] + offset
        begin, end = np.where(offset >= 0, exact, begin), np.where(offset >= 0, exact, end)
    return Accesses(step, buffer, low, high, (begin, end))
