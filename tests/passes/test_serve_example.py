"""The serving form of the example model against onnxruntime on the original files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from mapper.frontend.load import load
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.passes.serve import serve

Array = npt.NDArray[Any]
EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT, CONTEXT = 6, 10


class Oracle:
    """onnxruntime on the model file, keeping its own caches by role."""

    def __init__(self, path: Path, graph: Graph) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.graph = graph
        self.caches: dict[str, Array] = {}

    def step(self, ids: Array, past: int) -> Array:
        """Logits of the new tokens."""
        total, feeds = past + ids.shape[1], {}
        for name, kind in self.graph.inputs:
            role = self.graph.roles["inputs"][name]
            made: dict[str, Array] = {
                "token_ids": ids,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(past, total)[None],
            }
            if role.startswith("past."):
                empty = np.zeros((1, kind.shape[1].value, 0, kind.shape[3].value), np.float32)
                feeds[name] = self.caches.get(role.removeprefix("past."), empty)
            else:
                feeds[name] = made[role]
        names = [o.name for o in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feeds), strict=True))
        roles = self.graph.roles["outputs"]
        self.caches = {
            r.removeprefix("present."): outputs[n] for n, r in roles.items() if r.startswith("present.")
        }
        logits: Array = outputs[self.graph.outputs_with_role("logits")[0]]
        return logits


@pytest.mark.parametrize("name", ["tiny-llama-op18.onnx", "tiny-llama-op23.onnx"])
def test_example_model_serves_what_onnxruntime_computes(name: str) -> None:
    graph = load(EXAMPLES / name)
    oracle = Oracle(EXAMPLES / name, graph)
    prefill, decode = (serve(graph, phase, 1, PROMPT, CONTEXT) for phase in ("prefill", "decode"))
    assert [s.count for s in decode.sections()] == [1, graph.layers, 1]
    trained = json.loads((EXAMPLES / "training.json").read_text())["parameters"]
    assert decode.params == graph.params == trained
    ids = np.random.default_rng(7).integers(0, 1024, (1, CONTEXT))
    states = {n: np.full(t.ints, np.nan, t.numpy) for n, t in decode.inputs if n.startswith("cache.")}
    for past in [0, *range(PROMPT, CONTEXT)]:
        new = ids[:, past : past + (1 if past else PROMPT)]
        expected = oracle.step(new, past)
        served = decode if past else prefill
        found = evaluate(served, {"input_ids": new, "past_length": np.array(past), **states}, precision="f64")
        states = {n: v for n, v in found.items() if n != "logits"}
        np.testing.assert_allclose(found["logits"], expected, atol=2e-5 * np.abs(expected).max())
        for role, cache in oracle.caches.items():
            rows = states[f"cache.{role}"][:, :, : past + new.shape[1]]
            np.testing.assert_allclose(rows, cache, atol=2e-5 * np.abs(cache).max())
