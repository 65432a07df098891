"""Identical layers are looked at twice only: the graph is the one that comes of looking at every layer."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mapper.errors import UnsupportedModelError
from mapper.frontend.abridge import abridge
from mapper.frontend.extend import NotAlike, extend
from mapper.frontend.guard import read_model
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load, load_whole
from mapper.frontend.repetition import KEPT
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from tests.frontend import cached, decoders
from tests.frontend.test_variants import renamed, reordered
from tests.frontend.tiny import (
    HEADS,
    INNER,
    VOCAB,
    WIDTH,
    Array,
    Builder,
    Options,
    angles,
    assemble,
    attention,
    decoder,
    feeds,
    mlp,
    norm,
    oracle,
    saved,
    worst,
)

LOCAL = 3  # window of local layers


def mixed(layers: Sequence[Options], local: Sequence[bool] = ()) -> onnx.ModelProto:
    """A decoder whose layers have options of their own; those that are `local` see LOCAL tokens."""
    b = Builder(np.random.default_rng(5))
    x = b.op("Gather", b.weight(VOCAB, WIDTH, gain=VOCAB**0.5), "ids")
    cos, sin = angles(b, layers[0], "positions")
    keys, queries = b.op("Unsqueeze", whole_positions(b), b.ints(0)), b.op("Unsqueeze", "row", b.ints(1))
    distance = b.op("Sub", queries, keys)
    future = b.op("Less", distance, b.const(0, np.int64))
    away = b.op("Cast", b.op("Neg", distance), to=TensorProto.FLOAT)
    b.nodes.append(helper.make_node("Identity", [away], ["distance"], name="distance"))
    far = b.op("Or", future, b.op("GreaterOrEqual", distance, b.const(LOCAL, np.int64)))
    for i, o in enumerate(layers):
        hidden = far if local and local[i] else future
        x = b.op("Add", x, attention(b, o, norm(b, o, x), i, cos, sin, hidden))
        x = b.op("Add", x, mlp(b, o, norm(b, o, x)))
    x = norm(b, layers[0], x)
    b.nodes.append(helper.make_node("MatMul", [x, b.weight(WIDTH, VOCAB)], ["logits"]))
    return assemble(b, Options(layers=len(layers)))


def whole_positions(b: Builder) -> str:
    """Positions of all tokens; those of the new ones are `row`."""
    total, new = b.op("Shape", "mask", start=1, end=2), b.op("Shape", "ids", start=1, end=2)
    zero, one, axis = b.const(0, np.int64), b.const(1, np.int64), b.ints(0)
    last = b.op("Squeeze", total, axis)
    first = b.op("Squeeze", b.op("Sub", total, new), axis)
    b.nodes.append(helper.make_node("Range", [first, last, one], ["row"], name="row"))
    return b.op("Range", zero, last, one)


def abridged(path: Path) -> Graph | None:
    """The graph by way of the abridged model; None where nothing can be left out."""
    short = abridge(read_model(path))
    if short is None:
        return None
    try:
        made = extend(load_whole(short.model), short)
    except NotAlike:
        return None
    made.verify()
    return made


def unnamed(graph: Graph) -> str:
    """The graph's text without node names: which of several equal nodes an op is named after is open."""
    return re.sub(r'node = "[^"]*"', "", graph.print())


def same(model: onnx.ModelProto, inputs: dict[str, Any], folder: Path) -> list[int]:
    """Asserts that a model can be abridged, and gives the graph of looking at every layer and what
    onnxruntime computes; the counts of the graph's sections."""
    path = saved(model, folder)
    made, whole = abridged(path), load_whole(read_model(path), True)
    assert made is not None
    assert unnamed(made) == unnamed(whole) == unnamed(load(path))
    assert worst(evaluate(made, {n: inputs[n] for n, _ in made.inputs}), oracle(model, inputs)) < 1e-4
    return [s.count for s in made.sections()]


@pytest.mark.parametrize(
    "options",
    [
        Options(layers=6),
        Options(layers=5, rope="interleaved", partial=True, mask="where", tied=True),
        Options(layers=4, norm="layer", gated=False, act="gelu"),
        Options(layers=5, weight_offset=True, scale="both"),
        Options(layers=5, negate=False),
        Options(layers=4, norm_reduce="ReduceMax"),
    ],
    ids=lambda o: f"{o.layers}-{o.rope}-{o.norm}",
)
def test_the_graph_is_the_same(options: Options, tmp_path: Path) -> None:
    counts = same(decoder(options), feeds(layers=options.layers), tmp_path)
    assert options.layers in counts


def test_names_and_order_do_not_matter(tmp_path: Path) -> None:
    model, rng = decoder(Options(layers=6)), random.Random(2)
    new = renamed(model, rng)
    reordered(model, rng)
    assert 6 in same(model, {new[k]: v for k, v in feeds(layers=6).items()}, tmp_path)


def test_the_length_of_each_cache_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    model = decoder(Options(layers=6))
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[2].dim_param = value.name + "_length"
    assert 6 in same(model, feeds(layers=6), tmp_path)


def test_what_all_layers_share_may_read_the_shape_of_the_last_cache(tmp_path: Path) -> None:
    model = decoder(Options(layers=6))
    nodes = list(model.graph.node)
    at, total = next((i, n) for i, n in enumerate(nodes) if n.op_type == "Shape" and n.input[0] == "mask")
    whole = [
        helper.make_node("Shape", ["past_k5"], ["past_size"], name="a", start=2, end=3),
        helper.make_node("Shape", ["ids"], ["new_size"], name="b", start=1, end=2),
        helper.make_node("Add", ["past_size", "new_size"], list(total.output), name="c"),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *whole, *nodes[at + 1 :]])
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[2].dim_param = value.name + "_length"
    assert 6 in same(model, feeds(layers=6), tmp_path)


def test_alternating_layers_are_one_run_of_periods(tmp_path: Path) -> None:
    local = [i % 3 != 2 for i in range(14)]  # two local, one global, ...; two local at the end
    counts = same(mixed([Options()] * 14, local), feeds(layers=14, past=6), tmp_path)
    assert counts == [1, 4, 2, 1]


def test_one_odd_layer_parts_two_runs(tmp_path: Path) -> None:
    odd = Options(act="relu", scale="query")
    counts = same(mixed([Options()] * 4 + [odd] + [Options()] * 5), feeds(layers=10), tmp_path)
    assert counts == [1, 4, 1, 5, 1]


def test_a_dense_start_and_other_layers_after(tmp_path: Path) -> None:
    counts = same(mixed([Options(gated=False)] * 3 + [Options()] * 6), feeds(layers=9), tmp_path)
    assert counts == [1, 3, 6, 1]


def skipping(layers: int, bias: bool) -> onnx.ModelProto:
    """Layers of packed integers whose norms add the residual first, as the onnxruntime-genai builder does."""
    b, block = Builder(np.random.default_rng(3)), 16

    def product(x: str, rows: int, columns: int) -> str:
        packed = b.const(b.rng.integers(0, 256, (columns, rows // block, block // 2)), np.uint8)
        scales = b.const(0.1 + 0.1 * b.rng.random(columns * rows // block))
        sizes = {"K": rows, "N": columns, "bits": 4, "block_size": block}
        return b.op("MatMulNBits", x, packed, scales, domain="com.microsoft", **sizes)

    residual = b.op("Gather", b.weight(VOCAB, 32, gain=VOCAB**0.5), "ids")
    x = b.op("SimplifiedLayerNormalization", residual, b.weight(32), epsilon=1e-5, axis=-1)
    for i in range(layers):
        x = product(b.op("Relu", product(x, 32, 48)), 48, 32)
        ins = [x, residual, b.weight(32), *([b.weight(32)] if bias else [])]
        outs = [f"norm{i}", "", "", f"total{i}"][: 1 if i == layers - 1 else 4]
        kind = "SkipSimplifiedLayerNormalization"
        b.nodes.append(
            helper.make_node(kind, ins, outs, name=f"skip{i}", domain="com.microsoft", epsilon=1e-5)
        )
        x, residual = outs[0], outs[-1]
    b.nodes.append(helper.make_node("MatMul", [x, b.weight(32, VOCAB)], ["logits"]))
    value = helper.make_tensor_value_info
    ids, logits = value("ids", TensorProto.INT64, ["B", "S"]), value("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(b.nodes, "skipping", [ids], [logits], b.tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("bias", [False, True])
def test_residuals_inside_norms_and_packed_weights(bias: bool, tmp_path: Path) -> None:
    counts = same(skipping(7, bias), {"ids": np.array([[1, 2, 3], [4, 5, 6]])}, tmp_path)
    assert 7 in counts


@pytest.mark.parametrize(
    ("attend", "opset", "short"),
    [
        (cached.growing("BHLD"), 18, True),
        (cached.growing("BLHD"), 18, False),  # the transposed past is a value of each layer outside of it
        (cached.half, 18, True),
        (cached.rolling, 18, False),
        (cached.layer_stack, 18, False),
        (cached.static("ScatterND"), 18, True),
        (cached.tensor_scatter("linear", False), 24, True),
        (cached.tensor_scatter("circular", True), 24, True),
        (cached.grouped(), 18, True),
    ],
)
def test_conventions_of_the_cache(attend: decoders.Attend, opset: int, short: bool, tmp_path: Path) -> None:
    path = saved(decoders.decoder(attend, opset, layers=5).model(), tmp_path)
    made, whole = abridged(path), load_whole(read_model(path))
    assert (made is not None) == short
    assert unnamed(load(path)) == unnamed(whole)
    assert made is None or (unnamed(made) == unnamed(whole) and made.roles == whole.roles)


def biased(model: onnx.ModelProto, tables: Sequence[Array], slopes: bool) -> onnx.ModelProto:
    """The model with a stored table of each layer added to its scores: as it is, or as slopes [H, 1, 1] times
    the (negative) distance."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Softmax":
            i = sum(n.op_type == "Softmax" for n in nodes)
            bias = f"table{i}"
            model.graph.initializer.append(numpy_helper.from_array(tables[i].astype(np.float32), bias))
            if slopes:
                nodes.append(helper.make_node("Mul", [bias, "distance"], [f"bias{i}"], name=f"b{i}"))
                bias = f"bias{i}"
            nodes.append(helper.make_node("Add", [node.input[0], bias], [f"sum{i}"], name=f"s{i}"))
            node.input[0] = f"sum{i}"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def looked_at_whole(model: onnx.ModelProto, inputs: dict[str, Any], folder: Path) -> Graph:
    """Asserts that a model cannot be abridged and gives the right results all the same; its graph."""
    path = saved(model, folder)
    assert abridged(path) is None
    graph = load(path)
    assert worst(evaluate(graph, {n: inputs[n] for n, _ in graph.inputs}), oracle(model, inputs)) < 1e-4
    assert graph.print() == load_whole(read_model(path), True).print()
    return graph


def test_slopes_of_each_layer_are_read_in_each_layer(tmp_path: Path) -> None:
    tables = [2.0 ** -np.arange(1, 1 + HEADS).reshape(HEADS, 1, 1)] * 6
    tables[4] = 3 * tables[4]
    looked_at_whole(biased(mixed([Options()] * 6), tables, True), feeds(layers=6), tmp_path)


def test_masks_of_each_layer_are_read_in_each_layer(tmp_path: Path) -> None:
    new, past = 3, 4
    model = mixed([Options()] * 6)
    for value in model.graph.input:
        sizes = {"B": 2, "S": new, "P": past, "M": 2, "T": past + new}
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    position, token = past + np.arange(new)[:, None], np.arange(past + new)[None, :]
    causal = np.where(token > position, -1e9, 0.0)
    near = np.where(token <= position - LOCAL, -1e9, causal)
    tables = [causal[None, None]] * 6
    tables[4] = near[None, None]
    looked_at_whole(biased(model, tables, False), feeds(layers=6, new=new, past=past), tmp_path)


def test_weights_that_only_some_layers_share_stay_apart(tmp_path: Path) -> None:
    model = decoder(Options(layers=6))
    downs = [n for n in model.graph.node if n.op_type == "MatMul" and "ids" not in n.input]
    rows = {t.name: t for t in model.graph.initializer}
    inner = [n for n in downs if n.input[1] in rows and list(rows[n.input[1]].dims) == [INNER, WIDTH]]
    assert len(inner) == 6
    inner[1].input[1] = inner[0].input[1]
    graph = looked_at_whole(model, feeds(layers=6), tmp_path)
    assert len(inspect(graph)["mlp"]) == 1


def test_a_refusal_names_the_same_node(tmp_path: Path) -> None:
    model = decoder(Options(layers=6))
    for index, node in enumerate(n for n in model.graph.node if n.op_type == "Sigmoid"):
        node.op_type, node.name = "Unheard", f"bad{index}"
    path = saved(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"node 'bad0' \(Unheard\)"):
        load(path)


def test_what_stays_is_two_layers(tmp_path: Path) -> None:
    short = abridge(read_model(saved(decoder(Options(layers=9)), tmp_path)))
    assert short is not None
    record = short.model.record.graph
    assert sum(n.op == "Softmax" for n in record.nodes) == KEPT
    assert len(record.inputs) == 3 + 2 * KEPT and len(short.inputs) == 3 + 2 * 9
    assert abridge(read_model(saved(decoder(Options(layers=KEPT)), tmp_path))) is None
