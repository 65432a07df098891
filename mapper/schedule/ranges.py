"""Minimum and maximum over many ranges at once, in NumPy alone: sparse tables walked level by level.

A range [a, b) is the union of two blocks of 2**k elements, k = floor(log2(b - a)). All ranges of one
level are served together, so n ranges over m elements cost O(n + m log m) time and O(m) memory.
"""

from __future__ import annotations

import numpy as np

from mapper.schedule.tables import Int

NEVER = np.int64(2**62)
"""Later than every cycle."""


def _levels(a: Int, b: Int) -> Int:
    # exact for every length below 2**53
    return np.frexp((b - a).astype(np.float64))[1].astype(np.int64) - 1


def paint_min(size: int, a: Int, b: Int, value: Int) -> Int:
    """out[i] = min of value[j] over all ranges a[j] <= i < b[j]; NEVER where no range covers i."""
    keep = b > a
    a, b, value = a[keep], b[keep], value[keep]
    out = np.full(size, NEVER)
    if not len(a):
        return out
    level = _levels(a, b)
    for k in range(int(level.max()), -1, -1):
        width = 1 << k
        here = level == k
        current = np.full(size, NEVER)
        for at in (a[here], b[here] - width):
            np.minimum.at(current, at, value[here])
        # `out` holds blocks of twice this width: split each into its two halves
        np.minimum(current, out, out=current)
        if size > width:
            np.minimum(current[width:], out[:-width], out=current[width:])
        out = current
    return out


def query_max(values: Int, a: Int, b: Int) -> Int:
    """max(values[a[j]:b[j]]) for every j; the ranges must not be empty."""
    out = np.empty(len(a), np.int64)
    if not len(a):
        return out
    level = _levels(a, b)
    current = values
    for k in range(int(level.max()) + 1):
        here = np.flatnonzero(level == k)
        out[here] = np.maximum(current[a[here]], current[b[here] - (1 << k)])
        if current.size > (1 << k):
            current = np.maximum(current[: -(1 << k)], current[1 << k :])
    return out


def expand(a: Int, b: Int) -> tuple[Int, Int]:
    """(j, i) for every j and every a[j] <= i < b[j], in that order."""
    length = np.maximum(b - a, 0)
    owner = np.repeat(np.arange(len(a)), length)
    first = np.cumsum(length) - length
    return owner, np.arange(len(owner)) - first[owner] + a[owner]
