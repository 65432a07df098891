"""Models without their weights, and graphs whose shapes are made to explode."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mapper.errors import MapperError, WeightsMissingError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from tests.frontend.tiny import KV, VOCAB, WIDTH, Options, decoder, feeds, saved

BF16 = TensorProto.BFLOAT16


def skeleton(
    layers: int, width: int, heads: int, kv: int, head: int, inner: int, vocab: int
) -> onnx.ModelProto:
    """A bf16 decoder in opset-23 operators whose weights are in a file that is not there."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    offset = 0

    def weight(name: str, *dims: int) -> str:
        nonlocal offset
        tensor = TensorProto(name=name, dims=dims, data_type=BF16, data_location=TensorProto.EXTERNAL)
        size = 2 * int(np.prod(dims, dtype=object))
        for key, value in (("location", "absent.bin"), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        offset += size
        tensors.append(tensor)
        return name

    def const(name: str, values: list[int]) -> str:
        tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def op(kind: str, ins: list[str], out: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(kind, ins, [out], name=f"n.{out}", **attrs))
        return out

    query, key, flat = (
        const("q", [0, 0, heads, head]),
        const("k", [0, 0, kv, head]),
        const("f", [0, 0, heads * head]),
    )
    position = op("Cast", [op("Unsqueeze", ["positions", const("axis", [2])], "column")], "p", to=BF16)
    angle = op("Mul", [position, weight("inv_freq", head // 2)], "angle")
    cos, sin = op("Cos", [angle], "cos"), op("Sin", [angle], "sin")
    x = op("Gather", [weight("table", vocab, width), "ids"], "x")
    caches, presents = [], []
    for i in range(layers):
        h = op("RMSNormalization", [x, weight(f"norm.{i}", width)], f"h.{i}", epsilon=1e-5)
        parts = []
        for name, shape, count in (("q", query, heads), ("k", key, kv), ("v", key, kv)):
            y = op("MatMul", [h, weight(f"w{name}.{i}", width, count * head)], f"{name}.{i}")
            y = op(
                "Transpose", [op("Reshape", [y, shape], f"{name}r.{i}")], f"{name}t.{i}", perm=[0, 2, 1, 3]
            )
            parts.append(y if name == "v" else op("RotaryEmbedding", [y, cos, sin], f"{name}o.{i}"))
        past, new = [f"pk.{i}", f"pv.{i}"], [f"nk.{i}", f"nv.{i}"]
        nodes.append(helper.make_node("Attention", [*parts, "", *past], [f"a.{i}", *new], is_causal=1))
        a = op("Reshape", [op("Transpose", [f"a.{i}"], f"at.{i}", perm=[0, 2, 1, 3]), flat], f"ar.{i}")
        x = op("Add", [x, op("MatMul", [a, weight(f"wo.{i}", heads * head, width)], f"o.{i}")], f"x.{i}")
        h = op("RMSNormalization", [x, weight(f"norm2.{i}", width)], f"h2.{i}", epsilon=1e-5)
        gate = op("MatMul", [h, weight(f"gate.{i}", width, inner)], f"g.{i}")
        up = op("MatMul", [h, weight(f"up.{i}", width, inner)], f"u.{i}")
        act = op("Mul", [op("Mul", [gate, op("Sigmoid", [gate], f"s.{i}")], f"si.{i}"), up], f"m.{i}")
        x = op("Add", [x, op("MatMul", [act, weight(f"down.{i}", inner, width)], f"d.{i}")], f"y.{i}")
        caches += past
        presents += new
    op(
        "MatMul",
        [op("RMSNormalization", [x, weight("last", width)], "z"), weight("head", width, vocab)],
        "logits",
    )
    value = helper.make_tensor_value_info
    past_shape: list[str | int | None] = ["B", kv, "P", head]
    inputs = [value(n, TensorProto.INT64, ["B", "S"]) for n in ("ids", "positions")]
    inputs += [value(n, BF16, past_shape) for n in caches]
    outputs = [value(n, BF16, None) for n in ("logits", *presents)]
    graph = helper.make_graph(nodes, "skeleton", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_a_70b_skeleton_without_weights_is_recognised(tmp_path: Path) -> None:
    path = saved(skeleton(80, 8192, 64, 8, 128, 28672, 128256), tmp_path)
    start = time.process_time()
    graph = load(path)
    found = inspect(graph)
    assert time.process_time() - start < 60, "as good as a hang"
    assert found["params"] == pytest.approx(70.55e9, rel=0.002)  # the published 70.6 B of Llama 3.1 70B
    assert (found["layers"], found["distinct_layers"]) == (80, 1)
    assert (found["heads"], found["kv_heads"], found["head_dim"]) == (64, 8, 128)
    assert found["primitives_left"] == {} and found["recognised_fraction"] == 1.0
    assert found["masks"] == [{"mask": "causal", "window": 0, "layers": 80}]
    assert found["weight_formats"] == {"bf16": 80 * 9 + 4}
    with pytest.raises(WeightsMissingError):
        graph.weights["table"].load()


def test_structure_does_not_depend_on_weights_being_there(tmp_path: Path) -> None:
    made = decoder(Options())
    path = tmp_path / "m.onnx"
    onnx.save_model(made, str(path), save_as_external_data=True, location="m.bin", size_threshold=200)
    with_weights = inspect(load(path))
    (tmp_path / "m.bin").unlink()
    graph = load(path)
    assert inspect(graph)["attention"] == with_weights["attention"]
    assert inspect(graph)["recognised_fraction"] == with_weights["recognised_fraction"] == 1.0
    assert (with_weights["hidden"], with_weights["vocab"], with_weights["kv_heads"]) == (WIDTH, VOCAB, KV)
    with pytest.raises(WeightsMissingError):
        evaluate(graph, feeds())


def explosive(kind: str) -> onnx.ModelProto:
    """Graphs of few nodes that would need endless time or memory if shapes were followed blindly."""
    nodes: list[onnx.NodeProto] = []
    tensors = [numpy_helper.from_array(np.array([2], np.int64), "two")]
    value = helper.make_tensor_value_info
    x, last = value("x", TensorProto.FLOAT, ["a", "b"]), "x"
    if kind == "huge static input":
        x = value("x", TensorProto.FLOAT, [1 << 20, 1 << 20, 1 << 20])
        tensors.append(numpy_helper.from_array(np.ones(1, np.float32), "w"))
        nodes.append(helper.make_node("Relu", ["x"], ["r"]))
        nodes.append(helper.make_node("ReduceMean", ["r"], ["m"], axes=[-1]))
        nodes.append(helper.make_node("Mul", ["r", "m"], ["y"]))
        last = "y"
    elif kind == "doubling a shape":
        nodes.append(helper.make_node("Shape", ["x"], ["s0"]))
        for i in range(60):
            nodes.append(helper.make_node("Concat", [f"s{i}", f"s{i}"], [f"s{i + 1}"], axis=0))
        last = "s60"
    elif kind == "doubling a tensor":
        for i in range(60):
            nodes.append(helper.make_node("Concat", ["x" if not i else f"t{i}"] * 2, [f"t{i + 1}"], axis=0))
        last = "t60"
    elif kind == "squaring a size":
        nodes.append(helper.make_node("Shape", ["x"], ["s0"]))
        for i in range(60):
            nodes.append(helper.make_node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]))
        nodes.append(helper.make_node("Reshape", ["x", "s60"], ["y"]))
        last = "y"
    elif kind == "nested divisions":
        nodes.append(helper.make_node("Shape", ["x"], ["s0"]))
        for i in range(2000):
            nodes.append(helper.make_node("Div", [f"s{i}", "two"], [f"d{i}"]))
            nodes.append(helper.make_node("Add", [f"d{i}", "two"], [f"s{i + 1}"]))
        nodes.append(helper.make_node("Expand", ["x", "s2000"], ["y"]))
        last = "y"
    elif kind == "wide constants":
        tensors += [
            numpy_helper.from_array(np.ones((8192, 1), np.int64), "column"),
            numpy_helper.from_array(np.ones((1, 8192), np.int64), "row"),
        ]
        nodes.append(helper.make_node("Add", ["column", "row"], ["y"]))
        last = "y"
    graph = helper.make_graph(nodes, "g", [x], [value(last, TensorProto.FLOAT, None)], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    "kind",
    [
        "huge static input",
        "doubling a shape",
        "doubling a tensor",
        "squaring a size",
        "nested divisions",
        "wide constants",
    ],
)
def test_explosive_shapes_are_answered(kind: str, tmp_path: Path) -> None:
    path = saved(explosive(kind), tmp_path)
    start = time.process_time()
    try:
        inspect(load(path))
    except MapperError as error:
        assert "\n" not in str(error)
    assert time.process_time() - start < 60, "as good as a hang"


def test_a_number_that_json_lacks_is_text(tmp_path: Path) -> None:
    """An epsilon may be infinite: what `inspect` says of it is JSON all the same."""
    model = decoder(Options())
    added = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in added and tensor.data_type == TensorProto.FLOAT and not tensor.dims:
            tensor.CopyFrom(numpy_helper.from_array(np.array(np.inf, np.float32), tensor.name))
    record = inspect(load(saved(model, tmp_path)))
    assert {norm["eps"] for norm in record["norms"]} == {"inf"}
    json.dumps(record, allow_nan=False)
