"""Reductions, scans and softmax over arrays of any element type, given by address and type code."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import jit
from mapper_kernels.memory import FLOATS, load_f, load_i, store_f, store_i

SUM, MEAN, MAX, MIN, PROD, SUM_SQUARE, L2, L1, LOG_SUM_EXP = range(9)


@jit
def offset_of(index: int, shape: Any, strides: Any) -> Any:
    """Element offset of flat row-major `index` in an array of `shape` with `strides` (in elements)."""
    offset = 0
    for d in range(shape.shape[0] - 1, -1, -1):
        offset += index % shape[d] * strides[d]
        index //= shape[d]
    return offset


@jit
def _total_f(kind: int, x: int, code: int, base: int, count: int, shape: Any, strides: Any) -> Any:
    total = 1.0 if kind == PROD else 0.0
    if kind == MAX:
        total = -np.inf
    elif kind == MIN:
        total = np.inf
    top = -np.inf
    if kind == LOG_SUM_EXP:
        for i in range(count):
            top = np.maximum(top, load_f(x, code, base + offset_of(i, shape, strides)))
        if np.isinf(top) and top < 0:
            return top
    for i in range(count):
        v = load_f(x, code, base + offset_of(i, shape, strides))
        if kind in (SUM, MEAN):
            total += v
        elif kind == MAX:
            total = np.maximum(total, v)
        elif kind == MIN:
            total = np.minimum(total, v)
        elif kind == PROD:
            total *= v
        elif kind == L1:
            total += abs(v)
        elif kind == LOG_SUM_EXP:
            total += np.exp(v - top)
        else:
            total += v * v
    if kind == MEAN:
        return total / count
    if kind == L2:
        return np.sqrt(total)
    return np.log(total) + top if kind == LOG_SUM_EXP else total


@jit
def _total_i(kind: int, x: int, code: int, base: int, count: int, shape: Any, strides: Any) -> Any:
    total = load_i(x, code, base) if count > 0 and kind in (MAX, MIN) else np.int64(kind == PROD)
    for i in range(count):
        v = load_i(x, code, base + offset_of(i, shape, strides))
        if kind in (SUM, MEAN):
            total += v
        elif kind == MAX:
            total = max(total, v)
        elif kind == MIN:
            total = min(total, v)
        elif kind == PROD:
            total *= v
        elif kind == L1:
            total += abs(v)
        else:
            total += v * v
    return total // count if kind == MEAN and count > 0 else total


@jit
def reduce(
    kind: int, x: int, code: int, y: int, kept: Any, kept_strides: Any, gone: Any, gone_strides: Any
) -> None:
    """y (contiguous, of the same type) = x reduced by `kind`.

    kept, gone: the dimensions that stay and those that are reduced, with x's element strides. Sums of
    floating-point elements are taken in float64.
    """
    rows, count = 1, 1
    for d in range(kept.shape[0]):
        rows *= kept[d]
    for d in range(gone.shape[0]):
        count *= gone[d]
    for row in range(rows):
        base = offset_of(row, kept, kept_strides)
        if code < FLOATS:
            store_f(y, code, row, _total_f(kind, x, code, base, count, gone, gone_strides))
        else:
            store_i(y, code, row, _total_i(kind, x, code, base, count, gone, gone_strides))


@jit
def softmax(x: int, code: int, y: int, outer: int, n: int, inner: int, log: bool) -> None:
    """y = softmax (or its logarithm) of x along the middle dimension of [outer, n, inner]; float64 inside."""
    for o in range(outer):
        for j in range(inner):
            base = o * n * inner + j
            top = -np.inf
            for i in range(n):
                top = np.maximum(top, load_f(x, code, base + i * inner))
            total = 0.0
            for i in range(n):
                total += np.exp(load_f(x, code, base + i * inner) - top)
            for i in range(n):
                d = load_f(x, code, base + i * inner) - top
                store_f(y, code, base + i * inner, d - np.log(total) if log else np.exp(d) / total)


@jit
def cumsum(x: int, code: int, y: int, outer: int, n: int, inner: int, exclusive: bool, reverse: bool) -> None:
    """y = running sums of x along the middle dimension of [outer, n, inner]."""
    for o in range(outer):
        for j in range(inner):
            sum_f, sum_i = 0.0, np.int64(0)
            for i in range(n):
                at = (o * n + (n - 1 - i if reverse else i)) * inner + j
                if code < FLOATS:
                    before_f = sum_f
                    sum_f += load_f(x, code, at)
                    store_f(y, code, at, before_f if exclusive else sum_f)
                else:
                    before_i = sum_i
                    sum_i += load_i(x, code, at)
                    store_i(y, code, at, before_i if exclusive else sum_i)


@jit
def topk(
    x: int, code: int, values: int, indices: int, outer: int, n: int, inner: int, k: int, largest: bool
) -> None:
    """The k largest (or smallest) along the middle dimension of [outer, n, inner], in order; the lower
    index first.

    values [outer, k, inner] of x's type (address 0: not wanted), indices int64 of the same shape.
    """
    best = np.empty(k, np.float64)
    where = np.empty(k, np.int64)
    for o in range(outer):
        for j in range(inner):
            found = 0
            for i in range(n):
                v = load_f(x, code, (o * n + i) * inner + j)
                place = found
                while place > 0 and (best[place - 1] < v if largest else best[place - 1] > v):
                    place -= 1
                if place < k:
                    found = min(found + 1, k)
                    for m in range(found - 1, place, -1):
                        best[m] = best[m - 1]
                        where[m] = where[m - 1]
                    best[place] = v
                    where[place] = i
            for m in range(k):
                to = (o * k + m) * inner + j
                store_i(indices, 6, to, where[m])
                if values != 0:
                    source = (o * n + where[m]) * inner + j
                    if code < FLOATS:
                        store_f(values, code, to, load_f(x, code, source))
                    else:
                        store_i(values, code, to, load_i(x, code, source))
