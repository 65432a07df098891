"""The NumPy front: weights are checked, products take everything around them, the largest logits are
found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mapper_kernels.api import argmax, gated, linear, lm_head_top, top_k
from mapper_kernels.formats import FORMATS
from mapper_kernels.weight import Norm, Weight
from tests.kernels.operands import decoded, product_bound, random_weight

U8, F16 = np.uint8, np.float16


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def bytes_(*shape: int) -> Any:
    return zeros(*shape, dtype=U8)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("int3", zeros(2, 32), (2, 32)), "unknown weight format 'int3'"),
        (("f32", zeros(2, 31), (2, 32)), "values has shape"),
        (("f32", zeros(2, 32, dtype=np.float64), (2, 32)), "values is float64"),
        (("f32", zeros(2, 32, dtype=">f4"), (2, 32)), "values is >f4"),
        (("f32", zeros(2, 64)[:, ::2], (2, 32)), "not contiguous"),
        (("f32", zeros(0, 32), (0, 32)), "a weight of shape"),
        (("f32", zeros(2, 32), (2, 32), zeros(2, 1)), "has no scales"),
        (("f32", zeros(2, 32), (2, 32), None, zeros(2, 1, dtype=U8)), "has no zeros"),
        (("int8", zeros(2, 64, dtype=U8), (2, 33)), "needs scales"),
        (("int8", zeros(2, 33, dtype=U8), (2, 33), zeros(2, 2, dtype=F16)), "values has shape"),
        (("int8", zeros(2, 64, dtype=U8), (2, 33), zeros(2, 2)), "scales is float32"),
        (("int8f", zeros(2, 64, dtype=U8), (2, 33), zeros(2, 2, dtype=F16)), "scales is float16"),
        (("int4", zeros(2, 32, dtype=U8), (2, 33), zeros(2, 3, dtype=F16)), "scales has shape"),
        (("int4", bytes_(2, 32), (2, 33), zeros(2, 2, dtype=F16), bytes_(2, 2)), "zeros has shape"),
        (("int8", bytes_(2, 32), (2, 32), zeros(2, 1, dtype=F16), bytes_(2, 1)), "has no zeros"),
        (("mxfp4", zeros(1, 16, dtype=U8), (1, 32), np.full((1, 1), 255, U8)), "scales of mxfp4 hold NaN"),
        (("f8e4m3", np.full((1, 3), 0xFF, U8), (1, 3), zeros(1)), "values of f8e4m3 hold NaN"),
    ],
)  # fmt: skip
def test_a_weight_that_does_not_fit(arguments: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Weight(*arguments)


def test_weights_as_matmulnbits_has_them() -> None:
    rng = np.random.default_rng(0)
    flat = random_weight(rng, "int4", 3, 70, True)
    assert flat.scales is not None and flat.zeros is not None
    packed = Weight(
        "int4", flat.values.reshape(3, 3, 16), (3, 70), flat.scales.reshape(-1), flat.zeros.reshape(-1)
    )
    x = rng.standard_normal((2, 70)).astype(np.float32)
    np.testing.assert_array_equal(linear(x, packed), linear(x, flat))


@pytest.mark.parametrize(("name", "kind"), [("f32", np.float32), ("f16", F16), ("bf16", ml_dtypes.bfloat16)])
def test_plain_weights_of_an_array(name: str, kind: Any) -> None:
    w = np.random.default_rng(0).standard_normal((5, 33)).astype(np.float32)
    weight = Weight.of(w[:, ::-1], name)
    np.testing.assert_array_equal(weight.values, w[:, ::-1].astype(kind))
    if name == "bf16":
        bits = Weight(name, weight.values.view(np.uint16), (5, 33))
        np.testing.assert_array_equal(linear(w, bits), linear(w, weight))
    with pytest.raises(ValueError, match="not made into a weight 'int4'"):
        Weight.of(w, "int4")


@pytest.mark.parametrize("name", FORMATS)
def test_linear_and_gated(name: str) -> None:
    rng = np.random.default_rng(1)
    m, n, k = 3, 37, 96
    x, weight = rng.standard_normal((m, k)).astype(np.float32), random_weight(rng, name, n, k)
    bias, residual = rng.standard_normal(n).astype(np.float32), rng.standard_normal((m, n)).astype(np.float32)
    exact = x.astype(np.float64) @ decoded(weight)[0].T
    allowed = product_bound(weight, x.astype(np.float64)) + 1e-5
    assert (np.abs(linear(x, weight) - exact) <= allowed).all()
    y = linear(x, weight, bias, residual=residual, parts=2)
    assert (np.abs(y - (exact + bias + residual)) <= allowed).all()
    assert (np.abs(linear(x, weight, bias, activation="relu") - np.maximum(exact + bias, 0)) <= allowed).all()
    z = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_array_less(
        np.abs(linear(x, weight, norm=Norm()) - z @ decoded(weight)[0].T), 2 * allowed
    )
    g = gated(x, weight, weight, "relu", bias, None)
    np.testing.assert_allclose(
        g, np.maximum(exact + bias, 0) * exact, rtol=1e-3, atol=float(allowed.max()) * 100
    )


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"x": zeros(3)}, "x has 1 axes"), ({"x": zeros(2, 8, dtype=np.float64)}, "x is float64"),
        ({"x": zeros(2, 9)}, "a weight"), ({"x": zeros(2, 16)[:, ::2]}, "not contiguous"),
        ({"bias": zeros(4)}, "bias has shape"), ({"residual": zeros(2, 4)}, "residual has shape"),
        ({"norm": Norm(zeros(7))}, "norm weight has shape"), ({"activation": "swish"}, "unknown activation"),
        ({"residual": zeros(2, 5), "activation": "relu"}, "either a residual or"), ({"parts": 0}, "0 parts"),
    ],
)  # fmt: skip
def test_what_linear_refuses(changed: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        linear(**{"x": zeros(2, 8), "weight": Weight.of(zeros(5, 8))} | changed)


def ranked(row: Any, k: int) -> Any:
    """NaN first, then the larger; the lower index first among equals: by a stable sort."""
    nan = np.isnan(row)
    return np.lexsort((np.arange(len(row)), -np.where(nan, 0, row), ~nan))[:k]


VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.5, np.nan, np.inf, -np.inf])


@settings(max_examples=150, deadline=None)
@given(
    logits=arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=VALUES),
    k=st.integers(1, 40),
)
def test_top_k(logits: Any, k: int) -> None:
    k = min(k, logits.shape[1])
    values, indices = top_k(logits, k)
    for row in range(len(logits)):
        np.testing.assert_array_equal(indices[row], ranked(logits[row], k))
        np.testing.assert_array_equal(values[row], logits[row, indices[row]])
    np.testing.assert_array_equal(argmax(logits), np.argmax(logits, -1))


@pytest.mark.parametrize("name", ["f32", "int4", "bf16"])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize(("n", "k"), [(5, 5), (37, 1), (37, 20), (9000, 4)])
def test_head_top(name: str, parts: int, n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    weight = random_weight(rng, name, n, 64)
    weight.values[n // 2 :: 3] = weight.values[0]  # ties, across parts
    if weight.scales is not None:
        weight.scales[n // 2 :: 3] = weight.scales[0]
    x = rng.standard_normal((2, 64)).astype(np.float32)
    values, indices = lm_head_top(x, weight, k, parts)
    logits = np.concatenate([linear(x[i : i + 1], weight) for i in range(2)])
    for row in range(2):
        np.testing.assert_array_equal(indices[row], ranked(logits[row], k))
        np.testing.assert_array_equal(values[row], logits[row, indices[row]])


def test_what_top_refuses() -> None:
    with pytest.raises(ValueError, match="the 4 largest of logits"):
        top_k(zeros(2, 3), 4)
    with pytest.raises(ValueError, match="the 0 largest of 5 logits"):
        lm_head_top(zeros(2, 8), Weight.of(zeros(5, 8)), 0)
    with pytest.raises(ValueError, match="x has shape"):
        lm_head_top(zeros(2, 9), Weight.of(zeros(5, 8)), 1)


def test_formats_and_weights_need_no_compiler() -> None:
    code = (
        "import sys, mapper_kernels.weight as w; sys.exit('numba' in sys.modules or 'mapper' in sys.modules)"
    )
    where = str(Path(__file__).resolve().parents[2] / "kernels")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": where})
