"""Every graph of the open corpus: loads and equals the stored outputs, or is refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from tests.frontend.corpus import FOLDER, ROOT, entries, worst

TOLERANCE = 1e-4
FULL = (
    "llama__dyn18-kv.onnx",
    "llama__dyn23-kv-sdpa.onnx",
    "gpt2__dyn18-kv.onnx",
    "gpt2__dyn23-kv-sdpa.onnx",
)
ROWS: list[tuple[Any, ...]] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints the table of results at the end (pytest -s)."""
    yield
    print(f"\n{'file':34} {'result':>9} {'recognised':>10} {'layers':>6} {'kinds':>5}  primitives left")
    for row in sorted(ROWS):
        print("{:34} {:>9} {:>10} {:>6} {:>5}  {}".format(*row))


def _names(models: list[dict[str, Any]]) -> list[str]:
    return [str(m["file"]) for m in models]


@pytest.mark.parametrize("name", _names(entries("compile")))
def test_runs_and_is_recognised(name: str) -> None:
    path = FOLDER / name
    graph = load(path)
    found = inspect(graph)
    apart = worst(graph, path)
    left = " ".join(f"{k}:{v}" for k, v in found["primitives_left"].items())
    fraction = found["recognised_fraction"]
    ROWS.append((name, f"{apart:.1e}", f"{fraction:.3f}", found["layers"], found["distinct_layers"], left))
    assert apart < (1e-3 if "int4" in name else TOLERANCE)
    assert fraction >= 0.95
    if name in FULL:
        assert fraction == 1.0 and found["primitives_left"] == {}
        assert (found["layers"], found["distinct_layers"]) == (2, 1)


@pytest.mark.parametrize("name", _names(entries("reject", "refuse")))
def test_negative_files_give_the_named_error(name: str) -> None:
    causes = {
        "ext_traversal": (ModelError, "outside the model's folder"),
        "cycle": (ModelError, "cycle"),
        "truncated": (ModelError, "truncated"),
        "conv_net": (UnsupportedModelError, "Conv"),
        "huge_dims": (ModelError, "overflows"),
        "mamba__ts17": (UnsupportedModelError, "Conv"),
    }
    kind, text = causes[Path(name).stem]
    with pytest.raises(kind, match=text) as caught:
        load(FOLDER / name)
    assert "\n" not in str(caught.value)


KINDS: dict[str, dict[str, int]] = {
    "deepseekv3__dyn18-kv": {"MLA": 3, "moe": 2, "gated_mlp": 3, "rope": 6},
    "gptoss__dyn18-kv": {"GQA": 2, "moe": 2, "rope": 4, "sinks": 2, "sliding": 1},
    "mixtral__dyn23-kv-sdpa": {"GQA": 2, "moe": 2, "rope": 4},
    "qwen3moe__dyn18-kv": {"GQA": 2, "moe": 2, "rope": 4},
    "phi3__dyn18-kv": {"GQA": 2, "packed_mlp": 2, "rope": 4},
    "llama__genai-int4": {"GQA": 2, "gated_mlp": 2, "rope": 4},
    "t5__ts17": {"MHA": 4, "cross": 2, "gated_mlp": 2},
    "whisper__dyn18": {"MHA": 4, "cross": 2, "mlp": 2},
    "bloom__ts17-kv": {"MHA": 2, "mlp": 2, "causal+alibi": 2},
}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no corpus here")
@pytest.mark.parametrize("name", KINDS)
def test_every_layer_has_its_kind(name: str) -> None:
    """Layers of each kind, as the exported configurations say."""
    found = inspect(load(FOLDER / f"{name}.onnx"))
    counts: Counter[str] = Counter()
    for item in found["attention"]:
        counts[item["kind"]] += item["layers"]
        for flag in ("sinks", "cross"):
            counts[flag] += item[flag] * item["layers"]
    for key, part in (("mask", "masks"), ("op", "mlp")):
        for item in found[part]:
            counts[item[key]] += item["layers"]
    counts["rope"] = sum(item["layers"] for item in found["rope"])
    wanted = KINDS[name]
    assert {k: counts[k] for k in wanted} == wanted


STRUCTURES: dict[str, dict[str, Any]] = {
    "llama": {"heads": 4, "kv_heads": 2, "head_dim": 24, "hidden": 64, "vocab": 112},
    "gpt2": {"heads": 4, "kv_heads": 4, "head_dim": 16, "hidden": 64, "vocab": 112},
    "qwen3": {"heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 64, "vocab": 112},
}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no corpus here")
@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize("export", ["dyn18-kv", "dyn23-kv-sdpa"])
def test_structure_is_the_same_from_both_exporters(family: str, export: str) -> None:
    found = inspect(load(FOLDER / f"{family}__{export}.onnx"))
    assert {k: found[k] for k in STRUCTURES[family]} == STRUCTURES[family]
    assert found["masks"] == [{"mask": "causal", "window": 0, "layers": 2}]


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no corpus here")
@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("mistral__dyn18-kv", [("sliding", 5, 2)]),
        ("gemma2__dyn18-kv", [("sliding", 4, 1), ("causal", 0, 1)]),
        ("gemma3__dyn23-kv-sdpa", [("sliding", 4, 2), ("causal", 0, 1)]),
        ("bert__dyn18", [("given", 0, 2)]),
    ],
)
def test_masks_are_classified_by_evaluation(name: str, masks: list[tuple[str, int, int]]) -> None:
    found = inspect(load(FOLDER / f"{name}.onnx"))
    assert [(m["mask"], m["window"], m["layers"]) for m in found["masks"]] == masks


@pytest.mark.parametrize("opset", [18, 23])
def test_the_example_model_is_recognised_completely(opset: int) -> None:
    path = ROOT / "examples" / f"tiny-llama-op{opset}.onnx"
    if not path.is_file():
        pytest.skip("the example model is not here")
    found = inspect(load(path))
    assert found["recognised_fraction"] == 1.0 and found["primitives_left"] == {}
    assert (found["layers"], found["distinct_layers"]) == (4, 1)
    assert (found["heads"], found["kv_heads"], found["head_dim"], found["hidden"]) == (8, 4, 32, 256)
    assert found["rope"][0]["theta"] == 10000.0
    assert found["tied_embeddings"] is True
