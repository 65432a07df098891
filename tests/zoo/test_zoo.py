"""Every model of the zoo at toy widths: onnxruntime and kernels agree, and all of it is recognised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

import mapper
from mapper.errors import UsageError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.graph import Graph
from mapper.zoo.config import names, published, raw
from mapper.zoo.families import config, shortened, shows_all, tiny
from mapper.zoo.files import params, write

Array = npt.NDArray[Any]
TOLERANCE = 1e-4


def small(name: str, folder: Path) -> Path:
    """A toy of a model, with random weights."""
    made = tiny(config(name))
    file = folder / "toy.onnx"
    write(shortened(made, shows_all(made)), file, "f32", 7)
    return file


def feeds(graph: Graph, ids: Array, past: dict[str, Array], done: int) -> dict[str, Array]:
    """The inputs for new tokens after `done` ones."""
    batch, new = ids.shape
    places = np.broadcast_to(np.arange(done, done + new), ids.shape).copy()
    given = {
        "input_ids": ids,
        "position_ids": places,
        "attention_mask": np.ones((batch, done + new), np.int64),
    }
    for name, kind in graph.inputs:
        if name.startswith("past"):
            shape = (batch, kind.shape[1].value, 0, kind.shape[3].value)
            given[name] = past.get(name, np.zeros(shape, np.float32))
    return given


@pytest.mark.parametrize("name", names())
def test_toys_run_alike_everywhere(name: str, tmp_path: Path) -> None:
    file = small(name, tmp_path)
    graph = load(file)
    found = inspect(graph)
    assert found["recognised_fraction"] >= 0.95, found["primitives_left"]
    made = tiny(config(name))
    wanted = made.layers[: shows_all(made)]
    assert found["layers"] == len(wanted)
    kind = (
        "MLA"
        if made.latent
        else "MHA"
        if made.heads == made.kv_heads
        else "MQA"
        if made.kv_heads == 1
        else "GQA"
    )
    assert [a["kind"] for a in found["attention"]] == [kind] * len(found["attention"])
    counts: dict[str, int] = {}
    for item in found["mlp"]:
        counts[item["op"]] = counts.get(item["op"], 0) + item["layers"]
    assert counts.get("moe", 0) == sum(layer.experts is not None for layer in wanted)
    chunked = sum(layer.chunk > 0 for layer in wanted)
    assert sum(m["layers"] for m in found["masks"] if m["mask"] == "chunked") == chunked
    windows = {m["window"]: m["layers"] for m in found["masks"] if m["mask"] == "sliding"}
    assert windows == {
        w: n for w in {x.window for x in wanted} - {0} if (n := sum(x.window == w for x in wanted))
    }
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    past: dict[str, Array] = {}
    done = 0
    for new in (7, 1, 3):
        given = feeds(graph, rng.integers(0, made.vocab, (2, new)), past, done)
        expected = dict(zip((o.name for o in session.get_outputs()), session.run(None, given), strict=True))
        got = mapper.run(graph, given)
        for key, array in expected.items():
            scale = max(1.0, float(np.abs(array).max()))
            assert np.abs(got[key] - array).max() <= TOLERANCE * scale, key
        past = {k.replace("present", "past_key_values"): v for k, v in expected.items() if k != "logits"}
        done += new


@pytest.mark.parametrize("name", names())
def test_parameters_are_those_published(name: str) -> None:
    known = published(name)
    assert known.source
    off = abs(params(config(name)) / known.params - 1)
    assert off <= 0.005 or (name in ("kimi-k2", "llama-4-scout") and off < 0.02 and known.note)


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "deepseek-v3", "gpt-oss-20b", "llama-4-scout", "gemma-3-4b"]
)
def test_masks_and_positions_matter(name: str, tmp_path: Path) -> None:
    """Attention to the wrong tokens shows: another order of tokens, other logits."""
    file = small(name, tmp_path)
    graph = load(file)
    ids = np.random.default_rng(2).integers(0, 96, (1, 6))
    plain = mapper.run(graph, feeds(graph, ids, {}, 0))["logits"][0, -1]
    swapped = ids.copy()
    swapped[0, :2] = ids[0, 1::-1]
    other = mapper.run(graph, feeds(graph, swapped, {}, 0))["logits"][0, -1]
    assert np.abs(plain - other).max() > 0.01


def test_unknown_names_suggest_known_ones() -> None:
    with pytest.raises(UsageError, match=r"llama-3\.1-8b"):
        config("llama-3.1-8B")


def test_weights_are_the_same_for_a_seed_and_files_are_not_overwritten(tmp_path: Path) -> None:
    made = replace(tiny(config("gpt2")), layers=tiny(config("gpt2")).layers[:1])
    for name in ("a.onnx", "b.onnx"):
        write(made, tmp_path / name, "bf16", 3)
    first, second = (tmp_path / f"{n}.onnx.data" for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write(made, tmp_path / "a.onnx", "bf16", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "b.onnx", "b.onnx.data"]


def test_a_skeleton_reads_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    write(config("llama-3.1-8b"), file, "bf16", None)
    graph = load(file)
    assert graph.params == params(config("llama-3.1-8b"))
    assert (graph.layers, [p.name for p in tmp_path.iterdir()]) == (32, ["m.onnx"])


def test_every_entry_names_its_source() -> None:
    assert all(raw(name)["source"] for name in names())


# published scaling by model: Meta's, Google's, OpenAI's and DeepSeek's config.json
SCALED = {
    "llama3": {"llama-3.1-8b": 8, "llama-3.2-1b": 32, "llama-3.2-3b": 32, "llama-3.3-70b": 8},
    "linear": {"gemma-3-4b": 8, "gemma-3-27b": 8},
    "yarn": {"gpt-oss-20b": 32, "deepseek-v3": 40, "kimi-k2": 32},
    "": {"llama-3-8b": 1, "llama-2-7b": 1, "gemma-3-1b": 1, "qwen3-8b": 1},
}


@pytest.mark.parametrize(
    ("kind", "name", "factor"), [(k, n, f) for k, models in SCALED.items() for n, f in models.items()]
)
def test_rotary_embeddings_are_scaled_as_published(kind: str, name: str, factor: float) -> None:
    scalings = [layer.rope.scaling for layer in config(name).layers if layer.rope is not None]
    found = {(s.get("rope_type") or s["type"], s["factor"]) for s in scalings if s}
    assert found == ({(kind, factor)} if kind else set())
