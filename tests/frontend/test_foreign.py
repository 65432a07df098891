"""What is no transformer is refused, naming node, operator and reason; what merely resembles it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mapper.errors import UnsupportedModelError
from mapper.frontend.load import load
from tests.frontend.tiny import Options, decoder, saved

F = TensorProto.FLOAT
C = 8


def built(nodes: list[Any], tensors: dict[str, Any], opset: int = 18, domain: str = "") -> ModelProto:
    """A graph from x [B, S, C] (and a state [1, B, C]) to y."""
    x = helper.make_tensor_value_info("x", F, ["B", "S", C])
    state = helper.make_tensor_value_info("state", F, [1, "B", C])
    y = helper.make_tensor_value_info("y", F, None)
    made = [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()]
    graph = helper.make_graph(nodes, "g", [x, state], [y], made)
    sets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=sets)


def op(kind: str, ins: str, outs: str, **attrs: Any) -> Any:
    """A node called after its first result."""
    return helper.make_node(kind, ins.split(), outs.split(), name=f"the_{outs.split()[0]}", **attrs)


def weight(*shape: int) -> Any:
    """Random numbers scaled by the fan-in."""
    return (np.random.default_rng(0).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def state_space(attention: bool, rate: str = "stored") -> ModelProto:
    """A filter per channel, then exp(step * rate) as gates; with `attention`, a softmax layer before it."""
    nodes = [op("Transpose", "x", "xt", perm=[0, 2, 1])]
    if attention:
        scores = [op("MatMul", "x xt", "s"), op("Softmax", "s", "p", axis=-1), op("MatMul", "p x", "h")]
        nodes += [*scores, op("Transpose", "h", "xt2", perm=[0, 2, 1])]
    source = "xt2" if attention else "xt"
    nodes += [
        op("Conv", f"{source} filter", "c", group=C, pads=[3, 0]),
        op("Transpose", "c", "ct", perm=[0, 2, 1]),
        op("MatMul", "ct w", "d"),
        op("Softplus", "d", "step"),
        op("Mul", "step rate" if rate == "stored" else "step ct", "product"),
        op("Exp", "product", "gate"),
        op("Mul", "gate ct", "y"),
    ]
    return built(nodes, {"filter": weight(C, 1, 4), "w": weight(C, C), "rate": -np.exp(weight(C))})


def body() -> Any:
    """A loop body that adds."""
    ins = [helper.make_tensor_value_info(n, F, None) for n in ("a", "b")]
    outs = [helper.make_tensor_value_info(n, F, None) for n in ("a2", "b2")]
    return helper.make_graph([op("Add", "a b", "a2"), op("Identity", "a2", "b2")], "body", ins, outs)


RNN = {"w": weight(1, 4 * C, C), "r": weight(1, 4 * C, C)}
FOREIGN: dict[str, tuple[Any, str]] = {
    "state space": (lambda: state_space(False), r"'the_c' \(Conv\): .*state-space recurrence"),
    "a hybrid with attention": (lambda: state_space(True), r"'the_c' \(Conv\): .*state-space recurrence"),
    "scan": (
        lambda: built([op("Scan", "state x", "y z", body=body(), num_scan_inputs=1)], {}),
        r"'the_y' \(Scan\): recurrence",
    ),
    "lstm": (lambda: built([op("LSTM", "x w r", "y", hidden_size=C)], RNN), r"'the_y' \(LSTM\): recurrence"),
    "gru": (lambda: built([op("GRU", "x w r", "y", hidden_size=C)], RNN), r"'the_y' \(GRU\): recurrence"),
    "rnn": (lambda: built([op("RNN", "x w r", "y", hidden_size=C)], RNN), r"'the_y' \(RNN\): recurrence"),
    "linear attention": (
        lambda: built([op("LinearAttention", "x x x state", "y", q_num_heads=1, kv_num_heads=1)], {}, 27),
        r"'the_y' \(LinearAttention\): linear-attention recurrence",
    ),
    "convolution with a state": (
        lambda: built([op("CausalConvWithState", "x f", "y")], {"f": weight(C, 1, 4)}, 27),
        r"'the_y' \(CausalConvWithState\): state-space recurrence",
    ),
    "a loop over experts": (
        lambda: built(
            [op("Greater", "x zero", "hit"), op("NonZero", "hit", "where"), op("GatherND", "x where", "y")],
            {"zero": np.float32(0)},
        ),
        r"'the_where' \(NonZero\): the size .* data, as in a loop over experts",
    ),
    "a convolutional net": (
        lambda: built([op("Conv", "x f", "c"), op("Relu", "c", "y")], {"f": weight(4, 3, 1)}),
        r"\(Conv\): a convolution in a graph without attention",
    ),
    "a branch on the data": (
        lambda: built(
            [
                op("ReduceMax", "x", "m", keepdims=0),
                op("Greater", "m zero", "hit"),
                op("If", "hit", "y", then_branch=branch("Relu"), else_branch=branch("Neg")),
            ],
            {"zero": np.float32(0)},
        ),
        r"'the_y' \(If\): the condition depends on the data",
    ),
    "another domain": (
        lambda: built([helper.make_node("Magic", ["x"], ["y"], name="n", domain="org.x")], {}, 18, "org.x"),
        r"'n' \(org.x.Magic\): unknown domain 'org.x'",
    ),
}


def branch(kind: str) -> Any:
    """A branch that reads x of the graph around it."""
    return helper.make_graph([op(kind, "x", kind)], kind, [], [helper.make_tensor_value_info(kind, F, None)])


@pytest.mark.parametrize("name", FOREIGN)
def test_refused_by_node_operator_and_reason(name: str, tmp_path: Path) -> None:
    make, text = FOREIGN[name]
    with pytest.raises(UnsupportedModelError, match=text):
        load(saved(make(), tmp_path))


def test_a_filter_that_sets_no_decay_is_a_convolution(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a convolution in a graph without attention"):
        load(saved(state_space(False, rate="data"), tmp_path))


def test_no_attention_and_no_convolution_is_accepted(tmp_path: Path) -> None:
    made = built(
        [op("MatMul", "x w", "h"), op("Relu", "h", "r"), op("MatMul", "r w", "y")], {"w": weight(C, C)}
    )
    assert load(saved(made, tmp_path)).layers == 0
    assert load(saved(decoder(Options(layers=1)), tmp_path, "decoder.onnx")).layers == 1
