"""Contrib operators in their rarer forms against onnxruntime, by the reference and by the host's kernels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mapper.driver import run
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from tests.frontend.test_ops import (
    COS,
    ENDS,
    MS,
    PK,
    PV,
    SIN,
    WIDE_COS,
    WIDE_SIN,
    Array,
    Case,
    check,
    f,
    feed_of,
    i,
    model_of,
)
from tests.frontend.tiny import saved, worst

RNG = np.random.default_rng(11)
BIAS = f(2, 4, 3, 3)
BYTES = RNG.integers(0, 255, (2, 3, 16), dtype=np.uint8)
SIGNED = RNG.integers(-127, 127, (16, 48), dtype=np.int8)
GQA = {"num_heads": 4, "kv_num_heads": 2}
CACHED = [f(2, 1, 64), f(2, 1, 32), f(2, 1, 32), f(2, 2, 4, 16), f(2, 2, 4, 16), *ENDS]
PROMPT = [
    f(2, 3, 64),
    f(2, 3, 32),
    f(2, 3, 32),
    None,
    None,
    np.array([2, 2], np.int32),
    np.array(3, np.int32),
]


def s(value: float) -> Array:
    """A float scalar."""
    return np.array(value, np.float32)


def z(value: int) -> Array:
    """A byte."""
    return np.array(value, np.uint8)


CASES: dict[str, Case] = {
    "FusedMatMul": Case(
        "FusedMatMul", [f(2, 4, 3), f(2, 5, 4)], {"alpha": 0.5, "transA": 1, "transB": 1}, domain=MS
    ),
    "FusedMatMul batch": Case("FusedMatMul", [f(3, 2, 4), f(2, 4, 5)], {"transBatchA": 1}, domain=MS),
    "FusedGemm": Case(
        "FusedGemm", [f(3, 4), f(4, 5), f(5)], {"activation": "LeakyRelu", "activation_alpha": 0.3}, domain=MS
    ),
    "Attention widths": Case(
        "Attention",
        [f(2, 3, 16), f(16, 44), f(44)],
        {"num_heads": 2, "qkv_hidden_sizes": [16, 16, 12]},
        domain=MS,
    ),
    "Attention ends and starts": Case(
        "Attention",
        [f(2, 3, 16), f(16, 48), f(48), np.array([3, 3, 0, 1], np.int32)],
        {"num_heads": 2},
        domain=MS,
    ),
    "Attention causal bias": Case(
        "Attention",
        [f(2, 3, 16), f(16, 48), f(48), np.array([[1, 1, 1], [1, 1, 0]], np.int32), None, f(2, 2, 3, 3)],
        {"num_heads": 2, "unidirectional": 1},
        domain=MS,
    ),
    "MultiHeadAttention cross": Case(
        "MultiHeadAttention", [f(2, 3, 32), f(2, 4, 5, 8), f(2, 4, 5, 8)], {"num_heads": 4}, domain=MS
    ),
    "MultiHeadAttention bias mask": Case(
        "MultiHeadAttention",
        [
            f(2, 3, 32),
            f(2, 3, 32),
            f(2, 3, 32),
            f(96),
            np.array([[1, 1, 1], [1, 1, 0]], np.int32),
            f(1, 1, 3, 3),
        ],
        {"num_heads": 4},
        domain=MS,
    ),
    "MultiHeadAttention past": Case(
        "MultiHeadAttention",
        [f(2, 3, 16), f(2, 3, 16), f(2, 3, 16), None, None, f(2, 2, 3, 7), PK, PV],
        {"num_heads": 2, "unidirectional": 1},
        outputs=3,
        domain=MS,
    ),
    "GroupQueryAttention packed": Case(
        "GroupQueryAttention", [f(2, 1, 128), None, None, *CACHED[3:]], {**GQA}, outputs=3, domain=MS
    ),
    "GroupQueryAttention rotary": Case(
        "GroupQueryAttention",
        [*PROMPT, WIDE_COS, WIDE_SIN],
        {**GQA, "do_rotary": 1, "rotary_interleaved": 1},
        outputs=3,
        domain=MS,
    ),
    "GroupQueryAttention positions": Case(
        "GroupQueryAttention",
        [*CACHED, WIDE_COS, WIDE_SIN, np.array([[4], [4]])],
        {**GQA, "do_rotary": 1},
        outputs=3,
        domain=MS,
    ),
    "GroupQueryAttention smooth": Case(
        "GroupQueryAttention", PROMPT, {**GQA, "smooth_softmax": 1}, outputs=3, domain=MS
    ),
    "GroupQueryAttention sinks": Case(
        "GroupQueryAttention",
        [*PROMPT, None, None, None, None, f(4)],
        {**GQA},
        fixed=[11],
        outputs=3,
        domain=MS,
    ),
    "GroupQueryAttention capped window": Case(
        "GroupQueryAttention", CACHED, {**GQA, "softcap": 1.5, "local_window_size": 3}, outputs=3, domain=MS
    ),
    "GroupQueryAttention bias": Case(
        "GroupQueryAttention", [*PROMPT, None, None, None, BIAS], {**GQA}, outputs=3, domain=MS
    ),
    "GroupQueryAttention odd heads": Case(
        "GroupQueryAttention",
        [f(2, 3, 96), f(2, 3, 48), f(2, 3, 48), *PROMPT[3:]],
        {**GQA},
        outputs=3,
        domain=MS,
    ),
    "GroupQueryAttention shares": Case(
        "GroupQueryAttention", PROMPT, {**GQA, "qk_output": 2}, outputs=4, domain=MS
    ),
    "GroupQueryAttention both ways": Case(
        "GroupQueryAttention", PROMPT, {**GQA, "causal": 0}, outputs=3, domain=MS
    ),
    "RotaryEmbedding partial": Case(
        "RotaryEmbedding",
        [f(2, 3, 64), i(0), COS, SIN],
        {"num_heads": 4, "rotary_embedding_dim": 8},
        domain=MS,
    ),
    "SkipLayerNormalization sums": Case(
        "SkipLayerNormalization", [f(2, 3, 4), f(3, 4), f(4), f(4), f(4)], outputs=1, domain=MS
    ),
    "QAttention": Case(
        "QAttention",
        [BYTES, SIGNED, f(48), s(0.02), s(0.03), None, z(120), np.array(2, np.int8)],
        {"num_heads": 2},
        fixed=[1, 2, 3, 4, 6, 7],
        domain=MS,
    ),
    "MatMulIntegerToFloat": Case(
        "MatMulIntegerToFloat",
        [BYTES, SIGNED, s(0.02), f(48), z(120), None, f(48)],
        fixed=[1, 2, 3, 4, 6],
        domain=MS,
    ),
    "DynamicQuantizeMatMul": Case(
        "DynamicQuantizeMatMul",
        [f(2, 3, 16), SIGNED, s(0.03), np.array(3, np.int8), f(48)],
        fixed=[1, 2, 3, 4],
        domain=MS,
    ),
    "QLinearAdd": Case(
        "QLinearAdd",
        [BYTES, s(0.02), z(120), BYTES[:, ::-1].copy(), s(0.03), z(100), s(0.05), z(110)],
        fixed=[1, 2, 4, 5, 6, 7],
        domain=MS,
    ),
    "QLinearMul": Case(
        "QLinearMul",
        [BYTES, s(0.02), z(120), BYTES[:, ::-1].copy(), s(0.03), z(100), s(0.05), z(110)],
        fixed=[1, 2, 4, 5, 6, 7],
        domain=MS,
    ),
    "QLinearSigmoid": Case(
        "QLinearSigmoid", [BYTES, s(0.02), z(120), s(0.004), z(0)], fixed=[1, 2, 3, 4], domain=MS
    ),
    "QLinearLeakyRelu": Case(
        "QLinearLeakyRelu",
        [BYTES, s(0.02), z(120), s(0.02), z(50)],
        {"alpha": 0.2},
        fixed=[1, 2, 3, 4],
        domain=MS,
    ),
    "QuantizeLinear": Case("QuantizeLinear", [f(2, 3), s(0.02), z(120)], fixed=[1, 2], domain=MS),
    "DequantizeLinear": Case("DequantizeLinear", [BYTES, s(0.02), z(120)], fixed=[1, 2], domain=MS),
    "QLinearSoftmax": Case(
        "QLinearSoftmax",
        [BYTES, s(0.02), z(120), s(0.004), z(0)],
        {"opset": 13, "axis": -1},
        fixed=[1, 2, 3, 4],
        domain=MS,
    ),
    "GatherBlockQuantized": Case(
        "GatherBlockQuantized",
        [RNG.integers(0, 255, (7, 16), dtype=np.uint8), i(3, 0, 6), np.abs(f(7, 1))],
        {"block_size": 32, "bits": 4},
        fixed=[0, 2],
        domain=MS,
    ),
    "GatherBlockQuantized points": Case(
        "GatherBlockQuantized",
        [
            RNG.integers(0, 255, (7, 32), dtype=np.uint8),
            i(3, 0, 6),
            np.abs(f(7, 2)),
            RNG.integers(0, 255, (7, 2), dtype=np.uint8),
        ],
        {"block_size": 16, "bits": 8},
        fixed=[0, 2, 3],
        domain=MS,
    ),
}


STEPS = {"QLinearMul": 1.01 / 255, "QLinearSoftmax": 1.01 / 101}  # one step of the largest result


@pytest.mark.parametrize("name", CASES)
def test_form_equals_onnxruntime(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path, STEPS.get(name, 1e-5), kernels=True)


def softmax(x: Array) -> Array:
    """Over the last axis."""
    y = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(y / y.sum(-1, keepdims=True))


def attended(q: Array, k: Array, v: Array) -> Array:
    """Attention over [B, S, H, D], as rows of H * D."""
    shares = softmax(np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1]))
    return np.asarray(np.einsum("bhst,bthd->bshd", shares, v).reshape(*q.shape[:2], -1))


def gelu_tanh(x: Array) -> Array:
    """The tanh form, arXiv:1606.08415."""
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def gated(rows: Array, bias: Array, places: Array, weights: Array, shift: Array, factor: Array) -> Array:
    """The documented formula: (u (r a - 1) + 2) times the position biases."""
    heads = factor.shape[1]
    x = (rows + bias).reshape(*rows.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    sums = (x @ weights + shift).reshape(*x.shape[:3], 2, -1).sum(-1)
    u, r = np.split(1 / (1 + np.exp(-sums)), 2, axis=-1)
    return np.asarray((u * (r * factor - 1.0) + 2.0) * places)


def t5_bias(table: Array, length: int, both: bool, furthest: int) -> Array:
    """The bias of T5 pair by pair: exact buckets for near keys, then logarithmic ones; arXiv:1910.10683."""
    out = np.zeros((1, table.shape[1], length, length), np.float32)
    for query in range(length):
        for key in range(length):
            count, first, apart = len(table), 0, query - key
            if both:
                count //= 2
                first, apart = (count if key > query else 0), abs(apart)
            apart, exact = max(apart, 0), count // 2
            if apart >= exact:
                ratio = np.log(apart / exact) / np.log(furthest / exact)
                apart = min(exact + int(ratio * (count - exact)), count - 1)
            out[0, :, query, key] = table[first + apart]
    return out


QKV, ROWS, KEYS = f(2, 3, 4, 3, 8), f(2, 3, 32), f(2, 5, 4, 2, 8)
SCORES, OUTER, INNER, TABLE, SHORT = f(2, 3, 4, 5), f(1, 1, 4, 5), f(2, 1, 1, 5), f(32, 4), f(8, 4)
STREAM, SPLIT_BIAS, SKIP = f(2, 3, 8), f(8), f(2, 3, 8)
GATED = [f(2, 3, 32), f(32), f(1, 4, 3, 3), f(8, 6), f(6), f(1, 4, 1, 1)]
ERF = np.vectorize(math.erf)
LEFT, RIGHT = np.split(STREAM + SPLIT_BIAS, 2, axis=-1)
STATED: dict[str, tuple[Case, Array]] = {
    "packed": (
        Case("MultiHeadAttention", [QKV], {"num_heads": 4}, domain=MS),
        attended(*(QKV[:, :, :, n] for n in range(3))),
    ),
    "packed keys": (
        Case("MultiHeadAttention", [ROWS, KEYS], {"num_heads": 4}, domain=MS),
        attended(ROWS.reshape(2, 3, 4, 8), KEYS[:, :, :, 0], KEYS[:, :, :, 1]),
    ),
    "softmax inner": (
        Case("BiasSoftmax", [SCORES, INNER], {"axis": 3, "is_inner_broadcast": 1}, domain=MS),
        softmax(SCORES + INNER),
    ),
    "softmax outer": (
        Case("BiasSoftmax", [SCORES, OUTER], {"axis": 3, "is_inner_broadcast": 0}, domain=MS),
        softmax(SCORES + OUTER),
    ),
    "positions": (
        Case("RelativePositionBias", [TABLE, i(9), i(9)], {"is_bidirectional": 1}, fixed=[1, 2], domain=MS),
        t5_bias(TABLE, 9, True, 128),
    ),
    "positions causal": (
        Case("RelativePositionBias", [SHORT, i(40), i(40)], {"max_distance": 21}, fixed=[1, 2], domain=MS),
        t5_bias(SHORT, 40, False, 21),
    ),
    "bias add": (
        Case("BiasAdd", [STREAM, SPLIT_BIAS, SKIP], domain=MS),
        STREAM + SPLIT_BIAS + SKIP,
    ),
    "split gelu": (
        Case("BiasSplitGelu", [STREAM, SPLIT_BIAS], domain=MS),
        LEFT * 0.5 * RIGHT * (1 + ERF(RIGHT / math.sqrt(2))),
    ),
    "gemm gelu": (Case("GemmFastGelu", [STREAM, SHORT], domain=MS), gelu_tanh(STREAM @ SHORT)),
    "activated": (
        Case("FusedMatMulActivation", [STREAM, SHORT], {"activation": "Relu"}, domain=MS),
        np.maximum(STREAM @ SHORT, 0),
    ),
    "transposed": (
        Case("TransposeMatMul", [STREAM, SHORT.T.copy()], {"transB": 1, "alpha": 0.5}, domain=MS),
        0.5 * STREAM @ SHORT,
    ),
    "gated positions": (
        Case("GatedRelativePositionBias", GATED, {"num_heads": 4}, domain=MS),
        gated(GATED[0], GATED[1], GATED[2], GATED[3], GATED[4], GATED[5]),
    ),
}  # of operators that onnxruntime has for GPUs only


@pytest.mark.parametrize("name", STATED)
def test_form_equals_its_statement(name: str, tmp_path: Path) -> None:
    case, want = STATED[name]
    graph, feed = load(saved(model_of(case), tmp_path)), feed_of(case)
    for got in (evaluate(graph, feed), run(graph, feed)):
        assert worst(got, {"y0": want}) < 1e-5
