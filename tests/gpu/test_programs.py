"""Programs of tasks: none of their instructions can be left out, and no register mistaken."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mapper.schedule.tables import Schedule
from mapper_gpu.check_operands import ProgramsWhole
from tests.gpu.common import EXAMPLE, built, toy


def edited(schedule: Schedule, phase: str, number: int, code: list[Any]) -> Schedule:
    """The schedule with other instructions in a program."""
    plan = {**schedule.plan, "programs": copy.copy(schedule.plan["programs"])}
    programs = list(plan["programs"][phase])
    programs[number] = {**programs[number], "code": code}
    plan["programs"][phase] = programs
    return replace(schedule, plan=plan)


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("", 0, {"chips": 2}),
    "a split cache": ("", 0, {"chips": 2, "context": 2048, "prompt": 40}),
    "int4": ("", 0, {"weights": "int4"}),
    "two stages": ("", 0, {"chips": 2, "parallel": "tp=1,pp=2"}),
    "sinks and biases": ("gpt-oss-20b", 2, {"chips": 2}),
    "latent attention": ("deepseek-v3", 4, {"chips": 2}),
    "experts with owners": ("mixtral-8x7b", 2, {"chips": 2, "parallel": "dp=2,ep=2", "batch": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_instruction_can_be_left_out(case: str, tmp_path: Path) -> None:
    """Each one of every program is dropped."""
    name, layers, options = CASES[case]
    model = toy(name, layers, tmp_path) if name else EXAMPLE
    schedule = built(model, **{"prompt": 6, "context": 10, **options}).schedule
    check = ProgramsWhole()
    assert not check.run(schedule)
    for phase, programs in schedule.plan["programs"].items():
        for number, program in enumerate(programs):
            code = program["code"]
            for i, instruction in enumerate(code):
                dropped = edited(schedule, phase, number, [*code[:i], *code[i + 1 :]])
                assert check.run(dropped), (phase, number, instruction)


def test_registers_that_nothing_has_filled() -> None:
    schedule = built(prompt=6, context=10).schedule
    for number, program in enumerate(schedule.plan["programs"]["decode"]):
        for i, (op, *rest) in enumerate(program["code"]):
            if op == "write":
                code = [*program["code"][:i], [op, rest[0], "r99"], *program["code"][i + 1 :]]
                assert ProgramsWhole().run(edited(schedule, "decode", number, code))
