"""Dropped waits: the check of dependences against the order of all tasks of a program, unrolled."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper.schedule.edit import Place, step_at, with_step
from mapper.schedule.tables import Schedule
from mapper_gpu.check_waits import DependencesWaited
from tests.gpu.common import built, h100, toy

WAITS = 17
"""Immediates before the number of waits."""
Counter = tuple[int, int]
"""(instance of a block, its counter)."""


@dataclass
class Task:
    """A task of one repetition: (block, row), when and where it runs, the counters that it waits for and
    raises, what it uses as (buffer, low, high, written)."""

    place: tuple[int, int]
    start: int
    unit: int
    waits: list[Counter | None] = field(default_factory=list)
    raises: list[Counter] = field(default_factory=list)
    uses: list[tuple[int, int, int, bool]] = field(default_factory=list)


def unrolled(schedule: Schedule, phase: str) -> list[Task]:
    """All tasks of a program, in every repetition."""
    tasks: list[Task] = []
    counters: list[int] = []
    records = schedule.plan["blocks"][phase]
    for number, (block, record) in enumerate(zip(schedule.programs[phase].blocks, records, strict=True)):
        steps = block.steps.table.to_pylist()
        bindings = [] if block.bindings is None else block.bindings.to_pylist()
        to = {(b["slot"], b["repetition"]): b["buffer"] for b in bindings}
        for r in range(block.repeat):
            here = len(counters)
            counters.append(int(record["counters"]))
            for row, step in enumerate(steps):
                args = step["args"]
                task = Task((number, row), block.start + r * block.period + step["start"], step["unit"])
                end = WAITS + 1 + 3 * args[WAITS]
                for c in args[WAITS + 1 : end : 3]:
                    # a negative one is counted from the end of those of the block, or repetition, before
                    before = (here - 1, counters[here - 1] + c) if here else None
                    task.waits.append((here, c) if c >= 0 else before)
                task.raises = [(here, c) for c in args[end + 1 : end + 1 + args[end]]]
                for which in ("reads", "writes"):
                    task.uses += [
                        (to.get((s["buffer"], r), s["buffer"]), s["offset"], s["offset"] + s["bytes"],
                         which == "writes") for s in step[which]
                    ]  # fmt: skip
                tasks.append(task)
    return tasks


class Order:
    """Which tasks are over before which: those before in a queue, and those that raise what is waited for.
    Sets of tasks are the bits of a number."""

    def __init__(self, schedule: Schedule, phase: str) -> None:
        self.tasks = unrolled(schedule, phase)
        self.by_start = sorted(range(len(self.tasks)), key=lambda i: (self.tasks[i].start, i))
        self.raisers: dict[Counter, list[int]] = defaultdict(list)
        for i, task in enumerate(self.tasks):
            for c in task.raises:
                self.raisers[c].append(i)
        self.clashes = [0] * len(self.tasks)
        users: dict[int, list[tuple[int, int, int, bool]]] = defaultdict(list)
        for i, task in enumerate(self.tasks):
            for buffer, low, high, written in task.uses:
                users[buffer].append((i, low, high, written))
        for found in users.values():
            of, low, high, written = np.array(found).T
            for i, a, b, w in found:
                near = (low < b) & (high > a) & (of != i) & ((written == 1) | w)
                for j in set(of[near].tolist()):
                    self.clashes[i] |= 1 << j

    def races(self, dropped: tuple[int, int, int] | None = None) -> bool:
        """Whether two tasks that clash are in no order; of a task (block, row) a wait may be dropped."""
        before = [0] * len(self.tasks)
        last: dict[int, int] = {}
        over: dict[Counter, int] = {}
        for i in self.by_start:
            task = self.tasks[i]
            mine = last.get(task.unit, 0)
            for k, c in enumerate(task.waits):
                if c is None or (*task.place, k) == dropped:
                    continue
                if c not in over:
                    over[c] = 0
                    for j in self.raisers[c]:
                        over[c] |= before[j] | 1 << j
                mine |= over[c]
            before[i] = mine
            last[task.unit] = mine | 1 << i
        seen = 0
        for i in self.by_start:
            if self.clashes[i] & seen & ~before[i]:
                return True
            seen |= 1 << i
        return False


def without(schedule: Schedule, place: Place, k: int) -> Schedule:
    """A schedule without the wait k of a task."""
    row = step_at(schedule, place)
    args, at = list(row["args"]), WAITS + 1 + 3 * k
    args = [*args[:WAITS], args[WAITS] - 1, *args[WAITS + 1 : at], *args[at + 3 :]]
    return with_step(schedule, place, {**row, "args": args})


def compared(schedule: Schedule, most: int) -> tuple[int, int]:
    """(dropped waits that make a race, others), of up to `most` per program: the check finds all of the
    first. It may find others, because it does not conclude from a task being over that those before it in
    its queue are."""
    rng = np.random.default_rng(2)
    harmful = harmless = 0
    for phase, program in schedule.programs.items():
        order = Order(schedule, phase)
        assert not order.races()
        every = [
            (b, row, k)
            for b, block in enumerate(program.blocks)
            for row, step in enumerate(block.steps.table.to_pylist())
            for k in range(step["args"][WAITS])
        ]
        for i in rng.permutation(len(every))[:most]:
            b, row, k = every[i]
            found = DependencesWaited().run(without(schedule, Place(program.phase, b, row), k))
            races = order.races(every[i])
            assert found or not races, every[i]
            harmful += races
            harmless += not found
    return harmful, harmless


@pytest.mark.parametrize(("chips", "megakernel"), [(1, False), (2, False), (2, True)])
def test_dropped_waits(chips: int, megakernel: bool) -> None:
    made = built(machine=h100(megakernel), chips=chips, prompt=6, context=10).schedule
    harmful, harmless = compared(made, 40)
    assert harmful > 20
    assert harmless or not megakernel


@pytest.mark.parametrize(
    ("name", "layers", "megakernel", "options"),
    [
        ("qwen3-30b-a3b", 2, True, {}),
        ("gpt-oss-20b", 2, False, {}),
        ("deepseek-v3", 4, True, {}),
        ("mixtral-8x7b", 2, True, {"parallel": "dp=2,ep=2", "batch": 2}),
    ],
)
def test_dropped_waits_of_experts(
    name: str, layers: int, megakernel: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    """In a persistent kernel a task waits for each of its operands: some are over anyway, but where experts
    have owners."""
    model, machine = toy(name, layers, tmp_path), h100(megakernel)
    made = built(model, machine=machine, chips=2, prompt=6, context=10, **options).schedule
    harmful, harmless = compared(made, 60)
    assert harmful > 20
    assert harmless or options
