"""Attention over ranges that are cut and merged, and with the step's own rotation and cache, against
float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapper_kernels.api import attention
from mapper_kernels.cached import KV_FORMATS
from mapper_kernels.sizes import SCORES
from tests.kernels.compiled import attend_pieces
from tests.kernels.operands import ROUNDING, Arena

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
_KINDS: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True)
class Case:
    """One query row, a cache of rows, and how scores are made."""

    kind: str
    d: int
    dv: int
    rows: int
    softcap: float = 0.0
    slope: float = 0.0
    sink: float | None = None
    sharp: float = 2.0
    seed: int = 0


def cache(rng: np.random.Generator, kind: str, *shape: int) -> tuple[Array, Array, F64]:
    """Rows in a format, their scales (int8), and what they stand for."""
    if kind == "int8":
        rows: Array = rng.integers(-128, 128, shape).astype(np.int8)
        scales = rng.uniform(0.25, 1, shape[:-1]).astype(np.float32) / 64
        return rows, scales, rows.astype(np.float64) * scales[..., None].astype(np.float64)
    rows = rng.standard_normal(shape).astype(_KINDS[kind])
    return rows, np.zeros(shape[:-1], np.float32), rows.astype(np.float64)


def softmax(s: F64, sink: float | None) -> F64:
    """Shares along the last axis, the sink's left out."""
    top = s.max(-1, keepdims=True)
    top = top if sink is None else np.maximum(top, sink)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True) + (0 if sink is None else np.exp(sink - top))
    return np.asarray(e / total)


def score_error(d: int, magnitude: F64, capped: bool, s: F64) -> float:
    """How far a float32 score may be off: D products added one by one, scaled (int8 twice), capped, biased.

    (D + 2) u sum |q||k| scale, u = 2^-24, and four roundings of what is made of it; the cap's tanh adds 3e-7
    of the cap (see `scalar.tanh32`), which is not below the score.
    """
    own = (d + 2) * ROUNDING * float(magnitude.max())
    return own + (4 * ROUNDING + (3e-7 if capped else 0)) * float(np.abs(s).max() if s.size else 0)


def output_error(rows: int, error: float, spread: float) -> float:
    """Relative error of the weighted sum of values, given the scores'.

    A score that is off by e changes its weight by a factor e^e, the largest score likewise; the difference of
    the two rounds once more (spread u); exp32 is right to 2e-7, twice where parts are merged; `rows` terms
    are added, in the sum and in the output, with a rescaling per block of 128.
    """
    return 2 * (math.expm1(2 * error + spread * ROUNDING) + 6e-7 + (rows + rows / 64 + 8) * ROUNDING)


def run(case: Case, bounds: list[int], offset: int = 0) -> tuple[Array, F64, F64]:
    """Attention by the kernel over pieces, its float64 value, and the error allowed."""
    rng = np.random.default_rng(case.seed)
    q = (case.sharp * rng.standard_normal(case.d)).astype(np.float32)
    k, k_scales, k64 = cache(rng, case.kind, case.rows, case.d)
    v, v_scales, v64 = cache(rng, case.kind, case.rows, case.dv)
    scale, last = np.float32(case.d**-0.5), case.rows
    arena = Arena(offset)
    # rows before the first bound and behind the last one must not count
    low, high = bounds[0], bounds[-1]
    for part in (k, v):
        part[:low], part[high:] = (127, 127) if case.kind == "int8" else (np.nan, np.nan)
    k_scales[:low], k_scales[high:], v_scales[:low], v_scales[high:] = (np.nan,) * 4
    y = arena.result((case.dv,))
    pieces = len(bounds) - 1
    attend_pieces(
        KV_FORMATS.index(case.kind), arena.put(q), arena.put(k), k.strides[0], arena.put(k_scales),
        arena.put(v), v.strides[0], arena.put(v_scales), np.array(bounds), case.d, case.dv, scale,
        np.float32(case.softcap), np.float32(case.slope), arena.scratch(4), last, np.float32(case.sink or 0),
        case.sink is not None, arena.scratch(SCORES), arena.scratch(4 * pieces * (case.dv + 2)),
        y.ctypes.data,
    )  # fmt: skip
    arena.check()
    seen = slice(low, high)
    s = (k64[seen] @ q.astype(np.float64)) * float(scale)
    magnitude = (np.abs(k64[seen]) @ np.abs(q.astype(np.float64))) * float(scale)
    if case.softcap:
        s = float(np.float32(case.softcap)) * np.tanh(s / float(np.float32(case.softcap)))
    # the bias rounds with its own size
    bias = float(np.float32(case.slope)) * (np.arange(low, high) - last)
    error = score_error(
        case.d, magnitude, case.softcap > 0, np.array([case.softcap, np.abs(bias).max(initial=0)])
    )
    error += 4 * ROUNDING * float(np.abs(s).max(initial=0))
    s = s + bias
    share = softmax(s, None if case.sink is None else float(np.float32(case.sink)))
    spread = float(s.max() - s.min()) + (abs(case.sink or 0.0) + float(np.abs(s).max()))
    allowed = output_error(high - low, error, spread) * (share @ np.abs(v64[seen]))
    return y, share @ v64[seen], allowed + 1e-30


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Rows of a cache, and rising bounds of pieces in it; pieces may be empty, all together not."""
    rows = draw(st.sampled_from([1, 2, 15, 16, 17, 31, 100, 127, 128, 129, 300]))
    low = draw(st.integers(0, rows - 1))
    high = draw(st.integers(low + 1, rows))
    inner = draw(st.lists(st.integers(low, high), max_size=6))
    return rows, [low, *sorted(inner), high]


@pytest.mark.parametrize("kind", KV_FORMATS)
@settings(max_examples=60, deadline=None)
@given(
    cut=cuts(),
    d=st.sampled_from([1, 7, 16, 31, 64, 80, 128]),
    dv=st.sampled_from([1, 8, 16, 37, 64, 72, 128]),
    softcap=st.sampled_from([0.0, 1.5, 30.0]),
    slope=st.sampled_from([0.0, 0.0625, -0.5]),
    sink=st.sampled_from([None, -3.0, 0.0, 20.0]),
    sharp=st.sampled_from([0.1, 2.0, 30.0]),
    offset=st.integers(0, 15),
    seed=st.integers(0, 1 << 30),
)
def test_any_cut(
    kind: str, cut: tuple[int, list[int]], d: int, dv: int, softcap: float, slope: float, sink: float | None,
    sharp: float, offset: int, seed: int,
) -> None:  # fmt: skip
    rows, bounds = cut
    case = Case(kind, d, dv, rows, softcap, slope, sink, sharp, seed)
    y, exact, allowed = run(case, bounds, offset)
    assert (np.abs(y - exact) <= allowed).all()
    whole, _, _ = run(case, [bounds[0], bounds[-1]], offset)
    assert (np.abs(y - whole) <= 2 * allowed).all()


@pytest.mark.parametrize("kind", KV_FORMATS)
def test_context_of_one_is_its_value(kind: str) -> None:
    y, exact, _ = run(Case(kind, 7, 37, 1), [0, 0, 1, 1])
    np.testing.assert_allclose(y, exact, rtol=2 * ROUNDING)


def test_nothing_seen_is_nan_and_only_a_sink_is_zero() -> None:
    y, _, _ = run_empty(None)
    assert np.isnan(y).all()
    y, _, _ = run_empty(1.0)
    np.testing.assert_array_equal(y, 0)


def run_empty(sink: float | None) -> tuple[Array, None, None]:
    """Attention to no row at all."""
    arena = Arena()
    y = arena.result((5,))
    zeros = np.zeros(8, np.float32)
    attend_pieces(
        0, arena.put(zeros), arena.put(zeros), 32, 0, arena.put(zeros), 20, 0, np.array([0, 0, 0]), 8, 5,
        np.float32(1), np.float32(0), np.float32(0), arena.scratch(4), 0, np.float32(sink or 0),
        sink is not None, arena.scratch(SCORES), arena.scratch(4 * 2 * 7), y.ctypes.data,
    )  # fmt: skip
    arena.check()
    return y, None, None


@pytest.mark.parametrize("kind", KV_FORMATS)
@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("splits", "parts"), [(1, 1), (3, 2)])
def test_front(kind: str, seq: int, window: int, causal: bool, splits: int, parts: int) -> None:
    rng = np.random.default_rng(seq + window)
    batch, heads, kv, rows, used, d, dv = 2, 6, 3, 12, 9, 20, 13
    q = (2 * rng.standard_normal((batch, heads, seq, d))).astype(np.float32)
    k, k_scales, k64 = cache(rng, kind, batch, kv, rows, d)
    v, v_scales, v64 = cache(rng, kind, batch, kv, rows, dv)
    sinks = rng.standard_normal(heads).astype(np.float32)
    slopes = rng.uniform(0, 1, heads).astype(np.float32)
    scales: dict[str, Any] = {"k_scales": k_scales, "v_scales": v_scales} if kind == "int8" else {}
    y = attention(
        q, k, v, used, window=window, causal=causal, softcap=5.0, slopes=slopes, sinks=sinks, splits=splits,
        parts=parts, **scales,
    )  # fmt: skip
    s = np.einsum("bhsd,bhtd->bhst", q.astype(np.float64), np.repeat(k64, heads // kv, 1)) * d**-0.5
    own, t = used - seq + np.arange(seq)[:, None], np.arange(rows)
    s = 5 * np.tanh(s / 5) + slopes[:, None, None] * (t - own)
    end = own + 1 if causal else np.full_like(own, used)
    seen = (t < end) & ((t >= end - window) | (window == 0))
    s = np.where(seen, s, -np.inf)
    share = np.stack([softmax(s[:, h], float(sinks[h])) for h in range(heads)], 1)
    expected = np.einsum("bhst,bhtd->bhsd", share, np.where(np.isfinite(v64), v64, 0).repeat(heads // kv, 1))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", KV_FORMATS)
@pytest.mark.parametrize(("group", "used", "d"), [(1, 260, 64), (2, 300, 33), (3, 129, 64), (7, 257, 96)])
def test_queries_that_read_the_same_rows(kind: str, group: int, used: int, d: int) -> None:
    rng = np.random.default_rng(used)
    q = (3 * rng.standard_normal((1, 2 * group, 1, d))).astype(np.float32)
    k, k_scales, k64 = cache(rng, kind, 1, 2, used, d)
    v, v_scales, v64 = cache(rng, kind, 1, 2, used, d)
    scales: dict[str, Any] = {"k_scales": k_scales, "v_scales": v_scales} if kind == "int8" else {}
    s = np.einsum("bhsd,bhtd->bhst", q.astype(np.float64), k64.repeat(group, 1)) * d**-0.5
    expected = np.einsum("bhst,bhtd->bhsd", softmax(s, None), v64.repeat(group, 1))
    for splits in (1, 4):
        y = attention(q, k, v, splits=splits, **scales)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=5e-6)


def test_what_the_front_refuses() -> None:
    q, k = np.zeros((1, 2, 1, 4), np.float32), np.zeros((1, 2, 3, 4), np.float32)
    for given_, wrong in (
        ({"length": 4}, "4 of 3 rows"), ({"length": 0}, "0 of 3 rows"), ({"splits": 0}, "0 splits"),
        ({"window": -1}, "window -1"), ({"parts": 0}, "0 parts"), ({"sinks": q}, "sinks has shape"),
        ({"k_scales": q}, "int8 caches"), ({"v": k.astype(np.float16)}, "v is float16"),
        ({"k": k[:, :, ::2]}, "shape|contiguous"), ({"q": q.astype(np.float64)}, "q is float64"),
    ):  # fmt: skip
        arguments: dict[str, Any] = {"q": q, "k": k, "v": k} | given_
        with pytest.raises(ValueError, match=wrong):
            attention(**arguments)
