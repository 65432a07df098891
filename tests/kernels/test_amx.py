"""Products in AMX tiles against float64 NumPy: every format, odd sizes, shares, canaries around all that is
written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mapper_kernels import amx, fused, linear, prefill
from mapper_kernels.formats import FORMATS
from mapper_kernels.sizes import ROWS_AT_ONCE, STRETCH, project_scratch

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[Any]
CANARY = 0xA5
SIZES = [
    (1, 1, 1),
    (16, 32, 64),
    (17, 16, 96),
    (33, 50, 131),
    (64, 100, STRETCH + 33),
    (40, 7, 2 * STRETCH + 5),
]
FLOATS = {"f32": 6, "f16": 5, "bf16": 3, "f8e4m3": 3}
"""Format -> products of planes per element: adds of float32 per element of K."""
INTEGERS = sorted(FORMATS.keys() - FLOATS.keys())

pytestmark = pytest.mark.skipif(not amx.usable(), reason="no AMX tiles here, or MAPPER_AMX=0")


@dataclass(frozen=True)
class _Weights:
    """Stored elements, scales and zeros; what they mean: values [N, K] before scales, scales [N, blocks]."""

    elements: Bytes
    scales: Bytes
    zeros: Bytes | None
    values: F64
    factors: F64

    def exact(self) -> F64:
        """The weights in float64."""
        return self.values * np.repeat(self.factors, 32, 1)[:, : self.values.shape[1]]


def _halves(packed: Bytes) -> npt.NDArray[np.int64]:
    return np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1).astype(np.int64)


def _weights(name: str, n: int, k: int, zeros: bool) -> _Weights:
    rng, blocks = np.random.default_rng(n + k), -(-k // 32)
    one = np.ones((n, blocks))
    if name in FLOATS:
        kind = {
            "f32": np.float32,
            "f16": np.float16,
            "bf16": ml_dtypes.bfloat16,
            "f8e4m3": ml_dtypes.float8_e4m3fn,
        }
        elements = rng.standard_normal((n, k)).astype(kind[name])
        s = (
            rng.uniform(0.5, 2, (n, 1)).astype(np.float32)
            if name == "f8e4m3"
            else np.ones((n, 1), np.float32)
        )
        return _Weights(elements, s, None, elements.astype(np.float64), s * one)
    wide = k if name == "int8row" else 32 * blocks
    if name.startswith("int8"):
        elements = rng.integers(0, 256, (n, wide)).astype(np.uint8)
        values = elements.astype(np.float64) - 128
    else:
        elements = rng.integers(0, 256, (n, wide // 2)).astype(np.uint8)
        values = _halves(elements).astype(np.float64)
    z = rng.integers(0, 256, (n, -(-blocks // 2))).astype(np.uint8) if zeros else None
    if name == "mxfp4":
        s = rng.integers(118, 132, (n, blocks)).astype(np.uint8)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.concatenate([table, -table])[values.astype(np.int64)]
        return _Weights(elements, s, None, values[:, :k], 2.0 ** (s.astype(np.float64) - 127))
    if name.startswith("int4"):
        values -= 8.0 if z is None else np.repeat(_halves(z)[:, :blocks], 32, 1)
    half = name in ("int8", "int4")
    s = rng.uniform(0.5, 2, (n, 1 if name == "int8row" else blocks)).astype(
        np.float16 if half else np.float32
    )
    return _Weights(elements, s, z, values[:, :k], s.astype(np.float64) * one)


def _room(size: int) -> tuple[Bytes, int]:
    """`size` bytes at a cache line, between canaries, and where they begin."""
    memory = np.full(size + 192, CANARY, np.uint8)
    return memory, 64 + -memory.ctypes.data % 64


def _untouched(memory: Bytes, begin: int, size: int) -> bool:
    return bool((memory[:begin] == CANARY).all() and (memory[begin + size :] == CANARY).all())


def _tiled(name: str, w: _Weights, x: F32, parts: int = 2) -> F32:
    """x W^T; fails where anything but the result and the prepared region is written."""
    code, (m, k), n = FORMATS[name].code, x.shape, w.values.shape[0]
    size = prefill.tiled_size(code, m, k)
    memory, begin = _room(size)
    at = memory.ctypes.data + begin
    prefill.tile_rows(code, x.ctypes.data, 4 * k, m, k, at)
    y = np.full((m + 2, n + 6), np.nan, np.float32)
    z = 0 if w.zeros is None else w.zeros.ctypes.data
    cuts = [n * p // parts for p in range(parts + 1)]
    for low, high in pairwise(cuts):
        to = y.ctypes.data + y.strides[0] + 12
        prefill.tiled(
            code, w.elements.ctypes.data, w.scales.ctypes.data, z, at, m, k, to, y.strides[0], low, high
        )
    assert _untouched(memory, begin, size)
    found = y[1:-1, 3:-3].copy()
    y[1:-1, 3:-3] = np.nan
    assert np.isnan(y).all()
    return found


def _plain(name: str, w: _Weights, x: F32) -> F32:
    """The same product by `linear`."""
    code, (m, k), n = FORMATS[name].code, x.shape, w.values.shape[0]
    memory, begin = _room(-(-m // 4) * 4 * linear.prepared_bytes(code, k))
    at = memory.ctypes.data + begin
    linear.prepare_rows(code, x.ctypes.data, 4 * k, m, k, at)
    y = np.full((m, n), np.nan, np.float32)
    z = 0 if w.zeros is None else w.zeros.ctypes.data
    linear.product(
        code, w.elements.ctypes.data, w.scales.ctypes.data, z, at, m, k, y.ctypes.data, 4 * n, 0, n
    )  # fmt: skip
    return y


def _random(m: int, k: int) -> F32:
    return np.random.default_rng(m * k).standard_normal((m, k)).astype(np.float32)


def test_the_environment_forbids_them() -> None:
    run = "from mapper_kernels.amx import usable; print(usable())"
    path = Path(amx.__file__).parent.parent
    for value, there in (("0", "False"), ("1", "True")):
        around = {**os.environ, "MAPPER_AMX": value, "PYTHONPATH": str(path)}
        found = subprocess.run(
            [sys.executable, "-c", run], env=around, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == there


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("name", FLOATS)
def test_floating_point(name: str, m: int, n: int, k: int) -> None:
    x, w = _random(m, k), _weights(name, n, k, False)
    exact = x.astype(np.float64) @ w.exact().T
    size = np.abs(x).astype(np.float64) @ np.abs(w.exact()).T
    # each product of planes is one add in float32; 8: planes left out, factors, stretches
    assert (np.abs(_tiled(name, w, x) - exact) <= FLOATS[name] * (k + 8) * 2.0**-24 * size).all()


@pytest.mark.parametrize("name", FLOATS)
def test_no_bit_of_an_operand_is_lost(name: str) -> None:
    """One element per row that is not zero: the product is what float32 makes of it, exactly."""
    m, k = 32, 64
    x = _random(m, k)
    w = _weights(name, k, k, False)
    keep = np.eye(k) * 2.0 ** (np.arange(k) % 8 - 4)
    powers = keep.astype(w.elements.dtype)
    single = _Weights(powers, np.ones_like(w.scales), None, keep, np.ones_like(w.factors))
    assert np.array_equal(_tiled(name, single, x), x @ keep.astype(np.float32))
    ones = np.zeros((m, k), np.float32)
    ones[np.arange(m), np.arange(m)] = 2.0 ** (np.arange(m) % 8 - 4)
    whole = _Weights(w.elements, np.ones_like(w.scales), None, w.values, np.ones_like(w.factors))
    assert np.array_equal(_tiled(name, whole, ones), ones @ w.values.T.astype(np.float32))


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_large_infinite_and_no_numbers(name: str) -> None:
    """What is finite is exact, up to the largest number; what is not stays so."""
    x = np.zeros((16, 32), np.float32)
    top = float(np.finfo(np.float32).max)
    x[:6, 0] = [top, -top, 1e-25, np.inf, -np.inf, np.nan]
    values = np.zeros((3, 32))
    values[:, 0] = [1, 0.5, -(2.0**-20)]
    elements = values.astype(_weights(name, 1, 1, False).elements.dtype)
    w = _Weights(elements, np.ones((3, 1), np.float32), None, values, np.ones((3, 1)))
    found, expected = _tiled(name, w, x), x[:, :1] * values[:, 0].astype(np.float32)
    assert np.array_equal(found[:3], expected[:3])
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    if name == "bf16":  # weights in several planes have zeros among them, and 0 inf is no number
        assert np.array_equal(found, expected, equal_nan=True)


def _quantised(x: F32) -> tuple[F64, F64]:
    """x as integers of 16 bits [M, blocks, 32] and their scales [M, blocks], as `prepare` states it."""
    m, k = x.shape
    blocks = np.zeros((m, -(-k // 32) * 32), np.float32)
    blocks[:, :k] = x
    blocks = blocks.reshape(m, -1, 32)
    top = np.abs(blocks).max(-1)
    q = np.rint(blocks * (np.float32(32639) / top)[..., None])
    return q.astype(np.float64), (top * np.float32(1 / 32639)).astype(np.float64)


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str, zeros: bool, m: int, n: int, k: int) -> None:
    if zeros and not FORMATS[name].zeros:
        return
    x, w = _random(m, k), _weights(name, n, k, zeros)
    q, scales = _quantised(x)
    values = np.zeros((n, q.shape[1] * 32))
    values[:, :k] = w.values
    sums = np.einsum("mbi,nbi->mnb", q, values.reshape(n, -1, 32))
    exact = np.einsum("mnb,mb,nb->mn", sums, scales, w.factors)
    size = np.einsum("mnb,mb,nb->mn", np.abs(sums), scales, w.factors)
    found = _tiled(name, w, x)
    # block sums are exact; each is converted, scaled twice and added: three roundings and one per block
    assert (np.abs(found - exact) <= (q.shape[1] + 4) * 2.0**-24 * size).all()
    magnitude = np.einsum(
        "mbi,nbi,mb,nb->mn", np.abs(q), np.abs(values).reshape(n, -1, 32), scales, w.factors
    )
    # `linear` adds lanes apart, and zero points and offsets: at most 16 middles per element
    assert (np.abs(found - _plain(name, w, x)) <= (2 * q.shape[1] + 32) * 2.0**-24 * 16 * magnitude).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_block_sums_are_those_of_the_other_path(name: str) -> None:
    """Where all scales are powers of two and sums stay below 2^24 nothing is rounded: all agree."""
    m, n, k = 32, 48, 64
    rng = np.random.default_rng(5)
    q = np.zeros((m, 2, 32), np.float32)
    q[:, :, 7] = 32639  # the largest magnitude sets the scale
    q[:, :, [9, 10, 31]] = rng.integers(-8000, 8000, (m, 2, 3))
    x = (q * np.float32(2**-12)).reshape(m, k)
    again, scales = _quantised(x)
    assert np.array_equal(again, q) and (scales == 2.0**-12).all()
    w = _weights(name, n, k, False)
    one = 127 if name == "mxfp4" else 1
    w = _Weights(w.elements, np.full_like(w.scales, one), None, w.values, np.ones_like(w.factors))
    assert (np.abs(x).astype(np.float64) @ np.abs(w.exact()).T < 2.0**12).all()
    exact = x.astype(np.float64) @ w.exact().T
    found = _tiled(name, w, x)
    assert np.array_equal(found, exact)
    assert np.array_equal(found, _plain(name, w, x))


@pytest.mark.parametrize("name", ["f32", "bf16", "int8f", "int4"])
@pytest.mark.parametrize("m", [ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
def test_fused_products(name: str, m: int) -> None:
    """A norm, two products, their gate, in as much scratch memory as is asked for."""
    k, n, code = 96, 40, FORMATS[name].code
    x, weight = _random(m, k), _random(1, k)[0] * np.float32(2**-7 if name in INTEGERS else 1)
    first, second = _weights(name, n, k, False), _weights(name, n, k, False)
    eps = 1e-5
    args = np.array([m, k, fused.RMS_NORM, 1, 0, 0, 0, fused.GATE, 0, 2, n, code, 0, 0, n, code, 0, 0])
    args.view(np.float64)[5] = eps
    y = np.full((m, n), np.nan, np.float32)
    scaled = FORMATS[name].scale > 0
    each = [[v.elements.ctypes.data, *([v.scales.ctypes.data] if scaled else [])] for v in (first, second)]
    operands = np.array([x.ctypes.data, weight.ctypes.data, *each[0], *each[1], y.ctypes.data])
    for part in range(3):
        size = project_scratch(m, k, n, 2)
        memory, begin = _room(size)
        fused.project(operands, args, args.view(np.float64), memory.ctypes.data + begin, part, 3)
        assert _untouched(memory, begin, size)
    z = x.astype(np.float64)
    z = z / np.sqrt((z * z).mean(-1, keepdims=True) + eps) * weight
    g = z @ first.exact().T
    expected = g / (1 + np.exp(-g)) * (z @ second.exact().T)
    size64 = np.abs(z) @ np.abs(first.exact()).T
    # 2^-14: x as integers of 16 bits per block
    assert (np.abs(y - expected) <= 2.0**-14 * (size64 * (1 + size64))).all()
