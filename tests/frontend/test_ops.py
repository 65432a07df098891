"""Every lowering against onnxruntime: one node, random operands, with and without recognition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from mapper.driver import run
from mapper.frontend.load import load
from mapper.frontend.lower import LOWERINGS
from mapper.ir.reference import evaluate
from tests.frontend.tiny import oracle, saved, worst

Array = npt.NDArray[Any]
MS = "com.microsoft"
RNG = np.random.default_rng(5)


def f(*shape: int) -> Array:
    """Random normal floats."""
    return RNG.standard_normal(shape).astype(np.float32)


def i(*values: int) -> Array:
    """An int64 vector."""
    return np.array(values, np.int64)


def n(value: int) -> Array:
    """An int64 scalar."""
    return np.array(value, np.int64)


@dataclass
class Case:
    """One node: operands (None: absent; `fixed` ones are stored in the file), attributes, results."""

    op: str
    inputs: Sequence[Array | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    fixed: Sequence[int] = ()
    outputs: int = 1
    domain: str = ""
    opset: int = 17


X, MASK = f(2, 3, 4), RNG.random((2, 3, 4)) < 0.5
Q, K, V, PK, PV = f(2, 4, 3, 8), f(2, 2, 3, 8), f(2, 2, 3, 8), f(2, 2, 4, 8), f(2, 2, 4, 8)
SEEN = RNG.random((3, 3)) < 0.6
SEEN[:, 0] = True
LOW = np.where(SEEN, 0, -1e30).astype(np.float32)
ANGLE = np.arange(16)[:, None] * (100.0 ** (-np.arange(4) / 4))[None]
COS, SIN = np.cos(ANGLE).astype(np.float32), np.sin(ANGLE).astype(np.float32)
WIDE = np.arange(16)[:, None] * (100.0 ** (-np.arange(8) / 8))[None]
WIDE_COS, WIDE_SIN = np.cos(WIDE).astype(np.float32), np.sin(WIDE).astype(np.float32)
ENDS = [np.array([4, 4], np.int32), np.array(5, np.int32)]  # last index of each sequence, longest length
PLACES = np.array([[3, 4, 5], [7, 8, 9]])
BYTES = RNG.integers(0, 256, (6, 2, 16), dtype=np.uint8)

UNARY = [
    "Neg",
    "Abs",
    "Exp",
    "Sin",
    "Cos",
    "Tan",
    "Tanh",
    "Erf",
    "Sigmoid",
    "Relu",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Atan",
    "Softplus",
    "Identity",
]
BINARY = ["Add", "Sub", "Mul", "Div", "Min", "Max"]
COMPARE = ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]

CASES: dict[str, Case] = {
    **{op: Case(op, [X]) for op in UNARY},
    **{op: Case(op, [np.abs(X) + 0.1]) for op in ("Log", "Sqrt", "Reciprocal")},
    **{op: Case(op, [X, f(3, 1)]) for op in BINARY},
    **{op: Case(op, [np.round(X), np.round(f(4))]) for op in COMPARE},
    **{op: Case(op, [MASK, RNG.random(4) < 0.5]) for op in ("And", "Or", "Xor")},
    **{op: Case(op, [X, X, X]) for op in ("Sum", "Mean")},
    "Not": Case("Not", [MASK]),
    "IsNaN": Case("IsNaN", [np.where(MASK, np.nan, X).astype(np.float32)]),
    "IsInf": Case("IsInf", [np.where(MASK, np.inf, X).astype(np.float32)]),
    "Pow": Case("Pow", [np.abs(X), np.array(1.7, np.float32)], fixed=[1]),
    "Pow cube": Case("Pow", [X, np.array(3.0, np.float32)], fixed=[1]),
    "Mod": Case("Mod", [i(7, -7, 5), i(3, 3, -3)]),
    "Mod C": Case("Mod", [X, f(4)], {"fmod": 1}),
    "Clip": Case("Clip", [X, np.array(-0.5, np.float32), np.array(0.5, np.float32)], fixed=[1, 2]),
    "Where": Case("Where", [MASK, X, f(4)]),
    "Cast": Case("Cast", [X * 3], {"to": TensorProto.INT64}),
    "CastLike": Case("CastLike", [X * 3, i(1)]),
    "LeakyRelu": Case("LeakyRelu", [X], {"alpha": 0.2}),
    "Swish": Case("Swish", [X], {"alpha": 1.5}, opset=24),
    "Gelu": Case("Gelu", [X], opset=20),
    "Gelu tanh": Case("Gelu", [X], {"approximate": "tanh"}, opset=20),
    "Shape": Case("Shape", [X], {"start": -2}),
    "Size": Case("Size", [X]),
    "ConstantOfShape": Case("ConstantOfShape", [i(2, 3)], fixed=[0]),
    "Constant": Case("Constant", [], {"value_floats": [1.0, 2.0]}),
    "Reshape": Case("Reshape", [X, i(0, -1)], fixed=[1]),
    "Flatten": Case("Flatten", [X], {"axis": -1}),
    "Unsqueeze": Case("Unsqueeze", [X, i(0, -1)], fixed=[1]),
    "Squeeze": Case("Squeeze", [f(1, 3, 1), i(-1)], fixed=[1]),
    "Transpose": Case("Transpose", [X], {"perm": [2, 0, 1]}),
    "Transpose all": Case("Transpose", [X]),
    "Expand": Case("Expand", [f(3, 1), i(2, 1, 4)], fixed=[1]),
    "Tile": Case("Tile", [X, i(1, 2, 3)], fixed=[1]),
    "Concat": Case("Concat", [X, f(2, 1, 4)], {"axis": 1}),
    "Split": Case("Split", [X, i(1, 3)], {"axis": 2}, fixed=[1], outputs=2),
    "Split uneven": Case("Split", [f(2, 7)], {"axis": 1, "num_outputs": 3}, outputs=3, opset=18),
    "Slice": Case("Slice", [X, i(1, -3), i(99, -1), i(1, 2), i(1, 1)], fixed=[1, 2, 3, 4]),
    "Slice back": Case("Slice", [X, i(-1), i(-99), i(2), i(-2)], fixed=[1, 2, 3, 4]),
    "Gather": Case("Gather", [X, np.array([[0, -1]])], {"axis": 1}),
    "Gather one": Case("Gather", [X, n(-1)], {"axis": 2}, fixed=[1]),
    "GatherElements": Case("GatherElements", [X, RNG.integers(-3, 3, (2, 2, 4))], {"axis": 1}),
    "GatherND": Case("GatherND", [X, np.array([[0, 1], [1, -1]])]),
    "ScatterND": Case("ScatterND", [X, np.array([[0, 1], [1, 2]]), f(2, 4)]),
    "ScatterElements": Case("ScatterElements", [X, RNG.integers(0, 2, (1, 3, 4)), f(1, 3, 4)], {"axis": 0}),
    "TensorScatter": Case("TensorScatter", [PK, f(2, 2, 2, 8), i(2, 0)], opset=24),
    "TensorScatter circular": Case(
        "TensorScatter", [f(2, 5, 4), f(2, 3, 4), i(4, 1)], {"axis": 1, "mode": "circular"}, opset=24
    ),
    "TensorScatter from 0": Case("TensorScatter", [f(2, 4, 5, 3), f(2, 1, 5, 3)], {"axis": -3}, opset=24),
    "Range": Case("Range", [n(2), n(11), n(3)], fixed=[0, 1, 2]),
    "CumSum": Case("CumSum", [X, n(1)], {"exclusive": 1, "reverse": 1}, fixed=[1]),
    "Trilu": Case("Trilu", [f(4, 4), n(1)], {"upper": 0}, fixed=[1]),
    "Pad": Case("Pad", [X, i(1, 2), np.array(0.5, np.float32), i(2)], fixed=[1, 2, 3], opset=18),
    "TopK": Case("TopK", [X, i(2)], {"axis": 1}, fixed=[1], outputs=2),
    "ArgMax": Case("ArgMax", [X], {"axis": 1, "keepdims": 0}),
    "OneHot": Case("OneHot", [np.array([[0, 2], [1, 1]]), n(3), np.array([0.5, 2.0], np.float32)], fixed=[1]),
    "EyeLike": Case("EyeLike", [f(3, 4)], {"k": 1}),
    "ReduceSum": Case("ReduceSum", [X, i(0, -1)], {"keepdims": 0}, fixed=[1]),
    "ReduceMean": Case("ReduceMean", [X], {"axes": [1]}),
    "ReduceMax": Case("ReduceMax", [X]),
    "ReduceMin": Case("ReduceMin", [X, i(1)], fixed=[1], opset=18),
    "ReduceProd": Case("ReduceProd", [X], {"axes": [1]}),
    "ReduceL2": Case("ReduceL2", [X], {"axes": [2]}),
    "ReduceSumSquare": Case("ReduceSumSquare", [X], {"axes": [2]}),
    "MatMul": Case("MatMul", [X, f(4, 5)]),
    "MatMul vector": Case("MatMul", [X, f(4)]),
    "Gemm": Case("Gemm", [f(3, 4), f(5, 4), f(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "Gemm A": Case("Gemm", [f(4, 3), f(4, 5)], {"transA": 1}, fixed=[1]),
    "Softmax": Case("Softmax", [X], {"axis": 1}),
    "Softmax flat": Case("Softmax", [X], {"axis": 1}, opset=11),
    "LogSoftmax": Case("LogSoftmax", [X]),
    "LayerNormalization": Case("LayerNormalization", [X, f(4), f(4)], {"epsilon": 1e-3}),
    "LayerNormalization two axes": Case("LayerNormalization", [X, f(3, 4)], {"axis": 1}),
    "RMSNormalization": Case("RMSNormalization", [X, f(4)], {"epsilon": 1e-3}, opset=23),
    "Conv": Case("Conv", [f(2, 4, 9), f(6, 2, 3), f(6)], {"group": 2, "strides": [2], "pads": [1, 2]}),
    "RotaryEmbedding": Case("RotaryEmbedding", [Q, COS, SIN, PLACES], opset=23),
    "RotaryEmbedding pairs": Case("RotaryEmbedding", [Q, COS, SIN, PLACES], {"interleaved": 1}, opset=23),
    "RotaryEmbedding flat": Case(
        "RotaryEmbedding", [f(2, 3, 32), COS[:, :2], SIN[:, :2], PLACES],
        {"num_heads": 4, "rotary_embedding_dim": 4}, opset=23,
    ),
    "Attention": Case("Attention", [Q, K, V], opset=23),
    "Attention bool": Case("Attention", [Q, K, V, SEEN], opset=23),
    "Attention capped": Case("Attention", [Q, K, V, LOW], {"softcap": 2.0, "scale": 0.7}, opset=23),
    "Attention causal": Case("Attention", [Q, K, V], {"is_causal": 1}, opset=24),
    "Attention past": Case("Attention", [Q, K, V, None, PK, PV], {"is_causal": 1}, outputs=3, opset=23),
    "Attention flat": Case(
        "Attention", [f(2, 3, 32), f(2, 5, 16), f(2, 5, 16)], {"q_num_heads": 4, "kv_num_heads": 2}, opset=23
    ),
    **{op: Case(op, [X]) for op in ("Softsign", "Shrink", "ThresholdedRelu")},
    "BitShift": Case(
        "BitShift", [np.array([1, 9, 200], np.uint8), np.array([1, 2, 3], np.uint8)], {"direction": "LEFT"}
    ),
    "DynamicQuantizeLinear": Case("DynamicQuantizeLinear", [X], outputs=3),
    "MatMulInteger": Case(
        "MatMulInteger", [BYTES[:, 0], BYTES[0].T.copy(), np.array(7, np.uint8)], fixed=[1, 2]
    ),
    "Resize": Case(
        "Resize", [f(1, 2, 3, 4), None, None, i(1, 2, 6, 12)],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, fixed=[3],
    ),
    "MS Gelu": Case("Gelu", [X], domain=MS),
    "MS FastGelu": Case("FastGelu", [X, f(4)], domain=MS),
    "MS BiasGelu": Case("BiasGelu", [X, f(4)], domain=MS),
    "MS QuickGelu": Case("QuickGelu", [X], {"alpha": 1.3}, domain=MS),
    "MS SkipLayerNormalization": Case(
        "SkipLayerNormalization", [X, f(2, 3, 4), f(4), f(4), f(4)], {"epsilon": 1e-3}, domain=MS
    ),
    "MS SkipSimplified": Case(
        "SkipSimplifiedLayerNormalization", [X, f(2, 3, 4), f(4), f(4)], {"epsilon": 1e-3}, domain=MS
    ),
    "SimplifiedLayerNormalization": Case(
        "SimplifiedLayerNormalization", [X, f(4)], {"epsilon": 1e-3, "axis": -1}
    ),
    "MS EmbedLayerNormalization": Case(
        "EmbedLayerNormalization",
        [np.array([[1, 2, 3], [4, 0, 2]], np.int32), np.array([[0, 0, 1], [1, 1, 0]], np.int32), f(5, 8),
         f(3, 8),
         f(2, 8), f(8), f(8), np.array([[1, 1, 1], [1, 1, 0]], np.int32)],
        {"epsilon": 1e-3}, outputs=2, domain=MS,
    ),
    "MS RotaryEmbedding": Case("RotaryEmbedding", [f(2, 3, 32), PLACES, COS, SIN], domain=MS),
    "MS RotaryEmbedding offset": Case(
        "RotaryEmbedding", [Q, i(5), COS, SIN], {"interleaved": 1}, domain=MS
    ),
    "MS GroupQueryAttention": Case(
        "GroupQueryAttention",
        [f(2, 1, 64), f(2, 1, 32), f(2, 1, 32), f(2, 2, 4, 16), f(2, 2, 4, 16), *ENDS, WIDE_COS, WIDE_SIN],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
        outputs=3, domain=MS,
    ),
    "MS GroupQueryAttention packed": Case(
        "GroupQueryAttention",
        [f(2, 5, 128), None, None, f(2, 2, 0, 16), f(2, 2, 0, 16), *ENDS, WIDE_COS, WIDE_SIN],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": 2, "softcap": 3.0,
         "scale": 0.5,
         "rotary_interleaved": 1},
        outputs=3, domain=MS,
    ),
    "MS GroupQueryAttention buffer": Case(
        "GroupQueryAttention",
        [f(2, 1, 64), f(2, 1, 32), f(2, 1, 32), f(2, 2, 9, 16), f(2, 2, 9, 16), np.array([4, 6], np.int32),
         np.array(7, np.int32), WIDE_COS, WIDE_SIN, None, f(1, 4, 1, 7)],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": 3},
        outputs=3, domain=MS,
    ),
    "MS GroupQueryAttention uneven": Case(
        "GroupQueryAttention",
        [f(2, 1, 64), f(2, 1, 32), f(2, 1, 32), f(2, 2, 6, 16), f(2, 2, 6, 16), np.array([4, 6], np.int32),
         np.array(7, np.int32), WIDE_COS, WIDE_SIN],
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1},
        outputs=3, domain=MS,
    ),
    "MS MultiHeadAttention buffer": Case(
        "MultiHeadAttention",
        [f(2, 3, 32), f(2, 3, 32), f(2, 3, 32), f(96),
         np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], np.int32), f(1, 4, 3, 5),
         f(2, 4, 7, 8), f(2, 4, 7, 8), np.array(2, np.int32)],
        {"num_heads": 4, "unidirectional": 1}, outputs=3, domain=MS,
    ),
    "MS DecoderMaskedMultiHeadAttention": Case(
        "DecoderMaskedMultiHeadAttention",
        [f(2, 1, 32), f(2, 1, 32), f(2, 1, 32), np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], np.int32),
         f(1, 4, 1, 5), f(2, 4, 7, 8), f(2, 4, 7, 8), np.array(4, np.int32), None, None, f(96)],
        {"num_heads": 4, "past_present_share_buffer": 1, "scale": 0.4}, outputs=3, domain=MS,
    ),
    "MS MultiHeadAttention": Case(
        "MultiHeadAttention",
        [f(2, 3, 32), f(2, 5, 32), f(2, 5, 32), f(96), None, f(1, 4, 3, 5)], {"num_heads": 4}, domain=MS,
    ),
    "MS MultiHeadAttention past": Case(
        "MultiHeadAttention",
        [f(2, 3, 32), f(2, 3, 32), f(2, 3, 32), None,
         np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], np.int32), None,
         f(2, 4, 2, 8), f(2, 4, 2, 8)], {"num_heads": 4, "unidirectional": 1}, outputs=3, domain=MS,
    ),
    "MS Attention": Case(
        "Attention", [f(2, 3, 16), f(16, 48), f(48), np.array([[1, 1, 1], [1, 1, 0]], np.int32)],
        {"num_heads": 2}, domain=MS,
    ),
    "MS Attention lengths": Case(
        "Attention", [f(2, 3, 16), f(16, 48), f(48), np.array([3, 2], np.int32)], {"num_heads": 2}, domain=MS
    ),
    "MS Attention past": Case(
        "Attention", [f(2, 3, 16), f(16, 48), f(48), None, f(2, 2, 2, 4, 8)],
        {"num_heads": 2, "unidirectional": 1},
        outputs=2, domain=MS,
    ),
    "MS MatMulNBits": Case(
        "MatMulNBits", [f(2, 3, 64), BYTES, np.abs(f(12))], {"K": 64, "N": 6, "bits": 4, "block_size": 32},
        fixed=[1, 2], domain=MS,
    ),
    "MS MatMulNBits points": Case(
        "MatMulNBits", [f(2, 60), BYTES, np.abs(f(12)), RNG.integers(0, 256, 6, dtype=np.uint8)],
        {"K": 60, "N": 6, "bits": 4, "block_size": 32}, fixed=[1, 2, 3], domain=MS,
    ),
    "MS MatMulNBits 8": Case(
        "MatMulNBits", [f(2, 64), RNG.integers(0, 256, (6, 2, 32), dtype=np.uint8), np.abs(f(12))],
        {"K": 64, "N": 6, "bits": 8, "block_size": 32}, fixed=[1, 2], domain=MS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_lowering_equals_onnxruntime(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


def feed_of(case: Case) -> dict[str, Array]:
    """The operands that are inputs, by name."""
    return {f"x{k}": a for k, a in enumerate(case.inputs) if a is not None and k not in case.fixed}


def model_of(case: Case) -> ModelProto:
    """The case as a model of one node."""
    names = ["" if a is None else f"x{k}" for k, a in enumerate(case.inputs)]
    outputs = [f"y{k}" for k in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="it", domain=case.domain, **case.attrs)
    inputs = [
        helper.make_tensor_value_info(m, helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape))
        for m, a in feed_of(case).items()
    ]
    stored = [
        numpy_helper.from_array(a, f"x{k}")
        for k, a in enumerate(case.inputs)
        if a is not None and k in case.fixed
    ]
    graph = helper.make_graph([node], "g", inputs, [ValueInfoProto(name=o) for o in outputs], stored)
    opsets = [helper.make_opsetid("", case.opset), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def check(case: Case, tmp_path: Path, limit: float = 1e-5, kernels: bool = False) -> None:
    """Compares one node with onnxruntime, by the reference and where asked by the host's kernels."""
    model, feed = model_of(case), feed_of(case)
    path = saved(model, tmp_path)
    expected = oracle(model, feed)
    if case.op == "Conv":  # alone it is no transformer
        with pytest.raises(Exception, match="not a transformer"):
            load(path)
        return
    for recognise in (False, True):
        got = evaluate(load(path, recognise), feed)
        for key, value in expected.items():
            assert got[key].dtype == value.dtype, key
        assert worst(got, expected) < limit
    if kernels:
        assert worst(run(load(path), feed), expected) < limit


def test_every_registered_operator_has_a_case() -> None:
    from tests.frontend import test_contrib, test_nodes

    cases = [*CASES.values(), *test_contrib.CASES.values(), *(c for c, _ in test_contrib.STATED.values())]
    covered = {(c.domain, c.op) for c in cases}
    covered |= {
        ("", node.op_type) for n in test_nodes.chosen() for node in test_nodes.cases()[n].model.graph.node
    }
    same = {("", "Dropout"), ("", "Scatter")}
    twins = {("", op) for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")}
    twins |= {(MS, op) for op in ("SimplifiedLayerNormalization", "LayerNormalization")}
    elsewhere = {(MS, "MoE"), (MS, "QMoE")}  # test_experts.py, test_packed.py
    missing = {k for k in LOWERINGS if k not in covered | same | twins | elsewhere}
    assert not missing
