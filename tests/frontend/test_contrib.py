"""Contrib operators in their rarer forms against onnxruntime, by the reference and by the host's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.frontend.test_ops import COS, ENDS, MS, PK, PV, SIN, WIDE_COS, WIDE_SIN, Case, check, f, i

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


def s(value: float) -> np.ndarray:
    """A float scalar."""
    return np.array(value, np.float32)


def z(value: int) -> np.ndarray:
    """A byte."""
    return np.array(value, np.uint8)


CASES: dict[str, Case] = {
    "FusedMatMul": Case("FusedMatMul", [f(2, 4, 3), f(2, 5, 4)], {"alpha": 0.5, "transA": 1, "transB": 1}, domain=MS),
    "FusedMatMul batch": Case("FusedMatMul", [f(3, 2, 4), f(2, 4, 5)], {"transBatchA": 1}, domain=MS),
    "FusedGemm": Case("FusedGemm", [f(3, 4), f(4, 5), f(5)], {"activation": "LeakyRelu", "activation_alpha": 0.3}, domain=MS),
    "BiasSoftmax inner": Case("BiasSoftmax", [f(2, 3, 4, 5), f(2, 1, 1, 5)], {"axis": 3, "is_inner_broadcast": 1}, domain=MS),
    "BiasSoftmax outer": Case("BiasSoftmax", [f(2, 3, 4, 5), f(1, 1, 4, 5)], {"axis": 3, "is_inner_broadcast": 0}, domain=MS),
    "Attention widths": Case("Attention", [f(2, 3, 16), f(16, 44), f(44)], {"num_heads": 2, "qkv_hidden_sizes": [16, 16, 12]}, domain=MS),
    "Attention ends and starts": Case("Attention", [f(2, 3, 16), f(16, 48), f(48), np.array([3, 3, 0, 1], np.int32)], {"num_heads": 2}, domain=MS),
    "Attention causal bias": Case("Attention", [f(2, 3, 16), f(16, 48), f(48), np.array([[1, 1, 1], [1, 1, 0]], np.int32), None, f(2, 2, 3, 3)], {"num_heads": 2, "unidirectional": 1}, domain=MS),
    "MultiHeadAttention packed": Case("MultiHeadAttention", [f(2, 3, 4, 3, 8)], {"num_heads": 4}, domain=MS),
    "MultiHeadAttention packed keys": Case("MultiHeadAttention", [f(2, 3, 32), f(2, 5, 4, 2, 8)], {"num_heads": 4}, domain=MS),
    "MultiHeadAttention cross": Case("MultiHeadAttention", [f(2, 3, 32), f(2, 4, 5, 8), f(2, 4, 5, 8)], {"num_heads": 4}, domain=MS),
    "MultiHeadAttention bias mask": Case("MultiHeadAttention", [f(2, 3, 32), f(2, 3, 32), f(2, 3, 32), f(96), np.array([[1, 1, 1], [1, 1, 0]], np.int32), f(1, 1, 3, 3)], {"num_heads": 4}, domain=MS),
    "MultiHeadAttention past": Case("MultiHeadAttention", [f(2, 3, 16), f(2, 3, 16), f(2, 3, 16), None, None, f(2, 2, 3, 7), PK, PV], {"num_heads": 2, "unidirectional": 1}, outputs=3, domain=MS),
    "GroupQueryAttention packed": Case("GroupQueryAttention", [f(2, 1, 128), None, None, *CACHED[3:]], {**GQA}, outputs=3, domain=MS),
    "GroupQueryAttention rotary": Case("GroupQueryAttention", [*PROMPT, WIDE_COS, WIDE_SIN], {**GQA, "do_rotary": 1, "rotary_interleaved": 1}, outputs=3, domain=MS),
    "GroupQueryAttention positions": Case("GroupQueryAttention", [*CACHED, WIDE_COS, WIDE_SIN, np.array([[4], [4]])], {**GQA, "do_rotary": 1}, outputs=3, domain=MS),
    "GroupQueryAttention smooth": Case("GroupQueryAttention", PROMPT, {**GQA, "smooth_softmax": 1}, outputs=3, domain=MS),
    "GroupQueryAttention sinks": Case("GroupQueryAttention", [*PROMPT, None, None, None, None, f(4)], {**GQA}, fixed=[11], outputs=3, domain=MS),
    "GroupQueryAttention capped window": Case("GroupQueryAttention", CACHED, {**GQA, "softcap": 1.5, "local_window_size": 3}, outputs=3, domain=MS),
    "GroupQueryAttention bias": Case("GroupQueryAttention", [*PROMPT, None, None, None, BIAS], {**GQA}, outputs=3, domain=MS),
    "GroupQueryAttention odd heads": Case("GroupQueryAttention", [f(2, 3, 40), f(2, 3, 20), f(2, 3, 20), *PROMPT[3:]], {**GQA}, outputs=3, domain=MS),
    "GroupQueryAttention shares": Case("GroupQueryAttention", PROMPT, {**GQA, "qk_output": 2}, outputs=4, domain=MS),
    "GroupQueryAttention both ways": Case("GroupQueryAttention", PROMPT, {**GQA, "causal": 0}, outputs=3, domain=MS),
    "RotaryEmbedding partial": Case("RotaryEmbedding", [f(2, 3, 64), i(0), COS, SIN], {"num_heads": 4, "rotary_embedding_dim": 8}, domain=MS),
    "SkipLayerNormalization sums": Case("SkipLayerNormalization", [f(2, 3, 4), f(3, 4), f(4), f(4), f(4)], outputs=1, domain=MS),
    "RelativePositionBias": Case("RelativePositionBias", [f(32, 4), i(9), i(9)], {"is_bidirectional": 1, "max_distance": 128}, fixed=[1, 2], domain=MS),
    "RelativePositionBias causal": Case("RelativePositionBias", [f(8, 4), i(40), i(40)], {"max_distance": 20}, fixed=[1, 2], domain=MS),
    "QAttention": Case("QAttention", [BYTES, SIGNED, f(48), s(0.02), s(0.03), None, z(120), np.array(2, np.int8)], {"num_heads": 2}, fixed=[1, 2, 3, 4, 6, 7], domain=MS),
    "MatMulIntegerToFloat": Case("MatMulIntegerToFloat", [BYTES, SIGNED, s(0.02), f(48), z(120), None, f(48)], fixed=[1, 2, 3, 4, 6], domain=MS),
    "DynamicQuantizeMatMul": Case("DynamicQuantizeMatMul", [f(2, 3, 16), SIGNED, s(0.03), np.array(3, np.int8), f(48)], fixed=[1, 2, 3, 4], domain=MS),
    "QLinearAdd": Case("QLinearAdd", [BYTES, s(0.02), z(120), BYTES[:, ::-1].copy(), s(0.03), z(100), s(0.05), z(110)], fixed=[1, 2, 4, 5, 6, 7], domain=MS),
    "QLinearMul": Case("QLinearMul", [BYTES, s(0.02), z(120), BYTES[:, ::-1].copy(), s(0.03), z(100), s(0.05), z(110)], fixed=[1, 2, 4, 5, 6, 7], domain=MS),
    "QLinearSigmoid": Case("QLinearSigmoid", [BYTES, s(0.02), z(120), s(0.004), z(0)], fixed=[1, 2, 3, 4], domain=MS),
    "QLinearLeakyRelu": Case("QLinearLeakyRelu", [BYTES, s(0.02), z(120), s(0.02), z(50)], {"alpha": 0.2}, fixed=[1, 2, 3, 4], domain=MS),
    "QuantizeLinear": Case("QuantizeLinear", [f(2, 3), s(0.02), z(120)], fixed=[1, 2], domain=MS),
    "DequantizeLinear": Case("DequantizeLinear", [BYTES, s(0.02), z(120)], fixed=[1, 2], domain=MS),
    "GatherBlockQuantized": Case("GatherBlockQuantized", [RNG.integers(0, 255, (7, 16), dtype=np.uint8), i(3, 0, 6), np.abs(f(7, 1))], {"block_size": 32, "bits": 4}, fixed=[0, 2], domain=MS),
    "GatherBlockQuantized points": Case("GatherBlockQuantized", [RNG.integers(0, 255, (7, 32), dtype=np.uint8), i(3, 0, 6), np.abs(f(7, 2)), RNG.integers(0, 255, (7, 2), dtype=np.uint8)], {"block_size": 16, "bits": 8}, fixed=[0, 2, 3], domain=MS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_form_equals_onnxruntime(name: str, tmp_path: Path) -> None:
    step = 1.01 if name in ("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu") else 0.0
    check(CASES[name], tmp_path, max(step, 1e-5), kernels=True)
