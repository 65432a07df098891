"""Routed experts: spelled as exporters do, and onnxruntime's fused operators, against onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import mapper
from mapper.frontend.load import load
from mapper.ir.cost import total
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from tests.frontend.tiny import oracle

Array = npt.NDArray[Any]
MS = "com.microsoft"
EXPERTS, WIDTH, INNER, CHOSEN, TOKENS = 8, 32, 48, 2, 5
RNG = np.random.default_rng(3)


def fan_in(*shape: int) -> Array:
    """Weights of variance 1 over the last axis."""
    return np.asarray(RNG.standard_normal(shape) / np.sqrt(shape[-1]), np.float32)


class Writer:
    """Builds a graph node by node."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def store(self, array: Array) -> str:
        """The name of a new initializer."""
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """A stored int64 vector."""
        return self.store(np.array(values, np.int64))

    def add(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attrs: Any) -> Any:
        """A node; the name or names of its results."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def model(self, out: str, width: int = WIDTH) -> ModelProto:
        """x [tokens, WIDTH] -> y [tokens, width]."""
        self.nodes.append(helper.make_node("Identity", [out], ["y"]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", WIDTH])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width])
        graph = helper.make_graph(self.nodes, "experts", [x], [y], self.tensors)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def checked(model: ModelProto, folder: Path, tolerance: float = 1e-5) -> Graph:
    """The loaded graph, after comparing reference semantics and kernels with onnxruntime."""
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    graph = load(path)
    x = 2 * RNG.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    expected = oracle(model, {"x": x})["y"]
    scale = max(1.0, float(np.abs(expected).max()))
    for made in (evaluate(graph, {"x": x})["y"], mapper.run(graph, {"x": x})["y"]):
        assert np.abs(made - expected).max() <= tolerance * scale
    return graph


def names(graph: Graph) -> list[str]:
    """The ops in order, views left out."""
    return [
        op.mnemonic for op in graph.ops() if op.mnemonic not in ("reshape", "concat", "slice", "constant")
    ]


def routed(w: Writer, x: str, form: Mapping[str, Any]) -> tuple[str, str]:
    """(index, share), each [tokens, CHOSEN], of a router in one of the usual forms."""
    logits = w.add("MatMul", x, w.store(3 * fan_in(EXPERTS, WIDTH).T.copy()))
    k = w.ints(CHOSEN)
    if form.get("scoring") == "sigmoid":
        scores = w.add("Sigmoid", logits)
        choice = w.add("Add", scores, w.store(0.3 * RNG.standard_normal(EXPERTS).astype(np.float32)))
        if form.get("groups"):
            choice = grouped(w, choice, form["groups"], form.get("pairs", True), form.get("fill", 0.0))
        _, index = w.add("TopK", choice, k, outputs=2, axis=-1)
        share = w.add("GatherElements", scores, index, axis=1)
    elif form.get("scoring") == "topk_softmax":
        values, index = w.add("TopK", logits, k, outputs=2, axis=-1)
        share = w.add("Softmax", values, axis=-1)
    else:
        share, index = w.add("TopK", w.add("Softmax", logits, axis=-1), k, outputs=2, axis=-1)
    if form.get("normalise"):
        total_ = w.add("ReduceSum", share, w.ints(-1), keepdims=1)
        if form.get("epsilon"):
            total_ = w.add("Add", total_, w.store(np.array(form["epsilon"], np.float32)))
        share = w.add("Div", share, total_)
    if form.get("scale"):
        share = w.add("Mul", share, w.store(np.array(form["scale"], np.float32)))
    return index, share


def grouped(w: Writer, scores: str, groups: int, pairs: bool, fill: float) -> str:
    """Scores outside of the two best groups replaced by `fill`."""
    runs = w.add("Reshape", scores, w.ints(-1, groups, EXPERTS // groups))
    best, _ = w.add("TopK", runs, w.ints(2 if pairs else 1), outputs=2, axis=-1)
    value = w.add("ReduceSum", best, w.ints(-1), keepdims=0)
    _, index = w.add("TopK", value, w.ints(2), outputs=2, axis=-1)
    zeros = w.add("Mul", value, w.store(np.array(0, np.float32)))
    ones = w.add("Add", w.add("Mul", w.add("Cast", index, to=1), w.store(np.array(0, np.float32))),
                 w.store(np.array(1, np.float32)))  # fmt: skip
    marked = w.add("ScatterElements", zeros, index, ones, axis=1)
    wide = w.add("Expand", w.add("Unsqueeze", marked, w.ints(-1)), w.ints(1, 1, EXPERTS // groups))
    kept = w.add("Cast", w.add("Reshape", wide, w.ints(-1, EXPERTS)), to=TensorProto.BOOL)
    return str(w.add("Where", kept, scores, w.store(np.array(fill, np.float32))))


def experts(w: Writer, x: str, index: str, share: str, form: Mapping[str, Any]) -> str:
    """The chosen experts' outputs, weighted and summed: [tokens, WIDTH]."""
    flat = w.add("Reshape", index, w.ints(-1))
    each = w.add("Reshape", w.add("Expand", w.add("Unsqueeze", x, w.ints(1)), w.ints(1, CHOSEN, 1)),
                 w.ints(-1, WIDTH))  # fmt: skip
    weights = w.add("Reshape", share, w.ints(-1, 1))
    if form.get("share_input"):
        each = w.add("Mul", each, weights)
    right = form.get("side") == "right"

    def product(value: str, rows: int, columns: int) -> str:
        stack = fan_in(EXPERTS, rows, columns)
        chosen = w.add("Gather", w.store(stack.swapaxes(1, 2).copy() if right else stack), flat, axis=0)
        if right:
            y = w.add("MatMul", w.add("Unsqueeze", value, w.ints(1)), chosen)
        else:
            y = w.add("MatMul", chosen, w.add("Unsqueeze", value, w.ints(2)))
        y = w.add("Reshape", y, w.ints(-1, rows))
        if form.get("bias"):
            y = w.add("Add", y, w.add("Gather", w.store(fan_in(EXPERTS, rows)), flat, axis=0))
        return str(y)

    if form.get("packing", "none") == "none":
        gate = product(each, INNER, WIDTH)
        up = product(each, INNER, WIDTH) if form.get("gated", True) else ""
    else:
        both = product(each, 2 * INNER, WIDTH)
        halves = form["packing"] == "halves"
        cut = [(0, INNER, 1), (INNER, 2 * INNER, 1)] if halves else [(0, 2 * INNER, 2), (1, 2 * INNER, 2)]
        gate, up = (w.add("Slice", both, w.ints(a), w.ints(b), w.ints(1), w.ints(s)) for a, b, s in cut)
    if form.get("limit"):
        high, low = (w.store(np.array(s * form["limit"], np.float32)) for s in (1, -1))
        gate, up = w.add("Min", gate, high), w.add("Clip", up, low, high)
    if form.get("offset"):
        up = w.add("Add", up, w.store(np.array(form["offset"], np.float32)))
    hidden = w.add("Mul", gate, w.add("Sigmoid", gate))
    hidden = w.add("Mul", hidden, up) if up else hidden
    out = product(str(hidden), WIDTH, INNER)
    if not form.get("share_input") and form.get("weighted", True):
        out = w.add("Mul", out, weights)
    out = w.add("Reshape", out, w.ints(-1, CHOSEN, WIDTH))
    return str(w.add(form.get("reduce", "ReduceSum"), out, w.ints(1), keepdims=0))


def mixture(**form: Any) -> ModelProto:
    """A router and experts after a linear layer."""
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(WIDTH, WIDTH)))
    index, share = routed(w, x, form)
    return w.model(experts(w, x, index, share, form))


FORMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, normalised": {"normalise": True},
    "softmax of the chosen": {"scoring": "topk_softmax"},
    "sigmoid with correction": {"scoring": "sigmoid", "normalise": True, "epsilon": 1e-3, "scale": 2.5},
    "groups by best two": {"scoring": "sigmoid", "groups": 4, "normalise": True},
    "groups by best": {"scoring": "sigmoid", "groups": 4, "pairs": False, "fill": -9.0},
    "halves": {"packing": "halves"},
    "interleaved, clamped, biases": {"packing": "interleaved", "limit": 1.0, "offset": 1.0, "bias": True},
    "matrices from the right": {"side": "right", "bias": True},
    "without a gate": {"gated": False},
    "shares on the input": {"share_input": True},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_gathered_stacks_are_routed_experts(form: dict[str, Any], tmp_path: Path) -> None:
    graph = checked(mixture(**form), tmp_path)
    assert names(graph) == ["linear", "linear", "route", "moe"]
    (moe,) = [op for op in graph.ops() if op.mnemonic == "moe"]
    assert moe.attr("packing") == form.get("packing", "none")
    assert moe.attr("limit") == form.get("limit", 0.0)


def test_only_chosen_experts_are_read(tmp_path: Path) -> None:
    graph = checked(mixture(), tmp_path)
    one = 3 * WIDTH * INNER * 4
    router, first = EXPERTS * WIDTH * 4, WIDTH * WIDTH * 4
    assert total(graph).weights.evaluate({"tokens": 1}) == CHOSEN * one + router + first
    assert total(graph).weights.evaluate({"tokens": 100}) == EXPERTS * one + router + first


NEAR_MISSES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "shares left out": ({"weighted": False}, []),
    "largest instead of sum": ({"reduce": "ReduceMax"}, []),
    "an activation of another slope": ({"packing": "halves", "limit": 1.0, "offset": 0.5}, ["route", "moe"]),
}


@pytest.mark.parametrize(("form", "there"), NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_misses_still_compute_the_same(form: dict[str, Any], there: list[str], tmp_path: Path) -> None:
    found = names(checked(mixture(**form), tmp_path))
    assert [n for n in found if n in ("route", "moe")] == there


@pytest.mark.parametrize("kind", ["relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("normalise", [0, 1])
def test_fused_operator(kind: str, normalise: int, tmp_path: Path) -> None:
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(WIDTH, WIDTH)))
    logits = w.add("MatMul", x, w.store(3 * fan_in(EXPERTS, WIDTH).T.copy()))
    stacks = [fan_in(EXPERTS, INNER, WIDTH), fan_in(EXPERTS, INNER)]
    stacks += [fan_in(EXPERTS, WIDTH, INNER), fan_in(EXPERTS, WIDTH)]
    attrs: dict[str, Any] = {"k": CHOSEN, "activation_type": kind, "normalize_routing_weights": normalise}
    out = w.add("MoE", x, logits, *map(w.store, stacks), domain=MS, **attrs)
    # onnxruntime's gelu is a polynomial of its own
    graph = checked(w.model(out), tmp_path, 1e-3 if kind == "gelu" else 1e-5)
    assert names(graph) == ["linear", "linear", "route", "moe"]


@pytest.mark.parametrize(
    "attrs", [{}, {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.0}]
)
def test_fused_gated_operator(attrs: dict[str, Any], tmp_path: Path) -> None:
    w = Writer()
    x = w.add("MatMul", "x", w.store(fan_in(WIDTH, WIDTH)))
    logits = w.add("MatMul", x, w.store(3 * fan_in(EXPERTS, WIDTH).T.copy()))
    stacks = [fan_in(EXPERTS, 2 * INNER, WIDTH), fan_in(EXPERTS, 2 * INNER)]
    stacks += [fan_in(EXPERTS, WIDTH, INNER), fan_in(EXPERTS, WIDTH)]
    given: dict[str, Any] = {
        "k": CHOSEN,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
    }
    out = w.add("MoE", x, logits, *map(w.store, stacks), domain=MS, **given, **attrs)
    graph = checked(w.model(out), tmp_path)
    assert names(graph) == ["linear", "linear", "route", "moe"]
    (moe,) = [op for op in graph.ops() if op.mnemonic == "moe"]
    assert moe.attr("packing") == "interleaved"
