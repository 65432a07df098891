"""Which other experts rounding can choose: against an exhaustive search over errors; NumPy's passes against
onnxruntime."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper.forward import Formats, Forward, Routed, StoredForward
from mapper.frontend.load import load
from mapper.ir.op import DataflowOp
from mapper.ir.reference_experts import best_of
from mapper.near_ties import choices, near_ties
from mapper.passes.unroll import Unroll
from mapper.runtime.inputs import interface
from mapper.runtime.oracle import oracle
from mapper.zoo import families, files
from tests.frontend import tiny

Array = npt.NDArray[Any]
ROUTERS = ("mixtral-8x7b", "gpt-oss-20b", "deepseek-v3")


def toy(name: str, folder: Path) -> Path:
    layers = 4 if name == "deepseek-v3" else 2
    path = folder / f"{name}.onnx"
    files.write(families.shortened(families.tiny(families.config(name)), layers), path, "f32", seed=3)
    return path


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> DataflowOp:
    graph = Unroll().apply(load(toy("deepseek-v3", tmp_path_factory.mktemp("router"))))
    return next(op for op in graph.top() if op.mnemonic == "route")


@pytest.mark.parametrize("seed", range(6))
def test_near_ties_are_what_errors_of_that_size_can_choose(grouped: DataflowOp, seed: int) -> None:
    """Every one is chosen by some error within the limit, and every choice that errors of one size in all
    corners make, and that differs from the own one in an expert, is among them."""
    experts = 8
    assert grouped.attr("groups") > 1
    scores = np.round(np.random.default_rng(seed).random((1, experts)), 2)
    own, error = best_of(grouped, scores[0]), 0.02
    found = near_ties(
        [Routed(grouped, scores, own[None])], [Routed(grouped, scores + error / 4, own[None])], 4
    )
    corners = {
        frozenset(best_of(grouped, scores[0] + 1.0001 * error * np.array(signs)).tolist())
        for signs in product((-1, 1), repeat=experts)
    }
    sets = {frozenset(t.experts) for t in found}
    assert len(sets) == len(found) and frozenset(own.tolist()) not in sets
    assert sets <= corners
    swaps = {c for c in corners if len(c - frozenset(own.tolist())) == 1}
    assert bool(sets) == bool(swaps)


def test_distant_scores_have_no_near_ties(grouped: DataflowOp) -> None:
    scores = np.linspace(0, 1, 8)[None]
    routed = Routed(grouped, scores, best_of(grouped, scores[0])[None])
    assert near_ties([routed], [Routed(grouped, scores + 1e-4, routed.index)], 4) == []


@pytest.mark.parametrize("name", [*ROUTERS, "gemma-2-9b", "gpt2", "slopes"])
def test_passes_equal_onnxruntime(name: str, tmp_path: Path) -> None:
    """Experts, sinks, absorbed latent attention, soft caps, slopes: in float64, and in float32."""
    slopes = tiny.Options(alibi=True, gated=False, act="gelu")
    path = tiny.saved(tiny.decoder(slopes), tmp_path) if name == "slopes" else toy(name, tmp_path)
    graph = load(path)
    names = interface(graph.roles)
    shapes = {e: (1, *(d.value if d.is_const else 1 for d in dict(graph.inputs)[n].shape[1:]))
              for e, n in names.past.items()}  # fmt: skip
    beside = oracle(path, names, shapes)
    ids = np.random.default_rng(5).integers(0, 50, (1, 7))
    given = beside.inputs(ids, 0, {})
    wanted = beside.run(given)
    unrolled = Unroll().apply(graph.chosen(given))
    exact = Forward(unrolled)
    made = exact.run(given, list(wanted))
    near = StoredForward(unrolled, formats=Formats("float32")).run(given, list(wanted), choices(exact.routed))
    for output, array in wanted.items():
        size = float(np.abs(array).max())
        np.testing.assert_allclose(made[output], array, rtol=0, atol=3e-5 * size)
        np.testing.assert_allclose(near[output], array, rtol=0, atol=3e-5 * size)
        assert made[output].dtype == np.float64
