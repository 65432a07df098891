"""Every kernel of the decode path against float64 NumPy: fresh random inputs, poisoned outputs, odd sizes,
shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper_kernels import attention, gemm, moe, norm, product, rope
from mapper_kernels.memory import f64_to_small, load_f, small_to_f64, store_f
from mapper_kernels.names import ACTIVATIONS

F32 = npt.NDArray[np.float32]
_NO = np.zeros(0, np.float32)
_NO64 = np.zeros(0, np.float64)


def _random(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _poison(*shape: int) -> F32:
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (37, 51), (64, 96), (130, 33)])
@pytest.mark.parametrize("parts", [1, 3])
def test_gemm(m: int, n: int, k: int, parts: int) -> None:
    x, w, bias = _random(m, m, k), _random(n, n, k), _random(k, n)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    for kernel, weight, grain in ((gemm.gemm_nk, w, 4), (gemm.gemm_kn, np.ascontiguousarray(w.T), 16)):
        y = _poison(m, n)
        for part in range(parts):
            kernel(x, weight, y, part, parts)
        # a float32 sum of k products errs by at most k units of rounding of the sum of magnitudes
        assert (np.abs(y - exact) <= (k + 2) * 2.0**-24 * size).all()
        for part in range(parts):
            gemm.add_bias(y, bias, part, parts, grain)
        np.testing.assert_allclose(y, exact + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("d", [1, 5, 256])
def test_norm(centred: bool, d: int) -> None:
    x, weight, bias, y = _random(1, 3, d), _random(2, d), _random(3, d), _poison(3, d)
    for part in range(2):
        norm.norm(x, weight, bias, y, centred, 1e-5, 1.0, part, 2)
    z = x.astype(np.float64)
    z = z - z.mean(-1, keepdims=True) if centred else z
    expected = z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-5) * (weight + 1.0) + bias
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    norm.norm(x, _NO, _NO, y, centred, 1e-5, 0.0, 0, 1)
    np.testing.assert_allclose(y, z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-5), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "rotary"), [(8, 8), (10, 6), (5, 2)])
def test_rope(interleaved: bool, d: int, rotary: int) -> None:
    past, seq = 3, 2
    angle = np.random.default_rng(0).uniform(-3, 3, (7, rotary // 2))
    table = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
    x, y = _random(5, 4 * seq, d), _poison(4 * seq, d)
    rope.rope_at(x, table, y, seq, past, rotary, interleaved, 0, 1)
    for r in range(len(x)):
        turn = np.exp(1j * angle[past + r % seq])
        a, b = (x[r, 0:rotary:2], x[r, 1:rotary:2]) if interleaved else np.split(x[r, :rotary], 2)
        z = (a + 1j * b) * turn
        pair = np.stack([z.real, z.imag], -1).reshape(-1) if interleaved else np.concatenate([z.real, z.imag])
        np.testing.assert_allclose(y[r], np.concatenate([pair, x[r, rotary:]]), rtol=1e-5, atol=1e-5)


def _attention(
    q: F32,
    k: F32,
    v: F32,
    allowed: npt.NDArray[np.bool_],
    scale: float,
    softcap: float,
    sinks: F32,
    slopes: F32,
) -> npt.NDArray[np.float64]:
    """allowed [S, T]; slopes and sinks [H] or empty. Positions count back from the last key of each query."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    kk, vv = (np.repeat(z.astype(np.float64), group, 1) for z in (k, v))
    s = np.einsum("bhsd,bhtd->bhst", q.astype(np.float64), kk) * scale
    if softcap:
        s = softcap * np.tanh(s / softcap)
    t = np.arange(k.shape[2])
    for row in range(q.shape[2]):
        last = t[allowed[row]].max()
        if len(slopes):
            s[:, :, row] += slopes[None, :, None] * (t - last)
    s = np.where(allowed, s, -np.inf)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    if len(sinks):
        total = total + np.exp(sinks.reshape(1, heads, 1, 1) - top)
    return np.asarray(np.einsum("bhst,bhtd->bhsd", e / total, vv))


@pytest.mark.parametrize("past", [0, 1, 9])
@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (2, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("extras", [False, True])
def test_cached_attention(past: int, seq: int, window: int, chunk: int, extras: bool) -> None:
    length, d, dv = 12, 7, 5
    q, k, v = _random(1, 2, 6, seq, d), _random(2, 2, 3, length, d), _random(3, 2, 3, length, dv)
    k[:, :, past + seq :], v[:, :, past + seq :] = np.nan, np.nan  # rows beyond must not be read
    sinks, slopes = (_random(4, 6), np.abs(_random(5, 6))) if extras else (_NO, _NO)
    softcap = 1.5 if extras else 0.0
    y = _poison(2, 6, seq, dv)
    for part in range(3):
        attention.cached_attention(
            q, k, v, sinks, slopes.astype(np.float64), y, past, 0.4, window, chunk, softcap, part, 3
        )
    position, t = past + np.arange(seq)[:, None], np.arange(past + seq)
    allowed = (t <= position) & ((t > position - window) | (window == 0))
    allowed &= t // (chunk or length) == position // (chunk or length)
    seen = slice(0, past + seq)
    expected = _attention(q, k[:, :, seen], v[:, :, seen], allowed, 0.4, softcap, sinks, slopes)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)


def test_context_of_one() -> None:
    q, k, v = _random(1, 1, 2, 1, 4), _random(2, 1, 1, 1, 4), _random(3, 1, 1, 1, 4)
    y = _poison(1, 2, 1, 4)
    attention.cached_attention(q, k, v, _NO, _NO64, y, 0, 1.0, 0, 0, 0.0, 0, 1)
    np.testing.assert_allclose(y, np.broadcast_to(v, y.shape), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation(name: str) -> None:
    import math

    x = np.concatenate([_random(0, 100) * 4, [0.0, -100.0, 100.0, -20.0, 20.0]]).astype(np.float32)
    z = x.astype(np.float64)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-z))
    expected = {
        "silu": z * sigmoid,
        "gelu": 0.5 * z * (1 + np.array([math.erf(v / math.sqrt(2)) for v in z])),
        "gelu_tanh": 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "gelu_quick": z / (1 + np.exp(-1.702 * z)),
        "relu": np.maximum(z, 0),
        "relu_squared": np.maximum(z, 0) ** 2,
        "sigmoid": sigmoid,
        "tanh": np.tanh(z),
        "identity": z,
    }[name]
    y, g = np.full_like(x, np.nan), np.full_like(x, np.nan)
    for part in range(2):
        product.activation(ACTIVATIONS[name], x, y, part, 2)
    product.gate(ACTIVATIONS[name], x, x, g, 0, 1)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(g, expected * z, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("code", "exponent", "mantissa", "finite", "dtype"),
    [(2, 5, 10, False, "float16"), (3, 8, 7, False, "bfloat16"), (4, 4, 3, True, "float8_e4m3fn"),
     (5, 5, 2, False, "float8_e5m2")],
)  # fmt: skip
def test_small_floats_round_as_their_format_does(
    code: int, exponent: int, mantissa: int, finite: bool, dtype: str
) -> None:
    import ml_dtypes

    kind = np.dtype(dtype if dtype == "float16" else getattr(ml_dtypes, dtype))
    word = np.uint16 if kind.itemsize == 2 else np.uint8
    bits = np.arange(1 << 8 * kind.itemsize).astype(word)
    values = bits.view(kind).astype(np.float64)
    found = np.array([small_to_f64(int(b), exponent, mantissa, finite) for b in bits])
    np.testing.assert_array_equal(found, values)
    rng = np.random.default_rng(code)
    largest = float(values[np.isfinite(values)].max())
    x = np.concatenate([
        rng.standard_normal(300), rng.uniform(-1, 1, 300) * largest, rng.standard_normal(100) * 1e-4,
        [0.0, -0.0, largest, -largest, 2 * largest, np.inf, -np.inf, np.nan],
    ])  # fmt: skip
    with np.errstate(over="ignore"):
        # casts through float32 would round twice
        exact = x.astype(np.float32).astype(kind).astype(np.float64)
    x = x.astype(np.float32).astype(np.float64)
    bits_of = [int(f64_to_small(float(v), exponent, mantissa, finite)) for v in x]
    rounded = np.array([small_to_f64(b, exponent, mantissa, finite) for b in bits_of])
    np.testing.assert_array_equal(rounded, exact)
    raw = np.zeros(2, word)
    store_f(raw.ctypes.data, code, 1, 1.5)
    assert load_f(raw.ctypes.data, code, 1) == 1.5 and raw[0] == 0


def _routed(scores: Any, k: int, correction: Any, **options: Any) -> tuple[Any, Any]:
    """`moe.route` with defaults, on a copy of the scores."""
    chosen, weight = np.empty(k, np.int64), np.empty(k, np.float32)
    given: dict[str, Any] = {
        "scoring": 0,
        "groups": 0,
        "kept": 0,
        "pairs": False,
        "fill": 0.0,
        "normalise": False,
    }
    given |= {"epsilon": 0.0, "scale": 1.0} | options
    moe.route(scores.copy(), correction, chosen, weight, *given.values())
    return chosen, weight


def test_route_by_softmax() -> None:
    scores = _random(2, 5)
    chosen, weight = _routed(scores, 2, _random(0, 0), normalise=True, scale=2.0)
    soft = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    order = np.argsort(-soft, kind="stable")[:2]
    np.testing.assert_array_equal(chosen, order)
    np.testing.assert_allclose(weight, 2 * soft[order] / soft[order].sum(), rtol=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_route_in_groups(pairs: bool) -> None:
    scores, correction = _random(2, 12), _random(7, 12)
    options = {"scoring": 1, "groups": 4, "kept": 2, "pairs": pairs, "fill": -np.inf}
    chosen, weight = _routed(scores, 3, correction, **options)
    sigmoid = 1 / (1 + np.exp(-scores.astype(np.float64)))
    choice = (sigmoid + correction).reshape(4, 3)
    value = np.sort(choice, axis=1)[:, -2:].sum(1) if pairs else choice.max(1)
    allowed = np.repeat([g in np.argsort(-value)[:2] for g in range(4)], 3)
    order = np.argsort(-np.where(allowed, choice.reshape(-1), -np.inf))[:3]
    np.testing.assert_array_equal(chosen, order)
    np.testing.assert_allclose(weight, sigmoid[order], rtol=1e-5)


@pytest.mark.parametrize("packing", [0, 1, 2])
def test_gate_and_up_of_an_expert(packing: int) -> None:
    inner = 7
    gate, up = 4 * _random(3, inner), 4 * _random(4, inner)
    u = np.concatenate([gate, up]) if packing == 1 else np.stack([gate, up], -1).reshape(-1)
    g = gate.copy() if packing == 0 else _poison(inner)
    u = up.copy() if packing == 0 else u.copy()
    moe.combine(packing, ACTIVATIONS["relu"], 3.0, 1.0, u, g)
    expected = np.maximum(np.minimum(gate, 3), 0) * (np.clip(up, -3, 3) + 1)
    np.testing.assert_allclose(g, expected, rtol=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_expert_matrix_with_bias(rows: bool) -> None:
    x, w, bias = _random(1, 1, 6), _random(2, 6, 5), _random(3, 5)
    y = _poison(1, 5)
    moe.matrix(x, np.ascontiguousarray(w.T) if rows else w, rows, bias, y)
    np.testing.assert_allclose(y, x @ w + bias, rtol=1e-4, atol=1e-5)
