"""Operands of the kernels for tests: memory that shows what is touched beside them, random weights of every
format, and what they stand for in float64, decoded here by ml_dtypes and NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mapper_kernels.formats import FORMATS
from mapper_kernels.weight import Weight

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]
ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""
MARGIN = 256
"""Bytes before and behind an operand; 0xFF is NaN in every float format and the largest code in the
others."""


@dataclass
class Arena:
    """Operands at chosen misalignments in memory full of 0xFF. `check` finds writes outside of results."""

    offset: int = 0
    _held: list[tuple[Array, Array, bool]] = field(default_factory=list)

    def put(self, array: Array) -> int:
        """Copy an operand; its address."""
        return self._place(array, False).ctypes.data

    def result(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """A result to be written, all 0xFF (NaN)."""
        filled = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        return self._place(filled.view(dtype).reshape(shape), True)

    def scratch(self, size: int) -> int:
        """Poisoned scratch memory of so many bytes, aligned to a cache line as the kernels' hosts do it."""
        whole = np.full(size + 2 * MARGIN + 64, 0xFF, np.uint8)
        start = MARGIN + -(whole.ctypes.data + MARGIN) % 64
        self._held.append((whole, whole[start : start + size], True))
        return whole[start:].ctypes.data

    def _place(self, array: Array, written: bool) -> Array:
        whole = np.full(array.nbytes + 2 * MARGIN + 64, 0xFF, np.uint8)
        # an element's own alignment is kept, a vector's is not
        shift = self.offset * array.itemsize % 64
        start = MARGIN + -(whole.ctypes.data + MARGIN) % 64 + shift
        part = whole[start : start + array.nbytes]
        part[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._held.append((whole, part if written else whole.copy(), written))
        return part.view(array.dtype).reshape(array.shape)

    def check(self) -> None:
        """Nothing but results and scratch was written."""
        for whole, kept, written in self._held:
            if not written:
                np.testing.assert_array_equal(whole, kept)
                continue
            start = kept.ctypes.data - whole.ctypes.data
            assert (whole[:start] == 0xFF).all() and (whole[start + kept.nbytes :] == 0xFF).all()


def random_weight(rng: np.random.Generator, name: str, n: int, k: int, zeros: bool = False) -> Weight:
    """Random codes and scales, also in the padding of the last block, which must not count."""
    layout = FORMATS[name]
    width = layout.value_bytes(k)
    scales: Array | None = None
    if name == "f32":
        values: Array = rng.standard_normal((n, k)).astype(np.float32)
    elif name == "f16":
        values = rng.standard_normal((n, k)).astype(np.float16)
    elif name == "bf16":
        values = rng.standard_normal((n, k)).astype(ml_dtypes.bfloat16)
    else:
        values = rng.integers(0, 256, (n, width)).astype(np.uint8)
    if name == "f8e4m3":
        values[(values & 0x7F) == 0x7F] = 0x80  # NaN is not one of its codes; -0 is
    if layout.scale:
        shape = (n, layout.scale_bytes(k) // layout.scale)
        factors = rng.uniform(0.25, 2.0, shape) * rng.choice([-1, 1], shape)
        scales = factors.astype({2: np.float16, 4: np.float32}.get(layout.scale, np.float32))
        if layout.scale == 1:
            scales = rng.integers(118, 130, shape).astype(np.uint8)
    points = rng.integers(0, 256, (n, layout.zero_bytes(k))).astype(np.uint8) if zeros else None
    return Weight(name, values, (n, k), scales, points)


def _nibbles(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def decoded(weight: Weight) -> tuple[F64, F64]:
    """W [N, K] in float64, and the magnitudes |q - middle| + |zero - middle|, scaled, that its sums are made
    of (|W| but for zero points)."""
    k, name = weight.shape[1], weight.format
    if weight.scales is None:
        plain = weight.values.astype(np.float64)
        return plain, np.abs(plain)
    scales = weight.scales.astype(np.float64)
    if name == "f8e4m3":
        w = weight.values.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
        return w, np.abs(w)
    if name == "int8row":
        w = (weight.values.astype(np.float64) - 128) * scales
        return w, np.abs(w)
    wide = np.repeat(scales, 32, 1)[:, :k]
    if name == "mxfp4":
        codes = _nibbles(weight.values)[:, :k].view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        w = codes * 2.0 ** (wide - 127)
        return w, np.abs(w)
    if name.startswith("int8"):
        w = (weight.values[:, :k].astype(np.float64) - 128) * wide
        return w, np.abs(w)
    q = _nibbles(weight.values)[:, :k].astype(np.float64)
    zero = np.full_like(q, 8.0)
    if weight.zeros is not None:
        zero = np.repeat(_nibbles(weight.zeros)[:, : scales.shape[1]], 32, 1)[:, :k].astype(np.float64)
    return (q - zero) * wide, (np.abs(q - 8) + np.abs(zero - 8)) * np.abs(wide)


def product_bound(weight: Weight, x: F64) -> F64:
    """How far y [M, N] may be from x W^T, x [M, K] in float64.

    Floating-point weights are widened exactly; K products are added in float32, each step rounded once: with
    u = 2^-24, at most (K + 2) u sum |x||w|; a row's factor and scale add two.

    Integer weights: x is taken as round(x / step) with step = largest magnitude of its block of 32 / 32,639.
    The quotient is off by two roundings of at most 32,639 u each, so the error of an element is at most (1/2
    + 65,278 u) step, times |w|. Sums inside a block are exact. Behind them every lane is converted, scaled by
    a product of two float32 numbers, and added: 2 ceil(K / 128) steps; zero points take ceil(K / 512) more
    with three roundings in each term; the lanes are added in 4 steps each; row scales and the step itself
    round too: all in all at most 2 ceil(K/128) + ceil(K/512) + 16 roundings of magnitudes not above sum |x||q
    - middle| scale + |x||zero - middle| scale.
    """
    k = weight.shape[1]
    w, size = decoded(weight)
    if weight.format in ("f32", "f16", "bf16", "f8e4m3"):
        roundings = k + (4 if weight.format == "f8e4m3" else 2)
        return roundings * ROUNDING * (np.abs(x) @ np.abs(w).T)
    blocks = -(-k // 32)
    padded = np.zeros((len(x), blocks * 32))
    padded[:, :k] = np.abs(x)
    step = np.repeat(padded.reshape(len(x), blocks, 32).max(-1) / 32639, 32, 1)[:, :k]
    roundings = 2 * -(-k // 128) + -(-k // 512) + 16
    taken = np.abs(x) + step
    rounded: F64 = ((0.5 + 65278 * ROUNDING) * step) @ np.abs(w).T
    rounded += roundings * ROUNDING * (taken @ size.T)
    return rounded
