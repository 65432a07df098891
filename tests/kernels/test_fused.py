"""The fused steps against float64: norms, epilogues, matrices of different formats in one step, cached
attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapper_kernels import fused
from mapper_kernels.formats import FORMATS
from mapper_kernels.front_linear import project_arguments, project_parts
from mapper_kernels.names import ATTEND_HEAD, PROJECT_EACH, PROJECT_HEAD
from mapper_kernels.sizes import attend_scratch, project_scratch
from mapper_kernels.weight import Norm, Weight
from tests.kernels.compiled import cached_parts, merged_parts
from tests.kernels.operands import ROUNDING, Arena, decoded, product_bound, random_weight
from tests.kernels.test_flash import softmax

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
NAMES = st.sampled_from(sorted(FORMATS))


def normalised(x: F32, norm: Norm | None) -> tuple[F64, float]:
    """The norm in float64, and its relative error in float32: sums are in float64; the factor, the difference
    to the mean, the products with factor and weight (a sum itself) and the bias round, seven times; the mean
    itself too."""
    z = x.astype(np.float64)
    if norm is None:
        return z, 0.0
    z = z - z.mean(-1, keepdims=True) if norm.centred else z
    z = z / np.sqrt((z * z).mean(-1, keepdims=True) + norm.epsilon)
    z = z * (1 if norm.weight is None else norm.weight.astype(np.float64) + norm.offset)
    return (z if norm.bias is None else z + norm.bias), 8 * ROUNDING


def project(
    x: F32, matrices: list[tuple[Weight, F32 | None]], norm: Norm | None, kind: int, activation: str,
    parts: int, residual: F32 | None = None, in_place: bool = False, offset: int = 0,
) -> list[Array]:  # fmt: skip
    """`fused.project` with every operand in an arena; matrices may differ in N where nothing joins them."""
    arena = Arena(offset)
    (m, k), count = x.shape, len(matrices)
    given_r: list[Any] = [x]
    if norm is not None:
        given_r += [v for v in (norm.weight, norm.bias) if v is not None]
    heads: list[int] = []
    for weight, bias in matrices:
        heads += [weight.shape[0], weight.layout.code, weight.zeros is not None, bias is not None]
        given_r += [v for v in (weight.values, weight.scales, weight.zeros, bias) if v is not None]
    _, a, f = project_arguments(x, matrices[:1], norm, kind, activation)
    wide = np.zeros(len(a) - PROJECT_EACH)
    wide[:] = f[:PROJECT_HEAD]
    a = np.array([*a[: PROJECT_HEAD - 1], count, *heads])
    r = [arena.put(v) for v in given_r]
    results = [w.shape[0] for w, _ in matrices] if kind == fused.PLAIN else [matrices[0][0].shape[0]]
    ys = [arena.result((m, n)) for n in results]
    if residual is not None and in_place:
        ys[0][:] = residual
    if residual is not None:
        r.append(ys[0].ctypes.data if in_place else arena.put(residual))
    r += [y.ctypes.data for y in ys]
    scratch = arena.scratch(project_scratch(m, k, max(w.shape[0] for w, _ in matrices), count))
    project_parts(np.array(r), a, np.concatenate([wide, np.zeros(len(heads))]), scratch, 0, parts, parts)
    arena.check()
    return ys


def products(x: F64, error: float, matrices: list[tuple[Weight, F32 | None]]) -> list[tuple[F64, F64]]:
    """The products with their biases, and how far float32 may be from each."""
    found = []
    for weight, bias in matrices:
        w, size = decoded(weight)
        add = np.zeros(len(w)) if bias is None else bias.astype(np.float64)
        y = x @ w.T + add
        allowed = (
            product_bound(weight, x) * (1 + error)
            + error * (np.abs(x) + 1) @ size.T
            + 2 * ROUNDING * np.abs(y)
        )
        found.append((y, allowed + ROUNDING * np.abs(add)))
    return found


def draw_matrix(rng: np.random.Generator, name: str, n: int, k: int, bias: bool) -> tuple[Weight, F32 | None]:
    weight = random_weight(rng, name, n, k, FORMATS[name].zeros and bool(rng.integers(2)))
    return weight, rng.standard_normal(n).astype(np.float32) if bias else None


def draw_norm(rng: np.random.Generator, which: int, k: int) -> Norm | None:
    """None, RMS without a weight, RMS with an offset, layer norm with everything."""
    weight, bias = rng.uniform(0.5, 1.5, k).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    return [None, Norm(), Norm(weight, None, 1e-6, 1.0), Norm(weight, bias, 1e-5, 0.0, True)][which]


@settings(max_examples=120, deadline=None)
@given(
    names=st.lists(NAMES, min_size=1, max_size=3),
    ns=st.lists(st.sampled_from([1, 5, 16, 37]), min_size=3, max_size=3), m=st.sampled_from([1, 2, 5, 65]),
    k=st.sampled_from([33, 64, 96, 544]), which=st.integers(0, 3), bias=st.booleans(),
    parts=st.integers(1, 3), offset=st.integers(0, 15), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_several_products(
    names: list[str],
    ns: list[int],
    m: int,
    k: int,
    which: int,
    bias: bool,
    parts: int,
    offset: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(np.float32)
    matrices = [draw_matrix(rng, name, n, k, bias) for name, n in zip(names, ns, strict=False)]
    norm = draw_norm(rng, which, k)
    ys = project(x, matrices, norm, fused.PLAIN, "identity", parts, offset=offset)
    for y, (exact, allowed) in zip(ys, products(*normalised(x, norm), matrices), strict=True):
        assert (np.abs(y - exact) <= allowed).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["f32", "bf16", "int4", "int8row"])
@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("parts", [1, 3])
def test_residual(in_place: bool, name: str, m: int, parts: int) -> None:
    rng = np.random.default_rng(m)
    k, n = 96, 37
    x = rng.standard_normal((m, k)).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    matrices = [draw_matrix(rng, name, n, k, True)]
    norm = draw_norm(rng, 2, k)
    y = project(x, matrices, norm, fused.RESIDUAL, "identity", parts, residual, in_place)[0]
    exact, allowed = products(*normalised(x, norm), matrices)[0]
    assert (np.abs(y - (exact + residual)) <= allowed + 2 * ROUNDING * np.abs(exact + residual)).all()


def sigmoid(x: F64) -> F64:
    return np.asarray(1 / (1 + np.exp(-x)))


# activation -> its value, and a bound of its slope (GELU's is 1.13, SiLU's 1.10: at x near 2.4)
ACTIVATIONS: dict[str, tuple[Callable[[F64], F64], float]] = {
    "silu": (lambda x: x * sigmoid(x), 1.1),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), 1.13),
    "relu": (lambda x: np.maximum(x, 0), 1.0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("first", "second"), [("f32", "f32"), ("int4", "int4"), ("int8", "mxfp4"), ("f16", "f8e4m3")]
)
@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("parts", [1, 3])
def test_gate_and_activation(activation: str, first: str, second: str, m: int, parts: int) -> None:
    rng = np.random.default_rng(m)
    k, n = 64, 37
    x = (rng.standard_normal((m, k)) / 8).astype(np.float32)
    matrices = [draw_matrix(rng, name, n, k, True) for name in (first, second)]
    (g, g_error), (u, u_error) = products(*normalised(x, None), matrices)
    value, slope = ACTIVATIONS[activation]
    # the function itself: 4e-7 relative to |x| (exp32 2e-7 or tanh32 3e-7, and roundings) and of its value
    a, a_error = value(g), slope * g_error + 4e-7 * np.abs(g) + 4 * ROUNDING * np.abs(g)
    y = project(x, matrices, None, fused.GATE, activation, parts)[0]
    allowed = a_error * (np.abs(u) + u_error) + np.abs(a) * u_error + 4 * ROUNDING * np.abs(a * u)
    assert (np.abs(y - a * u) <= allowed).all()
    y = project(x, matrices[:1], None, fused.ACTIVATION, activation, parts)[0]
    assert (np.abs(y - a) <= a_error).all()


# cached attention --------------------------------------------------------------------------------------

_KINDS: dict[int, Any] = {0: np.float32, 1: np.float16, 2: ml_dtypes.bfloat16}


def rotated(x: F64, angle: F64, rotary: int, interleaved: bool) -> F64:
    """Pairs as complex numbers times e^(i angle)."""
    y = x.copy()
    if rotary:
        a, b = (slice(0, rotary, 2), slice(1, rotary, 2)) if interleaved else (
            slice(0, rotary // 2), slice(rotary // 2, rotary))  # fmt: skip
        z = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle)
        y[..., a], y[..., b] = z.real, z.imag
    return y


@settings(max_examples=150, deadline=None)
@given(
    code=st.integers(0, 2), group=st.sampled_from([1, 3, 4]), kv=st.integers(1, 2),
    size=st.sampled_from([(8, 8), (20, 13), (64, 64), (31, 5)]), past=st.sampled_from([0, 1, 16, 140]),
    rotary=st.sampled_from([0, 4, 6, 8]), interleaved=st.booleans(), window=st.sampled_from([0, 1, 5, 500]),
    chunk=st.sampled_from([0, 1, 4, 12, 500]), extras=st.booleans(),
    splits=st.sampled_from([1, 2, 5]), parts=st.integers(1, 3),
    offset=st.integers(0, 15), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_cached(
    code: int, group: int, kv: int, size: tuple[int, int], past: int, rotary: int, interleaved: bool,
    window: int, chunk: int, extras: bool, splits: int, parts: int, offset: int, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    (d, dv), batch, heads, length = size, 2, group * kv, past + 3
    softcap = 8.0 if extras else 0.0
    q = (2 * rng.standard_normal((batch, heads, d))).astype(np.float32)
    new_k = rng.standard_normal((batch, kv, d)).astype(np.float32)
    new_v = rng.standard_normal((batch, kv, dv)).astype(np.float32)
    angle = rng.uniform(-3, 3, (length, rotary // 2))
    table = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
    arena = Arena(offset)
    caches = [arena.result((batch, kv, length, n), _KINDS[code]) for n in (d, dv)]
    olds = [rng.standard_normal((batch, kv, past, c.shape[-1])).astype(c.dtype) for c in caches]
    for c, old in zip(caches, olds, strict=True):
        c[:, :, :past] = old
    sinks, slopes = rng.standard_normal(heads).astype(np.float32), rng.uniform(0, 1, heads)
    y = arena.result((batch, heads, dv))
    r = [arena.put(q), arena.put(new_k), arena.put(new_v), *(c.ctypes.data for c in caches), 0]
    r += [arena.put(table)] * (rotary > 0) + [arena.put(sinks)] * extras + [c.ctypes.data for c in caches]
    scale = float(np.float32(d**-0.5))
    f = np.zeros(ATTEND_HEAD + heads)
    f[9], f[10], f[ATTEND_HEAD:] = scale, softcap, slopes
    head = [
        batch,
        heads,
        d,
        kv,
        length,
        dv,
        window,
        extras,
        extras * heads,
        0,
        0,
        rotary,
        interleaved,
        length,
    ]
    a = np.array([*head, splits, code, chunk, *[0] * heads])
    partial = arena.result((batch, heads, splits, dv + 2)) if splits > 1 else y
    cached_parts(
        np.array([*r, partial.ctypes.data]), a, f, past, arena.scratch(attend_scratch(group, d, dv)), parts
    )
    if splits > 1:
        ends = [partial.ctypes.data] + [arena.put(sinks)] * extras + [y.ctypes.data]
        merged_parts(np.array(ends), np.array([batch * heads, heads, splits, dv, extras]), parts)
    arena.check()
    turn = angle[past]
    exact_k = rotated(new_k.astype(np.float64), turn, rotary, interleaved)
    for c, old, new in zip(caches, olds, (exact_k, new_v.astype(np.float64)), strict=True):
        np.testing.assert_array_equal(c[:, :, :past].view(np.uint8), old.view(np.uint8))
        assert (c[:, :, past + 1 :].view(np.uint8) == 0xFF).all()
        # half a unit in the last place, or the rotation's error
        step = (2.0**-22, 2.0**-11, 2.0**-8)[code]
        np.testing.assert_allclose(c[:, :, past].astype(np.float64), new, rtol=step * 1.01, atol=1e-6)
    np.testing.assert_array_equal(caches[1][:, :, past], new_v.astype(caches[1].dtype))
    if not rotary:
        np.testing.assert_array_equal(caches[0][:, :, past], new_k.astype(caches[0].dtype))
    keys, values = (np.repeat(c[:, :, : past + 1].astype(np.float64), group, 1) for c in caches)
    s = np.einsum("bhd,bhtd->bht", rotated(q.astype(np.float64), turn, rotary, interleaved), keys) * scale
    s = softcap * np.tanh(s / softcap) if softcap else s
    t = np.arange(past + 1)
    s = s + (slopes[:, None] * (t - past) if extras else 0)
    s = np.where((t > past - window) | (window == 0), s, -np.inf)
    s = np.where((t // max(1, chunk) == past // max(1, chunk)) | (chunk == 0), s, -np.inf)
    shares = np.stack([softmax(s[:, h], float(sinks[h]) if extras else None) for h in range(heads)], 1)
    np.testing.assert_allclose(y, np.einsum("bht,bhtd->bhd", shares, values), rtol=2e-5, atol=2e-5)
