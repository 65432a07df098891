"""Matrix products in float32: y = x W + bias, weights row-major as [N, K] (transposed) or [K, N].

Accumulation is in float32, in several partial sums per output. One row of x streams the weights once: four
weight rows at a time, so that four address streams are in flight. More rows of x reuse each loaded weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import fast
from mapper_kernels.memory import address_of
from mapper_kernels.split import share
from mapper_kernels.tile import tile_4x16

COLUMNS = 1024
"""Columns of a [K, N] weight that are accumulated at once: their sums stay in the first-level cache."""


@fast
def _row_nk(x: Any, w: Any, y: Any, low: int, high: int) -> None:
    k = x.shape[0]
    j = low
    while j + 4 <= high:
        a = np.float32(0)
        b = np.float32(0)
        c = np.float32(0)
        d = np.float32(0)
        for i in range(k):
            v = x[i]
            a += w[j, i] * v
            b += w[j + 1, i] * v
            c += w[j + 2, i] * v
            d += w[j + 3, i] * v
        y[j] = a
        y[j + 1] = b
        y[j + 2] = c
        y[j + 3] = d
        j += 4
    while j < high:
        a = np.float32(0)
        for i in range(k):
            a += w[j, i] * x[i]
        y[j] = a
        j += 1


@fast
def _pair_nk(x: Any, w: Any, y: Any, r: int, low: int, high: int) -> None:
    k = x.shape[1]
    j = low
    while j + 4 <= high:
        a0 = np.float32(0)
        b0 = np.float32(0)
        c0 = np.float32(0)
        d0 = np.float32(0)
        a1 = np.float32(0)
        b1 = np.float32(0)
        c1 = np.float32(0)
        d1 = np.float32(0)
        for i in range(k):
            u = x[r, i]
            v = x[r + 1, i]
            a0 += w[j, i] * u
            b0 += w[j + 1, i] * u
            c0 += w[j + 2, i] * u
            d0 += w[j + 3, i] * u
            a1 += w[j, i] * v
            b1 += w[j + 1, i] * v
            c1 += w[j + 2, i] * v
            d1 += w[j + 3, i] * v
        y[r, j] = a0
        y[r, j + 1] = b0
        y[r, j + 2] = c0
        y[r, j + 3] = d0
        y[r + 1, j] = a1
        y[r + 1, j + 1] = b1
        y[r + 1, j + 2] = c1
        y[r + 1, j + 3] = d1
        j += 4
    if j < high:
        _row_nk(x[r], w, y[r], j, high)
        _row_nk(x[r + 1], w, y[r + 1], j, high)


@fast
def gemm_nk(x: Any, w: Any, y: Any, part: int, parts: int) -> None:
    """y [M, N] = x [M, K] times the transpose of w [N, K]; float32. Shares columns of y."""
    m = x.shape[0]
    low, high = share(w.shape[0], 4, part, parts)
    block = low
    while block < high:
        # a block of weight rows is reused by all rows of x while it is in the cache
        end = min(block + 32, high) if m > 1 else high
        r = 0
        while r + 2 <= m:
            _pair_nk(x, w, y, r, block, end)
            r += 2
        if r < m:
            _row_nk(x[r], w, y[r], block, end)
        block = end


@fast
def _block_kn(x: Any, w: Any, y: Any, low: int, high: int) -> None:
    k = x.shape[0]
    for j in range(low, high):
        y[j] = np.float32(0)
    i = 0
    while i + 8 <= k:
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        x4, x5, x6, x7 = x[i + 4], x[i + 5], x[i + 6], x[i + 7]
        for j in range(low, high):
            y[j] += (
                (x0 * w[i, j] + x1 * w[i + 1, j]) + (x2 * w[i + 2, j] + x3 * w[i + 3, j])
                + (x4 * w[i + 4, j] + x5 * w[i + 5, j]) + (x6 * w[i + 6, j] + x7 * w[i + 7, j])
            )  # fmt: skip
        i += 8
    while i < k:
        v = x[i]
        for j in range(low, high):
            y[j] += v * w[i, j]
        i += 1


@fast
def _tiles_kn(x: Any, w: Any, y: Any, rows: int, low: int, high: int) -> None:
    """Rows 0..rows - 1 (a multiple of 4) of columns low..high - 1 (a multiple of 16) in register tiles."""
    k, n = w.shape
    at_x, at_w, at_y = address_of(x), address_of(w), address_of(y)
    for j in range(low, high, 16):
        for r in range(0, rows, 4):
            tile_4x16(at_x + 4 * r * k, k, at_w + 4 * j, n, at_y + 4 * (r * n + j), n, k)


@fast
def gemm_kn(x: Any, w: Any, y: Any, part: int, parts: int) -> None:
    """y [M, N] = x [M, K] times w [K, N]; float32, all contiguous. Shares columns of y."""
    m = x.shape[0]
    low, high = share(w.shape[1], 16, part, parts)
    tiled, wide = m // 4 * 4, low + (high - low) // 16 * 16
    if tiled > 0:
        _tiles_kn(x, w, y, tiled, low, wide)
    for r in range(m):
        block = low if r >= tiled else wide
        while block < high:
            end = min(block + COLUMNS, high)
            _block_kn(x[r], w, y[r], block, end)
            block = end


@fast
def add_bias(y: Any, bias: Any, part: int, parts: int, grain: int) -> None:
    """y [M, N] += bias [N], on the columns that a gemm with the same shares wrote (grain 4 for nk, 16 for
    kn)."""
    low, high = share(y.shape[1], grain, part, parts)
    for r in range(y.shape[0]):
        for j in range(low, high):
            y[r, j] += bias[j]
