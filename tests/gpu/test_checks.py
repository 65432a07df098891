"""Mutants die on every kind of schedule: two chips, both styles, split caches, several sequences."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.schedule.checks import run_checks
from mapper_gpu import BACKEND
from tests.gpu.common import built, h100, toy


@pytest.mark.parametrize(
    ("chips", "megakernel", "context", "count"), [(2, False, 10, 30), (1, True, 10, 30), (2, True, 10, 30)]
)
def test_mutants_die(chips: int, megakernel: bool, context: int, count: int) -> None:
    schedule = built(machine=h100(megakernel), chips=chips, prompt=6, context=context).schedule
    test = MutationTest(
        schedule,
        decoder_case(BACKEND.semantics(), context - 6),
        BACKEND.checks(),
        BACKEND.mutations(),
        seed=5,
    )
    report = test.run(count)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert report.equivalent_share <= 0.05


def test_mutants_of_a_split_cache_are_seen_by_the_checks_alone() -> None:
    """Operators of this target on a schedule with merges; execution is not needed to notice them."""
    import numpy as np

    schedule = built(phase="decode", context=2048).schedule
    rng = np.random.default_rng(0)
    for mutation in BACKEND.mutations():
        for _ in range(3):
            made = mutation.apply(schedule, rng)
            if made is None or mutation.name == "break_program":
                continue
            found = run_checks(made[0], BACKEND.checks())
            assert any(found.values()), (mutation.name, made[1])


def test_page_colours_and_orders() -> None:
    """A persistent kernel's neighbours in a queue have different pages; the graph style's need none."""
    import numpy as np

    schedule = built("zoo:llama-3.1-8b", machine=h100(True), phase="decode", context=64).schedule
    block = schedule.programs["decode"].blocks[1]
    offsets, flat = block.steps.args()
    page, pages, unit = flat[offsets[:-1] + 14], flat[offsets[:-1] + 13], block.steps.column("unit")
    order = np.lexsort((block.steps.column("start"), unit))
    seen = 0
    for a, b in pairwise(order):
        if unit[a] == unit[b]:
            seen += 1
            assert page[a] + pages[a] <= page[b] or page[b] + pages[b] <= page[a]
    assert seen > 10


@pytest.mark.parametrize(
    ("name", "layers", "chips", "megakernel"),
    [("qwen3-30b-a3b", 2, 1, False), ("qwen3-30b-a3b", 2, 2, True), ("deepseek-v3", 4, 2, False)],
)
def test_mutants_of_experts_die(name: str, layers: int, chips: int, megakernel: bool, tmp_path: Path) -> None:
    model = toy(name, layers, tmp_path)
    schedule = built(model, machine=h100(megakernel), chips=chips, prompt=6, context=10).schedule
    case = decoder_case(BACKEND.semantics(), 4)
    report = MutationTest(schedule, case, BACKEND.checks(), BACKEND.mutations(), seed=5).run(54)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert report.equivalent_share <= 0.05
