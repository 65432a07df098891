"""Names and node order carry no meaning: renamed and reordered files give the same structure and results."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import onnx
import pytest

from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from tests.frontend.corpus import FOLDER, difference, runs

NAMES = (
    "llama__dyn18-kv",
    "llama__dyn23-kv-sdpa",
    "gpt2__dyn18-kv",
    "gpt2__dyn23-kv-sdpa",
    "gemma3__dyn18-kv",
)


def renamed(model: onnx.ModelProto, rng: random.Random) -> dict[str, str]:
    """Renames every value, node, input and output to a random name, in place; gives old -> new."""
    graph = model.graph
    names = {v.name for v in [*graph.input, *graph.output, *graph.initializer]}
    names |= {n for node in graph.node for n in [*node.input, *node.output] if n}
    numbers = list(range(len(names)))
    rng.shuffle(numbers)
    new = {old: f"t{numbers[i]}" for i, old in enumerate(sorted(names))}
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.name = new[value.name]
    del graph.value_info[:]
    for index, node in enumerate(graph.node):
        node.name = f"k{rng.random()}{index}"
        node.doc_string = ""
        del node.metadata_props[:]
        for names_of in (node.input, node.output):
            names_of[:] = [new[n] if n else "" for n in names_of]
    return new


def reordered(model: onnx.ModelProto, rng: random.Random) -> None:
    """Puts the nodes into a random topological order, in place, and shuffles the initializers."""
    nodes = list(model.graph.node)
    known = {v.name for v in [*model.graph.input, *model.graph.initializer]} | {""}
    order: list[onnx.NodeProto] = []
    while nodes:
        ready = [n for n in nodes if all(i in known for i in n.input)]
        chosen = rng.choice(ready)
        nodes.remove(chosen)
        order.append(chosen)
        known.update(chosen.output)
    tensors = list(model.graph.initializer)
    rng.shuffle(tensors)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(order)
    model.graph.initializer.extend(tensors)


def structure(found: dict[str, Any]) -> dict[str, Any]:
    """An inspection without names."""
    kept = {k: v for k, v in found.items() if k not in ("name", "inputs", "outputs")}
    return kept | {
        "roles": sorted(v["role"] for v in [*found["inputs"].values(), *found["outputs"].values()])
    }


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no corpus here")
@pytest.mark.parametrize("name", NAMES)
def test_names_and_order_do_not_matter(name: str, tmp_path: Path) -> None:
    source = FOLDER / f"{name}.onnx"
    model, rng = onnx.load(source), random.Random(name)
    new = renamed(model, rng)
    reordered(model, rng)
    path = tmp_path / "variant.onnx"
    path.write_bytes(model.SerializeToString())
    graph, original = load(path), load(source)
    assert structure(inspect(graph)) == structure(inspect(original))
    roles = original.roles["inputs"] | original.roles["outputs"]
    assert {new[k]: v for k, v in roles.items()} == graph.roles["inputs"] | graph.roles["outputs"]
    for run in runs(source).values():
        got = evaluate(graph, {new[k]: v for k, v in run["in"].items()})
        for key, expected in run["ort"].items():
            assert difference(got[new[key]], expected, run.get("compare_mask", {}).get("")) < 1e-4
