"""Mutation operators of this target: each breaks one rule of queues, waits, pages, tiles or cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mapper.schedule.edit import Place, Row, step_at, with_step
from mapper.schedule.mutate import Mutant, Mutation
from mapper.schedule.tables import Schedule

TRIES = 64
FIXED = 17
"""Immediates before the waits."""
_M0, _N0, _K0, _K1, _PAGE, _PAGES = 2, 4, 6, 7, 14, 13
Change = Callable[[Schedule, Place, Row, np.random.Generator], tuple[Row | None, str] | None]


@dataclass(frozen=True)
class OnTasks:
    """Changes one random task with an opcode among `opcodes` (empty: any)."""

    name: str
    change: Change
    opcodes: tuple[str, ...] = ()

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        for place in _places(schedule, rng, self.opcodes):
            row = step_at(schedule, place)
            done = self.change(schedule, place, row, rng)
            if done is not None:
                return with_step(schedule, place, done[0]), f"{place}: {done[1]}"
        return None


def _places(schedule: Schedule, rng: np.random.Generator, opcodes: tuple[str, ...]) -> list[Place]:
    wanted = [i for i, name in enumerate(schedule.opcodes) if not opcodes or name in opcodes]
    found = [
        Place(phase, b, int(row))
        for phase, program in schedule.programs.items() for b, block in enumerate(program.blocks)
        for row in np.flatnonzero(np.isin(block.steps.column("opcode"), wanted))
    ]  # fmt: skip
    return [found[i] for i in rng.permutation(len(found))[:TRIES]]


def _drop_wait(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = list(row["args"])
    count = args[FIXED]
    if not count:
        return None
    at = FIXED + 1 + 3 * int(rng.integers(count))
    gone = args[at]
    args = [*args[:FIXED], count - 1, *args[FIXED + 1 : at], *args[at + 3 :]]
    return {**row, "args": args}, f"no longer waits for counter {gone}"


def _change_count(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = list(row["args"])
    if not args[FIXED]:
        return None
    at = FIXED + 1 + 3 * int(rng.integers(args[FIXED]))
    repeat = schedule.programs[place.phase].blocks[place.block].repeat
    which = at + (2 if repeat > 1 or args[at] >= 0 else 1)
    args[which] += int(rng.choice([-1, 1]))
    return {**row, "args": args}, f"waits for {args[which]} signals of counter {args[at]}"


def _drop_signal(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = list(row["args"])
    at = FIXED + 1 + 3 * args[FIXED]
    if not args[at]:
        return None
    args = [*args[:at], args[at] - 1, *args[at + 1 : -1]]
    return {**row, "args": args}, "a signal dropped"


def _wrong_counter(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = list(row["args"])
    counters = int(schedule.plan["blocks"][place.phase][place.block]["counters"])
    at = FIXED + 1 + 3 * args[FIXED]
    if not args[at] or counters < 2:
        return None
    args[-1] = int((args[-1] + 1 + rng.integers(counters - 1)) % counters)
    return {**row, "args": args}, f"signals counter {args[-1]}"


def _page(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = list(row["args"])
    args[_PAGE] = 1 << 20
    return {**row, "args": args}, "pages outside of shared memory"


def _shift(low: int, high: int, words: str) -> Change:
    def change(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
        args = list(row["args"])
        width = args[high] - args[low]
        if width < 1:
            return None
        by = int(rng.choice([-1, 1])) * int(rng.integers(1, width + 1))
        if args[low] + by < 0:
            by = -by
        args[low] += by
        args[high] += by
        return {**row, "args": args}, f"{words} moved by {by}"

    return change


def _shrink(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = list(row["args"])
    if args[_K1] - args[_K0] < 2:
        return None
    args[_K1] -= 1
    return {**row, "args": args}, f"its stretch ends at {args[_K1]}"


def _other_chip(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    if schedule.chips < 2 or not row["reads"]:
        return None
    memory = schedule.buffers.column("memory").to_pylist()
    reads = list(row["reads"])
    k = int(rng.integers(len(reads)))
    b = reads[k]["buffer"]
    new = b + 1 if memory[b] + 1 < schedule.chips else b - 1
    reads[k] = {**reads[k], "buffer": new}
    return {**row, "reads": reads}, f"reads {k} from the memory of another chip"


def _faster(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    if row["duration"] < 4:
        return None
    return {**row, "duration": row["duration"] // 3}, "takes a third of its time"


@dataclass(frozen=True)
class SwapQueue:
    """Two tasks of different kernels on one SM change places in its queue."""

    name: str = "swap_queue"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        for place in _places(schedule, rng, ()):
            row = step_at(schedule, place)
            steps = schedule.programs[place.phase].blocks[place.block].steps
            offsets, flat = steps.args()
            kernel = flat[offsets[:-1] + 1]
            others = np.flatnonzero((steps.column("unit") == row["unit"]) & (kernel != row["args"][1]))
            if not len(others):
                continue
            other = Place(place.phase, place.block, int(rng.choice(others)))
            second = step_at(schedule, other)
            start = (row["start"], second["start"])
            mutant = with_step(schedule, place, {**row, "start": start[1]})
            moved = _find(mutant, other, second)
            mutant = with_step(mutant, moved, {**second, "start": start[0]})
            return mutant, f"{place} and row {other.row} change places in their queue"
        return None


def _find(schedule: Schedule, place: Place, row: Row) -> Place:
    steps = schedule.programs[place.phase].blocks[place.block].steps
    for i in range(len(steps)):
        here = Place(place.phase, place.block, i)
        if step_at(schedule, here) == row:
            return here
    raise LookupError("the row is gone")


@dataclass(frozen=True)
class MoveNode:
    """A node of the plan changes into another kernel."""

    name: str = "move_node"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        plan = copy.deepcopy(schedule.plan)
        blocks = [b for records in plan["blocks"].values() for b in records if len(b["kernels"]) > 2]
        if not blocks:
            return None
        kernels = blocks[rng.integers(len(blocks))]["kernels"]
        a = int(rng.integers(len(kernels)))
        b = (a + 2 + int(rng.integers(len(kernels) - 2))) % len(kernels)
        if abs(a - b) < 2:
            b = (a + 2) % len(kernels)
        node = kernels[a]["nodes"].pop(int(rng.integers(len(kernels[a]["nodes"]))))
        kernels[b]["nodes"].append(node)
        return replace(schedule, plan=plan), f"node {node['number']} moved from kernel {a} to kernel {b}"


@dataclass(frozen=True)
class BreakProgram:
    """An instruction of a program that some task runs is dropped."""

    name: str = "break_program"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        plan = copy.deepcopy(schedule.plan)
        programs = [p for found in plan["programs"].values() for p in found]
        p = programs[rng.integers(len(programs))]
        gone = p["code"].pop(int(rng.integers(len(p["code"]))))
        return replace(schedule, plan=plan), f"instruction {gone} of a {p['kind']} dropped"


def _shorten_stack(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    reads = list(row["reads"])
    k = max(range(len(reads)), key=lambda i: reads[i]["bytes"])
    cut = int(rng.integers(1, reads[k]["bytes"] // 2))
    reads[k] = {**reads[k], "bytes": reads[k]["bytes"] - cut}
    return {**row, "reads": reads}, f"a stack of experts ends {cut} bytes early"


@dataclass(frozen=True)
class FewerBlocks:
    """The plan says that experts' rows come in fewer, or in taller, blocks than they do."""

    name: str = "fewer_blocks"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        plan = copy.deepcopy(schedule.plan)
        kernels = [k for records in plan["blocks"].values() for b in records for k in b["kernels"]]
        found = [k["experts"] for k in kernels if "experts" in k]
        if not found:
            return None
        e = found[rng.integers(len(found))]
        if rng.integers(2):
            e["blocks"] -= 1
            return replace(schedule, plan=plan), f"{e['blocks']} blocks of experts"
        e["tokens"] += e["count"] * e["rows"]
        return replace(schedule, plan=plan), f"blocks of experts for {e['tokens']} tokens"


MUTATIONS: tuple[Mutation, ...] = (
    OnTasks("drop_wait", _drop_wait),
    OnTasks("change_count", _change_count),
    OnTasks("drop_signal", _drop_signal),
    OnTasks("wrong_counter", _wrong_counter),
    OnTasks("overlap_pages", _page),
    OnTasks("shift_split", _shift(_K0, _K1, "its stretch of the cache"), ("attention",)),
    OnTasks("shrink_split", _shrink, ("attention", "product")),
    OnTasks(
        "shift_tile",
        _shift(_N0, _N0 + 1, "its columns"),
        ("product", "product_merge", "attention", "experts"),
    ),
    OnTasks("shift_rows", _shift(_M0, _M0 + 1, "its rows")),
    OnTasks(
        "drop_reduction",
        lambda s, p, r, g: (None, "dropped"),
        ("product_merge", "attention_merge", "collective", "experts", "route"),
    ),
    OnTasks("other_chip", _other_chip),
    OnTasks("faster", _faster),
    SwapQueue(),
    MoveNode(),
    BreakProgram(),
    OnTasks("shorten_stack", _shorten_stack, ("experts",)),
    OnTasks("shift_blocks", _shift(_M0, _M0 + 1, "its blocks"), ("experts",)),
    FewerBlocks(),
)
"""The operators of this target."""
