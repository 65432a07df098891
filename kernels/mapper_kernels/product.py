"""Products that are off the decode path: batched matrix products of any type, convolution, mixtures of
experts."""

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


@fast
def route(s: Any, chosen: Any, weight: Any, scoring: int, normalise: bool, scale: float) -> None:
    """Choose len(chosen) experts by the router scores s [E] (overwritten): their indices and weights.

    scoring: 0 softmax over all, 1 sigmoid of each, 2 softmax over the chosen. Ties go to the lower index.
    """
    top = s[0]
    for e in range(s.shape[0]):
        top = max(top, s[e])
    total = np.float32(0)
    for e in range(s.shape[0]):
        s[e] = np.float32(1) / (np.float32(1) + exp32(-s[e])) if scoring == 1 else exp32(s[e] - top)
        total += s[e]
    part = np.float32(0)
    for i in range(chosen.shape[0]):
        best = -1
        for e in range(s.shape[0]):
            taken = False
            for j in range(i):
                taken = taken or chosen[j] == e
            if not taken and (best < 0 or s[e] > s[best]):
                best = e
        chosen[i] = best
        weight[i] = s[best]
        part += s[best]
    factor = np.float32(1) if scoring == 1 else np.float32(1) / total
    if normalise or scoring == 2:
        factor = np.float32(1) / part
    for i in range(chosen.shape[0]):
        weight[i] *= factor * np.float32(scale)


@fast
def experts(
    x: Any,
    chosen: Any,
    weight: Any,
    gates: Any,
    ups: Any,
    downs: Any,
    act: int,
    g: Any,
    u: Any,
    z: Any,
    y: Any,
) -> None:
    """y [1, D] = sum over the chosen experts of weight * down(act(gate(x)) * up(x)).

    x [1, D]; gates, ups [E, D, F]; downs [E, F, D]; scratch g, u [1, F] and z [1, D]; float32.
    """
    for d in range(y.shape[1]):
        y[0, d] = np.float32(0)
    for i in range(chosen.shape[0]):
        e = chosen[i]
        gemm_kn(x, gates[e], g, _NONE, _ONE)
        gemm_kn(x, ups[e], u, _NONE, _ONE)
        gate(act, g[0], u[0], g[0], _NONE, _ONE)
        gemm_kn(g, downs[e], z, _NONE, _ONE)
        for d in range(y.shape[1]):
            y[0, d] += weight[i] * z[0, d]
