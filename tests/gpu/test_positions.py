"""Attention in runs of positions, and queries that are scaled by the position: Llama 4 at toy widths (runs of
4 positions, a factor that grows at positions 2, 5, 8, ...), executed on poisoned memories, equal to
onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper import driver
from mapper.errors import LoweringError
from mapper.ir.reference import evaluate
from mapper.passes.serve import serve
from mapper.runtime.execute import Session
from mapper.schedule.store import save
from mapper.schedule.tables import Phase
from mapper_gpu import BACKEND, flash
from mapper_gpu.triton_scope import refuse_unknown
from tests.gpu.common import built, h100, toy
from tests.ir.models import Sizes, llama

MODELS = ("llama-4-scout", "llama-4-maverick")
PROMPT, TOKENS, CONTEXT = 6, 10, 20
DEGREES = (("", 1, 1), ("tp=2", 2, 1), ("dp=2,ep=2", 2, 2), ("tp=2,dp=2,ep=2", 4, 2))


def agrees(model: Path, folder: Path, **options: Any) -> driver.Compiled:
    """Prompt and decoded tokens go over the end of several runs, and over several steps of the factor."""
    options = {"prompt": PROMPT, "context": CONTEXT, **options}
    done = built(model, out=folder / "s", **options)
    found = driver.verify(folder / "s", tokens=TOKENS)
    assert found.ok, found.failures
    assert "weights" in options or found.max_rel_err < 1e-5
    for phase, estimate in done.result.phases.items():
        assert estimate.ratio >= 1, (phase, estimate.bound)
    return done


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("parallel", "chips", "batch"), DEGREES)
def test_equal_to_onnxruntime(name: str, parallel: str, chips: int, batch: int, tmp_path: Path) -> None:
    agrees(toy(name, 4, tmp_path), tmp_path, parallel=parallel, chips=chips, batch=batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("parallel", "chips", "batch"), [("", 1, 1), ("dp=2,ep=2", 2, 2)])
def test_as_a_megakernel_in_bf16(name: str, parallel: str, chips: int, batch: int, tmp_path: Path) -> None:
    """Between replicas rows pass before they are weighed, in float32."""
    model, machine = toy(name, 4, tmp_path), h100(True)
    agrees(model, tmp_path, machine=machine, weights="bf16", parallel=parallel, chips=chips, batch=batch)


def test_in_a_pipeline(tmp_path: Path) -> None:
    agrees(toy("llama-4-maverick", 8, tmp_path), tmp_path, parallel="tp=1,pp=2", chips=2)


def test_runs_across_tiles_of_queries_and_stretches_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of several tiles; a cache that is read in stretches, most of which a query sees nothing of."""
    monkeypatch.setattr(flash, "KEY_SPLITS", (3,))
    flash.choose.cache_clear()
    done = agrees(toy("llama-4-scout", 4, tmp_path), tmp_path, prompt=70, context=300)
    flash.choose.cache_clear()
    kernels = [
        k for p in ("prefill", "decode") for b in done.schedule.plan["blocks"][p] for k in b["kernels"]
    ]
    found = [(k["attention"]["chunk"], k["split"]["splits"]) for k in kernels if "attention" in k]
    assert {c for c, _ in found} == {0, 4}
    assert {n for _, n in found} == {3}


def _programs(plan: Any) -> Iterator[Any]:
    for phase in ("prefill", "decode"):
        yield from plan["programs"][phase]


@pytest.mark.parametrize("what", ["attend", "scale"])
def test_a_schedule_without_it_is_not_equal(what: str, tmp_path: Path) -> None:
    """The toys show runs and factors: attention to all positions, or a factor of 1, changes the logits."""
    done = built(toy("llama-4-scout", 4, tmp_path), prompt=PROMPT, context=CONTEXT)
    plan, changed = copy.deepcopy(done.schedule.plan), 0
    for i in (i for program in _programs(plan) for i in program["code"] if i[0] == what):
        if what == "attend" and len(i) == 16:
            i[15], changed = 1 << 30, changed + 1
        elif what == "scale":
            i[:], changed = ["concat", i[1], [i[2]]], changed + 1
    assert changed >= 2
    save(replace(done.schedule, plan=plan), tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=TOKENS)
    assert not found.ok and found.max_rel_err > 1e-3


def test_neither_has_triton_source(tmp_path: Path) -> None:
    done = built(toy("llama-4-scout", 4, tmp_path), prompt=PROMPT, context=CONTEXT)
    refused = set()
    for program in _programs(done.schedule.plan):
        try:
            refuse_unknown(program)
        except LoweringError as error:
            refused.add(str(error))
    assert {e for e in refused if "'scale'" in e} and {e for e in refused if "'attend' of 15 operands" in e}


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (5, 0), (0, 4), (3, 4), (9, 4), (0, 64)])
def test_what_the_mask_lets_through_by_hand(window: int, chunk: int) -> None:
    rng = np.random.default_rng(window + 100 * chunk)
    for _ in range(60):
        tokens, past = int(rng.integers(1, 12)), int(rng.integers(0, 30))
        a = flash.Attention(1, 4, 2, 16, 16, tokens, past, past + tokens, 2.0, "bf16", window, chunk)
        first = int(rng.integers(tokens))
        last = int(rng.integers(first, tokens)) + 1
        low = int(rng.integers(a.length))
        high = int(rng.integers(low, a.length)) + 1
        seen = np.array([
            [
                t <= p and (not window or t > p - window) and (not chunk or t // chunk == p // chunk)
                for t in range(low, high)
            ]
            for p in range(past + first, past + last)
        ])  # fmt: skip
        assert flash.visible(a, first, last, low, high) == seen.sum()
        rows = np.flatnonzero(seen.any(0))
        assert flash.stretch(a, first, last, low, high) == (rows[-1] - rows[0] + 1 if len(rows) else 0)


def test_scout_reads_the_run_that_the_last_position_is_in() -> None:
    """Runs of 8192 positions (its config.json): at 12000 three of four layers read 12000 - 8192 rows."""
    done = built("zoo:llama-4-scout", chips=8, phase="decode", context=12000)
    kernels = [k for b in done.schedule.plan["blocks"]["decode"] for k in b["kernels"] if "attention" in k]
    # one key/value head of 128 + 128 columns on each chip, in 16 bits
    assert {round(k["hbm_bytes"] / (2 * 256)) for k in kernels} == {12000 - 8192, 12000}
    assert done.result.phases["decode"].ratio >= 1


@pytest.mark.parametrize("tuned", ["queries", "before", "rows"])
@pytest.mark.parametrize(("batch", "chips"), [(2, 1), (1, 2)])
def test_factors_wherever_a_graph_has_them(tuned: str, batch: int, chips: int) -> None:
    """On queries, on heads that are not in front of the tokens yet, and on whole rows; also beside a
    rotation. Expected is the serving form's reference."""
    graph = llama(Sizes(layers=2, vocab=62, tuned=tuned, chunk=3))
    done = driver.build(graph, "gpu", batch=batch, prompt=5, context=12, chips=chips)
    assert not any(done.report.violations.values())
    session = Session(done.schedule, BACKEND.semantics(), graph.folder)
    ids = np.random.default_rng(0).integers(0, 61, (batch, 8))
    states = {p.name: np.zeros(p.shape, np.float32) for p in session.ports("state")}
    for past, tokens in ((0, 5), (5, 1), (6, 1), (7, 1)):
        phase: Phase = "decode" if past else "prefill"
        given = {"input_ids": ids[:, past : past + tokens], "past_length": np.array(past)}
        expected = evaluate(serve(graph, phase, batch, 5, 12), {**given, **states})
        states = {n: v for n, v in expected.items() if n != "logits"}
        found = session.run(phase, given)["logits"]
        np.testing.assert_allclose(found, expected["logits"], rtol=1e-4, atol=1e-4)
