"""Shapes and strides (in elements) of row-major arrays, broadcast, permuted and collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence

Ints = tuple[int, ...]


def row_major(shape: Sequence[int]) -> Ints:
    """Strides of a contiguous array."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def broadcast(shape: Sequence[int], to: Sequence[int]) -> Ints:
    """Strides of a contiguous array of `shape` read as an array of shape `to` (NumPy broadcasting)."""
    padded = (1,) * (len(to) - len(shape)) + tuple(shape)
    return tuple(0 if d == 1 else s for d, s in zip(padded, row_major(padded), strict=True))


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[Ints, list[Ints]]:
    """The same walk over all operands with as few dimensions as possible (at least one)."""
    kept: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for d in reversed(range(len(shape))):
        if shape[d] == 1:
            continue
        now = [s[d] for s in strides]
        if kept and all(w[0] * kept[0] == n for w, n in zip(walks, now, strict=True)):
            kept[0] *= shape[d]
            continue
        kept.insert(0, shape[d])
        for w, n in zip(walks, now, strict=True):
            w.insert(0, n)
    if not kept:
        return (1,), [(0,) for _ in strides]
    return tuple(kept), [tuple(w) for w in walks]


def around(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """(outer, n, inner): the elements before, along and after `axis` (negative ones count from the end)."""
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
