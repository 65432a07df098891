"""Attention in runs of positions, and queries that are scaled by the position, on the host: Llama 4 at toy
widths (runs of 4 positions, a factor that grows at positions 2, 5, 8, ...), equal to onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mapper import driver
from mapper.ir.builder import GraphBuilder
from mapper.ir.reference import evaluate
from mapper.ir.types import TensorType
from mapper.ir.weights import WeightSymbol
from tests.gpu.common import toy
from tests.host.graphs import run


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-4-maverick"])
@pytest.mark.parametrize(
    ("weights", "batch", "prompt", "context"),
    [("f32", 1, 6, 20), ("f32", 2, 6, 20), ("bf16", 1, 6, 20), ("f32", 1, 40, 600)],
)
def test_equal_to_onnxruntime(
    name: str, weights: str, batch: int, prompt: int, context: int, tmp_path: Path
) -> None:
    """Also over a cache that is read in pieces."""
    made = driver.compile(
        toy(name, 4, tmp_path), "host", prompt=prompt, context=context, batch=batch, weights=weights,
        out=tmp_path / "s",
    )  # fmt: skip
    steps: Counter[str] = Counter()
    for block in made.programs["decode"].blocks:
        for opcode in block.steps.column("opcode"):
            steps[made.opcodes[opcode]] += block.repeat
    assert steps["attend_at"] == 4 and steps["embed_at"] == 1
    assert bool(steps["merge_splits"]) == (context == 600)
    found = driver.verify(tmp_path / "s", tokens=10)
    assert found.ok, found.failures
    assert found.max_rel_err < 1e-5


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_rows_are_scaled_along_any_axis(axis: int) -> None:
    shape = [2, 5, 5, 5]
    shape[axis] = 3
    rng = np.random.default_rng(0)
    b = GraphBuilder("one")
    x, past = b.input("x", TensorType.of(shape, "f32")), b.input("past", TensorType.of([], "i64"))
    b.weight(WeightSymbol.of("t", rng.standard_normal(9).astype(np.float32)))
    graph = b.finish({"y": b.add("scale_at", [x, past], {"table": "t", "axis": axis})})
    inputs = {"x": rng.standard_normal(shape).astype(np.float32), "past": np.array(4)}
    np.testing.assert_allclose(run(graph, inputs)["y"], evaluate(graph, inputs)["y"], rtol=1e-6)
