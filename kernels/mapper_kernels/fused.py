"""The fused steps of decoding: products with what comes before and after them, attention with rotation and
cache.

    project        [norm ->] one to three products [-> bias, + residual, activation, or gate]
    attend_cached  rotary embedding, append to the cache, attention; partial results where the cache is split

All take addresses of float32 arrays (weights: see `formats`), and do share `part` of `parts`. What every
thread needs whole (the normalised and prepared rows of x) each thread makes for itself, in `scratch` memory
of its own: that costs less than waiting for the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.flash import attend, merge
from mapper_kernels.formats import FORMATS
from mapper_kernels.jit import fast, jit
from mapper_kernels.linear import prepare_rows, prepared_bytes, product
from mapper_kernels.memory import f32, f32_2d, f64_to_small, u16
from mapper_kernels.names import ATTEND_HEAD, EPILOGUES, NORMS, PROJECT_EACH, PROJECT_HEAD
from mapper_kernels.norm import norm
from mapper_kernels.prefill import in_tiles, tile_end, tile_row, tiled, tiled_size
from mapper_kernels.product import gate
from mapper_kernels.rope import rotate
from mapper_kernels.scalar import activate
from mapper_kernels.sizes import ROWS_AT_ONCE, SCORES
from mapper_kernels.split import share

GRAIN = 16
"""Columns of y are shared in whole cache lines."""
PLAIN, RESIDUAL, GATE, ACTIVATION = range(len(EPILOGUES))
NO_NORM, RMS_NORM, LAYER_NORM = range(len(NORMS))
_ONE: Any = np.int64(1)
_NONE: Any = np.int64(0)


@fast
def _finish(
    kind: int,
    act: int,
    a: int,
    a_row: int,
    b: int,
    residual: int,
    y: int,
    y_row: int,
    rows: int,
    low: int,
    high: int,
) -> None:
    """Columns low..high - 1 of y from those of the products a and b (rows `a_row` bytes apart)."""
    width = high - low
    for r in range(rows):
        first, out = f32(a + r * a_row + 4 * low, width), f32(y + r * y_row + 4 * low, width)
        if kind == RESIDUAL:
            old = f32(residual + r * y_row + 4 * low, width)
            for i in range(width):
                out[i] = first[i] + old[i]
        elif kind == GATE:
            gate(act, first, f32(b + r * a_row + 4 * low, width), out, _NONE, _ONE)
        else:
            for i in range(width):
                out[i] = activate(act, first[i])


@fast
def _add_bias(y: int, y_row: int, bias: int, rows: int, low: int, high: int) -> None:
    b = f32(bias + 4 * low, high - low)
    for r in range(rows):
        out = f32(y + r * y_row + 4 * low, high - low)
        for i in range(high - low):
            out[i] += b[i]


@jit
def _enter(r: Any, a: Any, f: Any, code: int, first: int, rows: int, scratch: int, prepared: int) -> None:
    """Normalise and prepare rows first.. of x for a format."""
    k, normed, tiles = a[1], a[2] != NO_NORM, in_tiles(code, rows)
    weight = f32(r[1], k if a[3] else 0)
    bias = f32(r[1 + a[3]], k if a[4] else 0)
    step = prepared_bytes(code, k)
    for i in range(rows):
        x = r[0] + 4 * k * (first + i)
        if normed:
            y = f32_2d(scratch, 1, k)
            norm(f32_2d(x, 1, k), weight, bias, y, a[2] == LAYER_NORM, f[5], f[6], _NONE, _ONE)
            x = scratch
        if tiles:
            tile_row(code, x, i, rows, k, prepared)
        else:
            prepare_rows(code, x, 4 * k, _ONE, k, prepared + i * step)
    if tiles:
        tile_end(code, rows, k, prepared)


@jit
def project(r: Any, a: Any, f: Any, scratch: int, part: int, parts: int) -> None:
    """y_i = (norm of x) W_i^T + b_i, then the epilogue; shares the columns of every y.

    a, f: arguments (see PROJECT_HEAD and PROJECT_EACH) as int64 and as float64. r: addresses of x [m, k],
    the norm's weight and bias [k]; of every matrix its elements, scales, zeros and bias [n], as far as it
    has them; the residual [m, n]; and the results: [m, n] for each matrix (PLAIN), else one.
    """
    m, k, kind, count = a[0], a[1], a[7], a[9]
    for first in range(0, m, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, m - first)
        prepared = scratch + (4 * k + 63) // 64 * 64
        at = 1 + a[3] + a[4]
        outs = at
        products = prepared
        known = -1
        for i in range(count):
            e = a[PROJECT_HEAD + PROJECT_EACH * i :]
            outs += 1 + (_scaled(e[1]) > 0) + e[2] + e[3]
            if in_tiles(e[1], rows):
                products = max(products, prepared + tiled_size(e[1], rows, k))
            else:
                products = max(products, prepared + (rows + 3) // 4 * 4 * prepared_bytes(e[1], k))
        products = (products + 63) // 64 * 64
        residual = r[outs] if kind == RESIDUAL else 0
        outs += kind == RESIDUAL
        made = products
        for i in range(count):
            e = a[PROJECT_HEAD + PROJECT_EACH * i :]
            n, code = e[0], e[1]
            if code != known:
                _enter(r, a, f, code, first, rows, scratch, prepared)
                known = code
            low, high = share(n, GRAIN, part, parts)
            scaled = _scaled(code) > 0
            s = r[at + 1] if scaled else 0
            z = r[at + 1 + scaled] if e[2] else 0
            y = r[outs + i] + 4 * n * first if kind == PLAIN else made
            if in_tiles(code, rows):
                tiled(code, r[at], s, z, prepared, rows, k, y, 4 * n, low, high)
            else:
                product(code, r[at], s, z, prepared, rows, k, y, 4 * n, low, high)
            if e[3]:
                _add_bias(y, 4 * n, r[at + 1 + scaled + e[2]], rows, low, high)
            at += 1 + scaled + e[2] + e[3]
            made += (4 * rows * n + 63) // 64 * 64
        if kind != PLAIN:
            n = a[PROJECT_HEAD]
            low, high = share(n, GRAIN, part, parts)
            second = products + (4 * rows * n + 63) // 64 * 64
            y, old = r[outs] + 4 * n * first, residual + 4 * n * first
            _finish(kind, a[8], products, 4 * n, second, old, y, 4 * n, rows, low, high)


_SCALES = np.array([f.scale for f in sorted(FORMATS.values(), key=lambda f: f.code)])


@jit
def _scaled(code: int) -> int:
    size: int = _SCALES[code]
    return size


@jit
def _store_row(code: int, x: Any, to: int, d: int) -> None:
    if code == 0:
        y = f32(to, d)
        for i in range(d):
            y[i] = x[i]
    else:
        h = u16(to, d)
        for i in range(d):
            if code == 1:
                h[i] = np.uint16(f64_to_small(np.float64(x[i]), 5, 10, False))
            else:
                h[i] = np.uint16(f64_to_small(np.float64(x[i]), 8, 7, False))


@jit
def attend_cached(r: Any, a: Any, f: Any, past: int, scratch: int, part: int, parts: int) -> None:
    """One new token per sequence: its query and key are rotated, key and value are appended at row `past`
    of the caches, and the query attends to rows ..past, of those the last `window` where that is not 0, and
    those of its own run of `chunk` rows where that is not 0.

    r: addresses of q [B, H, D], k [B, Hkv, D], v [B, Hkv, Dv], the caches [B, Hkv, L, D] and [B, Hkv, L,
    Dv], the position, the rotary table [2, rows, rotary / 2] where rotary > 0, sinks [H] where there are;
    then, written, the caches again and y: [B, H, Dv], or with splits > 1 partial results [B, H, splits, Dv
    + 2] (see `flash`). Shares (batch, key head, split) triples.
    """
    batch, heads, d, kv, length, dv = a[0], a[1], a[2], a[3], a[4], a[5]
    rotary, splits, code = a[11], a[14], a[15]
    size = 4 if code == 0 else 2
    group = heads // kv
    y = r[8 + (rotary > 0) + a[7]]
    cos = f32(r[6] + 4 * past * (rotary // 2), rotary // 2)
    sin = f32(r[6] + 4 * (a[13] + past) * (rotary // 2), rotary // 2)
    sinks = f32(r[6 + (rotary > 0)], heads if a[7] else 0)
    queries = scratch + SCORES
    slopes = queries + (4 * group * d + 63) // 64 * 64
    partial = slopes + (4 * group + 63) // 64 * 64
    seen = past + 1 if a[6] == 0 else min(past + 1, a[6])
    if a[16] > 0:
        seen = min(seen, past % a[16] + 1)
    step = 4 * (dv + 2)
    low, high = share(batch * kv * splits, 1, part, parts)
    for item in range(low, high):
        split, row = item % splits, item // splits
        begin = past + 1 - seen + seen * split // splits
        end = past + 1 - seen + seen * (split + 1) // splits
        keys, values = r[3] + size * row * length * d, r[4] + size * row * length * dv
        if split == splits - 1:
            q = f32(queries, d)
            rotate(f32(r[1] + 4 * row * d, d), cos, sin, q, rotary, a[12] != 0, _ONE)
            _store_row(code, q, keys + size * past * d, d)
            _store_row(code, f32(r[2] + 4 * row * dv, dv), values + size * past * dv, dv)
        first = row * group  # batch and head in one
        for g in range(group):
            q = f32(queries + 4 * g * d, d)
            rotate(f32(r[0] + 4 * (first + g) * d, d), cos, sin, q, rotary, a[12] != 0, _ONE)
            if a[8]:
                f32(slopes, group)[g] = np.float32(f[ATTEND_HEAD + (first + g) % heads])
        to = partial if splits == 1 else y + (first * splits + split) * step
        apart = step if splits == 1 else splits * step
        attend(
            code, queries, 4 * d, group, keys, size * d, 0, values, size * dv, 0, begin, end, d, dv,
            np.float32(f[9]), np.float32(f[10]), slopes if a[8] else _NONE, past, scratch, to, apart,
        )  # fmt: skip
        if splits == 1:
            for g in range(group):
                h = first + g
                sink = sinks[h % heads] if a[7] else np.float32(0)
                merge(partial + g * step, 0, _ONE, dv, a[7] != 0, sink, y + 4 * h * dv)


@jit
def merge_splits(r: Any, a: Any, part: int, parts: int) -> None:
    """y [B, H, Dv] from partial results [B, H, splits, Dv + 2] and sinks [H] (where a[4]); a: B H, H,
    splits, Dv, has sinks. Shares rows."""
    low, high = share(a[0], 1, part, parts)
    sinks = f32(r[1], a[1] if a[4] else 0)
    step = 4 * (a[3] + 2)
    for h in range(low, high):
        sink = sinks[h % a[1]] if a[4] else np.float32(0)
        merge(r[0] + h * a[2] * step, step, a[2], a[3], a[4] != 0, sink, r[1 + a[4]] + 4 * h * a[3])
