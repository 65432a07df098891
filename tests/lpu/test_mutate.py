"""The mutation operators change what they say, reproducibly, and the checks notice what is no mere change of
values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mapper.schedule.mutate import Mutation
from mapper.schedule.tables import Schedule
from mapper.schedule.validate import validate
from mapper_lpu.checks import CHECKS
from mapper_lpu.mutate import MUTATIONS
from tests.lpu.check_programs import good

VALUES_ONLY = {"swap_sub_operands", "vxm_opcode", "immediate", "permute_entry"}
"""Operators that leave a legal program which computes something else: only its output can show them."""

SILENT = {
    "type_code",
    "wrong_row",
    "swap_byte_planes",
    "load_group",
    "stream_number",
    "wrong_buffer",
    "swap_load_groups",
}
"""Operators of which single mutants may be legal programs."""


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return good().schedule()


def content(schedule: Schedule) -> tuple[list[Any], Any]:
    """All rows of all blocks, and the plan."""
    blocks = [b.steps.table.to_pylist() for p in schedule.programs.values() for b in p.blocks]
    return blocks, schedule.plan


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutants_are_well_formed_different_and_reproducible(mutation: Mutation, schedule: Schedule) -> None:
    before = content(schedule)
    for seed in range(4):
        mutant = mutation.apply(schedule, np.random.default_rng(seed))
        again = mutation.apply(schedule, np.random.default_rng(seed))
        assert mutant is not None and again is not None
        validate(mutant[0])
        assert content(mutant[0]) != before
        assert content(mutant[0]) == content(again[0])
        assert mutant[1] == again[1] != ""
    assert content(schedule) == before


@pytest.mark.parametrize(
    "mutation", [m for m in MUTATIONS if m.name not in VALUES_ONLY | SILENT], ids=lambda m: m.name
)
def test_checks_reject_structural_mutants(mutation: Mutation, schedule: Schedule) -> None:
    for seed in range(6):
        mutant = mutation.apply(schedule, np.random.default_rng(seed))
        assert mutant is not None
        assert any(check.run(mutant[0]) for check in CHECKS), mutant[1]


def test_operators_give_up_where_nothing_fits() -> None:
    a = good()
    a.steps = [s for s in a.steps if s["opcode"] == 0]
    reads = a.schedule()
    rng = np.random.default_rng(0)
    none = {m.name for m in MUTATIONS if m.apply(reads, rng) is None}
    assert {"drop_install", "other_alu", "permute_entry", "index_stream", "load_group", "immediate"} <= none


def test_at_least_eight_kinds_with_distinct_names() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 8
