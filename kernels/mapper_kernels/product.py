"""Products that are off the decode path: batched matrix products of any type, convolution; gates."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.gemm import gemm_kn
from mapper_kernels.jit import fast, jit
from mapper_kernels.memory import F32, FLOATS, f32_2d, load_f, load_i, store_f, store_i
from mapper_kernels.reduce import offset_of
from mapper_kernels.scalar import activate, exp32
from mapper_kernels.split import share

# typed numbers: a literal argument would compile the callee once more for that literal
_NONE: Any = np.int64(0)
_ONE: Any = np.int64(1)


@jit
def matmul(
    a: int, b: int, y: int, code: int, m: int, n: int, k: int,
    batch: Any, a_strides: Any, b_strides: Any, part: int, parts: int,
) -> None:  # fmt: skip
    """y [batch..., M, N] = a [batch..., M, K] b [batch..., K, N], each matrix contiguous, of one type.

    batch: leading dimensions; their strides in elements, 0 where broadcast. Floating-point sums in float32
    for float32, else in float64. Shares matrices, or columns where there is one.
    """
    count = 1
    for d in range(batch.shape[0]):
        count *= batch[d]
    low, high = share(count, 1, part, parts) if count > 1 else (0, count)
    for i in range(low, high):
        pa, pb = offset_of(i, batch, a_strides), offset_of(i, batch, b_strides)
        if code == F32:
            one, all_parts = (part, parts) if count == 1 else (_NONE, _ONE)
            x, w = f32_2d(a + 4 * pa, m, k), f32_2d(b + 4 * pb, k, n)
            gemm_kn(x, w, f32_2d(y + 4 * i * m * n, m, n), one, all_parts)
        elif count > 1 or part == 0:
            _product(a, pa, b, pb, y, i * m * n, code, m, n, k)


@jit
def _product(a: int, pa: int, b: int, pb: int, y: int, py: int, code: int, m: int, n: int, k: int) -> None:
    for r in range(m):
        for c in range(n):
            if code < FLOATS:
                total = 0.0
                for i in range(k):
                    total += load_f(a, code, pa + r * k + i) * load_f(b, code, pb + i * n + c)
                store_f(y, code, py + r * n + c, total)
            else:
                whole = np.int64(0)
                for i in range(k):
                    whole += load_i(a, code, pa + r * k + i) * load_i(b, code, pb + i * n + c)
                store_i(y, code, py + r * n + c, whole)


@fast
def conv(
    x: Any,
    w: Any,
    bias: Any,
    y: Any,
    strides: Any,
    pads: Any,
    dilations: Any,
    group: int,
    part: int,
    parts: int,
) -> None:
    """y [B, F, OH, OW] = correlation of x [B, C, H, W] with w [F, C/group, KH, KW] plus bias [F] (or length
    0).

    strides, dilations, pads (begins) [2]; float32. Shares output channels.
    """
    filters, channels = w.shape[0], w.shape[1]
    low, high = share(filters, 1, part, parts)
    for b in range(x.shape[0]):
        for f in range(low, high):
            first = f // (filters // group) * channels
            for oh in range(y.shape[2]):
                for ow in range(y.shape[3]):
                    h, v = oh * strides[0] - pads[0], ow * strides[1] - pads[1]
                    total = _window(x[b], w[f], first, h, v, dilations)
                    y[b, f, oh, ow] = total + (bias[f] if bias.shape[0] > 0 else np.float32(0))


@fast
def _window(x: Any, w: Any, first: int, top: int, left: int, dilations: Any) -> Any:
    total = np.float32(0)
    for c in range(w.shape[0]):
        for i in range(w.shape[1]):
            row = top + i * dilations[0]
            if row < 0 or row >= x.shape[1]:
                continue
            for j in range(w.shape[2]):
                column = left + j * dilations[1]
                if 0 <= column < x.shape[2]:
                    total += x[first + c, row, column] * w[c, i, j]
    return total


@fast
def gate(act: int, g: Any, u: Any, y: Any, part: int, parts: int) -> None:
    """y = act(g) * u, elementwise on 1-d float32 arrays; y may be g or u. Shares elements."""
    low, high = share(y.shape[0], 64, part, parts)
    if act == 0:
        for i in range(low, high):
            y[i] = g[i] / (np.float32(1) + exp32(-g[i])) * u[i]
        return
    for i in range(low, high):
        y[i] = activate(act, g[i]) * u[i]


@fast
def activation(act: int, x: Any, y: Any, part: int, parts: int) -> None:
    """y = act(x), elementwise on 1-d float32 arrays; y may be x. Shares elements."""
    low, high = share(y.shape[0], 64, part, parts)
    for i in range(low, high):
        y[i] = activate(act, x[i])
