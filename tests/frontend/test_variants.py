"""Names and node order carry no meaning: renamed and reordered files give the same structure and results."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from tests.frontend.corpus import FOLDER, difference, entries, runs
from tests.frontend.tiny import Options, decoder, feeds, oracle, saved, worst

NAMES = tuple(m["file"].removesuffix(".onnx") for m in entries("compile"))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among a node's attributes."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def everywhere(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their sub-graphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from everywhere(graph.node)


def graphs_in(nodes: Iterable[onnx.NodeProto]) -> list[onnx.GraphProto]:
    """All sub-graphs of some nodes, those inside of sub-graphs too."""
    return [g for node in everywhere(nodes) for g in subgraphs(node)]


def renaming(names: Iterable[str], rng: random.Random) -> dict[str, str]:
    """Each name -> a random one; the empty name, which is none, stays."""
    old = sorted(set(names) - {""})
    numbers = list(range(len(old)))
    rng.shuffle(numbers)
    return {"": ""} | {o: f"t{n}" for o, n in zip(old, numbers, strict=True)}


def rename_nodes(nodes: Iterable[onnx.NodeProto], new: dict[str, str], rng: random.Random) -> None:
    """Renames nodes and the values that they read and make, in place."""
    for index, node in enumerate(everywhere(nodes)):
        node.name = f"k{rng.random()}{index}"
        node.doc_string = ""
        del node.metadata_props[:]
        for names_of in (node.input, node.output):
            names_of[:] = [new[n] for n in names_of]


def renamed(model: onnx.ModelProto, rng: random.Random) -> dict[str, str]:
    """Renames every value, node, input, output and input size to a random name, in place, inside sub-graphs
    and functions too; gives old -> new of the main graph."""
    graphs = [model.graph, *graphs_in(model.graph.node)]
    values = [v for g in graphs for v in [*g.input, *g.output, *g.initializer]]
    nodes = everywhere(model.graph.node)
    new = renaming([*(v.name for v in values), *(n for k in nodes for n in [*k.input, *k.output])], rng)
    for value in values:
        value.name = new[value.name]
    for graph in graphs:
        del graph.value_info[:]
        graph.doc_string = ""
    sizes = [d for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param.isidentifier()]
    size = renaming([d.dim_param for d in sizes], rng)
    for dim in sizes:
        dim.dim_param = "d" + size[dim.dim_param]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    rename_nodes(model.graph.node, new, rng)
    for function in model.functions:
        inner = [n for k in everywhere(function.node) for n in [*k.input, *k.output]]
        local = renaming([*function.input, *function.output, *inner], rng)
        rename_nodes(function.node, local, rng)
        for names_of in (function.input, function.output):
            names_of[:] = [local[n] for n in names_of]
        del function.value_info[:]
    return new


def reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, those that its sub-graphs take from outside included."""
    found = set(node.input)
    for graph in subgraphs(node):
        inside = {v.name for v in [*graph.input, *graph.initializer]} | {
            o for n in graph.node for o in n.output
        }
        found |= set().union({v.name for v in graph.output}, *map(reads, graph.node)) - inside
    return found - {""}


def shuffle(nodes: Any, rng: random.Random) -> None:
    """Puts nodes into a random topological order, in place."""
    left = list(nodes)
    needs = [reads(n) for n in left]
    made = {o for n in left for o in n.output}
    order: list[onnx.NodeProto] = []
    waiting = list(range(len(left)))
    while waiting:
        chosen = rng.choice([i for i in waiting if not needs[i] & made])
        waiting.remove(chosen)
        order.append(left[chosen])
        made -= set(left[chosen].output)
    del nodes[:]
    nodes.extend(order)


def reordered(model: onnx.ModelProto, rng: random.Random) -> None:
    """Puts all nodes into a random topological order, in place, and shuffles the initializers."""
    graphs = [model.graph, *graphs_in(model.graph.node)]
    for graph in graphs:
        tensors = list(graph.initializer)
        rng.shuffle(tensors)
        del graph.initializer[:]
        graph.initializer.extend(tensors)
    for nodes in (*(g.node for g in reversed(graphs)), *(f.node for f in model.functions)):
        shuffle(nodes, rng)


def structure(found: dict[str, Any]) -> dict[str, Any]:
    """An inspection without names."""
    kept = {k: v for k, v in found.items() if k not in ("name", "inputs", "outputs")}
    return kept | {
        "roles": sorted(v["role"] for v in [*found["inputs"].values(), *found["outputs"].values()])
    }


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
    run = list(runs(source).values())[-1]
    got = evaluate(graph, {new[k]: v for k, v in run["in"].items()})
    for key, expected in run["ort"].items():
        apart = difference(got[new[key]], expected, run.get("compare_mask", {}).get(""))
        assert apart < (1e-3 if "int4" in name else 1e-4)


def nested() -> onnx.ModelProto:
    """A small decoder whose logits go through a function of the model and a branch that reads them."""
    model = decoder(Options(layers=2))
    head = model.graph.node[-1]
    head.output[0] = "plain"
    twice = helper.make_function(
        "local",
        "Twice",
        ["x"],
        ["y"],
        [helper.make_node("Identity", ["x"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])],
        [helper.make_opsetid("", 17)],
    )
    logits = helper.make_tensor_value_info("made", onnx.TensorProto.FLOAT, None)
    taken = [helper.make_node("Tanh", ["doubled"], ["bent"]), helper.make_node("Abs", ["bent"], ["made"])]
    other = [helper.make_node("Neg", ["doubled"], ["made"])]
    branches = [helper.make_graph(nodes, "branch", [], [logits]) for nodes in (taken, other)]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.extend(
        [
            helper.make_node("Twice", ["plain"], ["doubled"], domain="local"),
            helper.make_node("If", ["yes"], ["logits"], then_branch=branches[0], else_branch=branches[1]),
        ]
    )
    model.functions.append(twice)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def test_names_and_order_do_not_matter_inside_functions_and_branches(tmp_path: Path) -> None:
    model, rng = nested(), random.Random(4)
    original, expected = load(saved(model, tmp_path, "original.onnx")), oracle(model, feeds())
    new = renamed(model, rng)
    reordered(model, rng)
    graph = load(saved(model, tmp_path))
    assert structure(inspect(graph)) == structure(inspect(original))
    got = evaluate(graph, {new[k]: v for k, v in feeds().items()})
    assert worst({k: got[new[k]] for k in expected}, expected) < 1e-4
