"""The mutation test on the hand-written schedule: nearly all mutants die, and survivors are explained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mapper.runtime.execute import Session
from mapper.runtime.mutation import MutationTest
from mapper.schedule import equivalence
from mapper.schedule.edit import Place, step_at, with_buffer, with_step
from mapper.schedule.mutate import SHARED
from mapper.schedule.tables import Schedule
from tests.schedule import toy


def execute(schedule: Schedule, weights: Any, number: int) -> dict[str, Any]:
    session = Session(schedule, toy.ToySemantics(), weights=weights.__getitem__)
    x = np.random.default_rng(number).standard_normal(toy.N).astype(np.float32)
    return {**session.run("decode", {"x": x}), "acc": session.state("acc")}


def test_mutants_die() -> None:
    report = MutationTest(toy.schedule(), execute).run(330)
    print(report.table())
    assert len(report.kinds()) >= 10
    assert report.kill_rate() >= 0.95, report.survivors
    assert report.equivalent_share <= 0.05


def test_the_same_seed_gives_the_same_mutants() -> None:
    first = MutationTest(toy.schedule(), execute, seed=5).run(40)
    assert first == MutationTest(toy.schedule(), execute, seed=5).run(40)
    assert first != MutationTest(toy.schedule(), execute, seed=6).run(40)


def test_the_runner_sees_a_hole() -> None:
    # the test compares nothing of the state: dropping its update must be reported as survived
    def careless(schedule: Schedule, weights: Any, number: int) -> dict[str, Any]:
        out = execute(schedule, weights, number)
        return {"y": out["y"]}

    made = toy.schedule()
    report = MutationTest(replace(made, ops=made.ops.slice(0, 0), programs=_untied(made)), careless).run(200)
    assert report.count("survived") > 0


def _untied(made: Schedule) -> Any:
    for place in (Place("decode", b, r) for b, n in enumerate((1, 2, 2)) for r in range(n)):
        made = with_step(made, place, {**step_at(made, place), "op": -1})
    return made.programs


def test_equivalent_mutants_are_classed_without_running_them() -> None:
    made = toy.schedule()
    tail, acc = Place("decode", 2, 1), Place("decode", 2, 0)
    later = with_step(made, tail, {**step_at(made, tail), "start": 3})
    assert equivalence.classify(made, later, "shift_cycle") == "slack"
    assert (
        equivalence.classify(made, with_buffer(made, toy.T, {"offset": 1024}), "overlap_lifetimes") == "slack"
    )

    row = step_at(made, acc)
    swapped = with_step(made, acc, {**row, "reads": row["reads"][::-1]})
    assert equivalence.classify(made, swapped, "swap_operands") == "equal operand"
    assert equivalence.classify(replace(made, plan={}), replace(swapped, plan={}), "swap_operands") is None

    dropped = with_step(made, acc, None)
    assert equivalence.classify(made, dropped, "drop_step") is None
    stateless = tuple(p for p in made.ports if p.name != "acc")
    a, b = replace(made, ports=stateless), replace(dropped, ports=stateless)
    assert equivalence.classify(a, b, "drop_step") == "dead value"
    assert equivalence.classify(replace(a, plan={"exact_time": True}), b, "drop_step") is None


def test_operators_leave_the_original_alone() -> None:
    made, again = toy.schedule(), toy.schedule()
    rng = np.random.default_rng(0)
    for operator in SHARED:
        for _ in range(5):
            operator.apply(made, rng)
    assert made.buffers.equals(again.buffers)
    for a, b in zip(made.programs["decode"].blocks, again.programs["decode"].blocks, strict=True):
        assert a.steps.table.equals(b.steps.table)
    assert np.array_equal(made.constants["start"], again.constants["start"])


def test_operands_commute_by_opcode_or_by_first_argument() -> None:
    made = toy.schedule()
    name, other = made.opcodes[:2]
    for names, args, expected in (
        ([name], [], True),
        ([f"{name} 2"], [2, 7], True),
        ([f"{name} 2"], [1, 2], False),
        ([f"{name} 2"], [], False),
        ([other], [2], False),
    ):
        assert equivalence.commutes(replace(made, plan={"commutative": names}), 0, args) == expected
    assert not equivalence.commutes(replace(made, plan=None), 0, [2])
