"""Slices against coordinates and layouts: the check and the executor, which share no code, agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper.errors import ExecutionFault
from mapper.runtime.mutation import decoder_case, random_weights
from mapper.schedule.edit import Place, Row, step_at, with_step
from mapper.schedule.tables import Schedule
from mapper_gpu import BACKEND
from mapper_gpu.check_operands import OperandsNamed, SlicesPlaced
from tests.gpu.common import EXAMPLE, built, h100, toy

ELSEWHERE = re.compile(r"where its coordinates mean|slices of (reads|writes)|of a value \[")
"""What the executor says of slices that are not those of a task's coordinates."""


def example(model: Path = EXAMPLE, **options: object) -> Schedule:
    return built(model, prompt=6, context=10, **options).schedule


def places(schedule: Schedule) -> list[Place]:
    return [
        Place(phase, b, row)
        for phase, program in schedule.programs.items()
        for b, block in enumerate(program.blocks)
        for row in range(len(block.steps))
    ]


def edited(row: Row, rng: np.random.Generator) -> Row | None:
    """A row with one slice moved, cut, dropped or doubled, or other coordinates; None where it has none."""
    which = str(rng.choice(["reads", "writes"]))
    slices: list[Any] = list(row[which])
    how = int(rng.integers(6))
    if how > 3:
        args = list(row["args"])
        low = int(rng.choice([2, 4, 6]))
        moved = range(low, low + 2) if how == 4 else [low + int(rng.integers(2))]
        by = int(rng.choice([-16, -1, 1, 16]))
        for i in moved:
            args[i] += by
        return {**row, "args": args}
    if not slices:
        return None
    k = int(rng.integers(len(slices)))
    s = slices[k]
    if how == 0:
        slices[k] = (
            {**s, "offset": s["offset"] - 4} if s["offset"] else {**s, "offset": 4, "bytes": s["bytes"] - 4}
        )
    elif how == 1:
        slices[k] = {**s, "bytes": s["bytes"] - 4}
    elif how == 2:
        del slices[k]
    else:
        slices.insert(k, s)
    return {**row, which: slices}


def executed(schedule: Schedule) -> str:
    """The executor's fault on a schedule; "" where there is none."""
    weights = random_weights(schedule, np.random.default_rng(0))
    try:
        decoder_case(BACKEND.semantics(), 4)(schedule, weights, 0)
    except ExecutionFault as fault:
        return str(fault)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


CASES: dict[str, dict[str, Any]] = {
    "one chip": {},
    "two chips, several sequences": {"chips": 2, "batch": 2},
    "int4": {"weights": "int4"},
    "megakernel": {"machine": h100(True), "chips": 2},
    "two stages": {"chips": 2, "parallel": "tp=1,pp=2"},
}
TOYS: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3-30b-a3b": (2, {}),
    "gpt-oss-20b": (2, {}),
    "deepseek-v3": (4, {}),
    "mixtral-8x7b": (2, {"parallel": "dp=2,ep=2", "batch": 4}),
}


def agree(schedule: Schedule, seed: int, count: int) -> None:
    """The check and the executor say the same of `count` edited schedules."""
    rng = np.random.default_rng(seed)
    where = places(schedule)
    told = seen = 0
    while seen < count:
        place = where[rng.integers(len(where))]
        row = edited(step_at(schedule, place), rng)
        if row is None:
            continue
        mutant = with_step(schedule, place, row)
        fault = executed(mutant)
        if fault and not ELSEWHERE.search(fault):
            continue
        seen += 1
        found = SlicesPlaced().run(mutant)
        assert bool(found) == bool(fault), (place, row, fault, found)
        told += bool(found)
    assert count // 2 < told


@pytest.mark.parametrize("case", CASES)
def test_edited_slices_and_coordinates(case: str) -> None:
    agree(example(**CASES[case]), 3, 14)


@pytest.mark.parametrize("name", TOYS)
def test_edited_slices_of_experts_and_latent_attention(name: str, tmp_path: Path) -> None:
    layers, options = TOYS[name]
    agree(example(toy(name, layers, tmp_path), chips=2, **options), 4, 30)


def test_a_split_cache() -> None:
    """Stretches, sums and statistics of heads: slices of some tasks of each kind, cut by an element."""
    schedule = built(phase="decode", context=2048, chips=2).schedule
    rng = np.random.default_rng(1)
    for kind in ("attention", "attention_merge"):
        number = schedule.opcodes.index(kind)
        mine = [p for p in places(schedule) if step_at(schedule, p)["opcode"] == number]
        for i in rng.permutation(len(mine))[:8]:
            row = step_at(schedule, mine[i])
            for which in ("reads", "writes"):
                slices = list(row[which])
                k = int(rng.integers(len(slices)))
                slices[k] = {**slices[k], "bytes": slices[k]["bytes"] - 4}
                assert SlicesPlaced().run(with_step(schedule, mine[i], {**row, which: slices}))


@pytest.mark.parametrize("case", [{"chips": 2}, {"chips": 2, "parallel": "tp=1,pp=2"}])
def test_no_operand_is_passed_over(case: dict[str, Any]) -> None:
    """A slice that goes to the buffer of the operand before it: that one has two, its own has none."""
    schedule = example(**case)
    size = schedule.buffers.column("bytes").to_pylist()
    seen = 0
    for place in places(schedule)[::7]:
        row = step_at(schedule, place)
        reads = list(row["reads"])
        for k in range(1, len(reads)):
            before, mine = reads[k - 1]["buffer"], reads[k]
            if before == mine["buffer"] or size[before] < mine["offset"] + mine["bytes"]:
                continue
            changed = [*reads[:k], {**mine, "buffer": before}, *reads[k + 1 :]]
            mutant = with_step(schedule, place, {**row, "reads": changed})
            assert OperandsNamed().run(mutant)
            seen += 1
    assert seen > 20


def test_a_buffer_of_another_size_than_its_layout() -> None:
    """Layouts that are a panel wider than their buffers, where that moves no slice."""
    schedule = example()
    seen = 0
    for program in schedule.plan["programs"]["decode"]:
        for operand in (o for o in program["writes"] if o["c"] == "n"):
            kept = operand["width"]
            operand["width"] += operand["panel"]
            assert SlicesPlaced().run(schedule)
            operand["width"] = kept
            seen += 1
    assert seen > 5
    assert not SlicesPlaced().run(schedule)


def test_rows_that_are_not_there() -> None:
    """Rows behind an operand's last one: their bytes are those of the next panel, and inside the buffer."""
    schedule = example(chips=2, parallel="tp=1,pp=2")
    size = schedule.buffers.column("bytes").to_pylist()
    seen = 0
    for place in places(schedule):
        row = step_at(schedule, place)
        program = schedule.plan["programs"][place.phase][row["args"][0]]
        tiles = all((o["r"], o["c"]) == ("m", "n") for o in (*program["reads"], *program["writes"]))
        moved = {w: [{**s, "offset": s["offset"] + s["bytes"]} for s in row[w]] for w in ("reads", "writes")}
        inside = all(s["offset"] + s["bytes"] <= size[s["buffer"]] for w in moved.values() for s in w)
        if program["kind"] != "product_merge" or not tiles or not inside or seen == 6:
            continue
        args = list(row["args"])
        args[2:4] = [args[3], 2 * args[3]]
        mutant = with_step(schedule, place, {**row, **moved, "args": args})
        assert SlicesPlaced().run(mutant)
        assert ELSEWHERE.search(executed(mutant))
        seen += 1
    assert seen == 6


def test_runs_of_one_operand_in_two_buffers() -> None:
    """A panel's run that goes to another buffer of the same size."""
    schedule = built(prompt=300, context=310, phase="prefill").schedule
    size = schedule.buffers.column("bytes").to_pylist()
    seen = 0
    for place in places(schedule):
        row = step_at(schedule, place)
        program = schedule.plan["programs"][place.phase][row["args"][0]]
        last = row["writes"][-1]["buffer"]
        other = next((b for b, n in enumerate(size) if n == size[last] and b != last), None)
        if len(row["writes"]) == len(program["writes"]) or other is None or seen == 4:
            continue
        writes = [*row["writes"][:-1], {**row["writes"][-1], "buffer": other}]
        assert SlicesPlaced().run(with_step(schedule, place, {**row, "writes": writes}))
        seen += 1
    assert seen == 4
