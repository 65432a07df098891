"""Products with weights of every format against float64, on odd shapes, in poisoned memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mapper_kernels import fused
from mapper_kernels.formats import FORMATS
from mapper_kernels.front_linear import project_arguments, project_parts
from mapper_kernels.sizes import project_scratch
from mapper_kernels.weight import Weight
from tests.kernels.compiled import portable_rows, prepared_rows
from tests.kernels.operands import Arena, decoded, product_bound, random_weight

F32 = npt.NDArray[np.float32]
KS = st.sampled_from([1, 2, 31, 32, 33, 64, 65, 96, 127, 129, 544, 2080])
NS = st.sampled_from([1, 3, 4, 5, 16, 37])
MS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 65])
PARTS = st.integers(1, 3)
SEEDS = st.integers(0, 1 << 30)


def activations(rng: np.random.Generator, m: int, k: int) -> F32:
    """Rows with outliers and a block of zeros, as activations have them."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, rng.integers(0, k)] *= 100
    x[rng.integers(0, m), : min(k, 32)] = 0
    return x


def run(arena: Arena, x: F32, weight: Weight, parts: int) -> F32:
    """y = x W^T by `fused.project` on operands in an arena."""
    (m, k), (n, _) = x.shape, weight.shape
    _, a, f = project_arguments(x, [(weight, None)], None, fused.PLAIN, "identity")
    operands = [x, weight.values, weight.scales, weight.zeros]
    y = arena.result((m, n))
    r = [arena.put(o) for o in operands if o is not None]
    scratch = arena.scratch(project_scratch(m, k, n, 1))
    project_parts(np.array([*r, y.ctypes.data]), a, f, scratch, 0, parts, parts)
    arena.check()
    return y


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(m=MS, n=NS, k=KS, parts=PARTS, zeros=st.booleans(), offset=st.integers(0, 15), seed=SEEDS)
@example(m=1, n=5, k=33, parts=1, zeros=True, offset=1, seed=0)
@example(m=65, n=37, k=2080, parts=3, zeros=True, offset=3, seed=1)
def test_product(name: str, m: int, n: int, k: int, parts: int, zeros: bool, offset: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, name, n, k, zeros and FORMATS[name].zeros)
    x = activations(rng, m, k)
    y = run(Arena(offset), x, weight, parts)
    exact = x.astype(np.float64) @ decoded(weight)[0].T
    assert (np.abs(y - exact) <= product_bound(weight, x.astype(np.float64))).all()


INTEGER = [name for name in FORMATS if name.startswith(("int", "mx"))]


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("k", [1, 33, 96, 544, 2080])
def test_portable_code_gives_the_same_bits(name: str, m: int, k: int) -> None:
    rng = np.random.default_rng(k)
    weight, x, n = random_weight(rng, name, 8, k, FORMATS[name].zeros), activations(rng, m, k), 8
    y = run(Arena(), x, weight, 1)
    arena = Arena()
    layout = FORMATS[name]
    prepared = arena.scratch(4 * layout.prepared_bytes(k))
    prepared_rows(layout.code, arena.put(x), m, k, prepared)
    found = arena.result((m, n))
    addresses = [0 if a is None else arena.put(a) for a in (weight.values, weight.scales, weight.zeros)]
    steps = [layout.value_bytes(k), layout.scale_bytes(k), layout.zero_bytes(k)]
    for low in range(0, n, 4):
        w, s, z = (a + low * step if a else 0 for a, step in zip(addresses, steps, strict=True))
        portable_rows(
            layout.code, w, s, z, steps[0], steps[1], steps[2], prepared, layout.prepared_bytes(k), m, k,
            found.ctypes.data + 4 * low, 4 * n,
        )  # fmt: skip
    arena.check()
    np.testing.assert_array_equal(y.view(np.uint32), found.view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    rng = np.random.default_rng(3)
    weight, x = random_weight(rng, name, 5, 96), activations(rng, 2, 96)
    expected = run(Arena(), x, weight, 1)[1]
    for place in (0, 31, 32, 95):
        broken = x.copy()
        broken[0, place] = bad
        y = run(Arena(), broken, weight, 1)
        assert not np.isfinite(y[0, decoded(weight)[0][:, place] != 0]).any()
        np.testing.assert_array_equal(y[1], expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e30])
def test_very_small_and_large_rows(name: str, size: float) -> None:
    rng = np.random.default_rng(5)
    weight = random_weight(rng, name, 7, 160)
    x = (rng.standard_normal((2, 160)) * size).astype(np.float32)
    y = run(Arena(), x, weight, 1)
    exact = x.astype(np.float64) @ decoded(weight)[0].T
    # blocks below 1e-30 count as zeros; below 2^-126 float32 has fewer bits
    lost = (1e-30 + 160 * 2.0**-149) * np.abs(decoded(weight)[0]).sum(1)
    assert (np.abs(y - exact) <= product_bound(weight, x.astype(np.float64)) + lost).all()


def test_least_scale_of_mxfp4() -> None:
    values = np.full((1, 16), 0x77, np.uint8)
    weight = Weight("mxfp4", values, (1, 32), np.zeros((1, 1), np.uint8))
    x = np.full((1, 32), 2.0**100, np.float32)
    y = run(Arena(), x, weight, 1)
    np.testing.assert_allclose(y, [[32 * 6 * 2.0**-27]], rtol=1e-5)
