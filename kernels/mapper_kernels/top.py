"""The largest logits and where they are; the product that makes them shared by parts.

Order: larger first, the lower index first among equals (-0 equals 0). NaN comes before every number, as in
NumPy's argmax: a model that breaks shows, instead of a token that looks chosen.
"""

from __future__ import annotations

from typing import Any

from mapper_kernels.jit import inline, jit
from mapper_kernels.linear import product
from mapper_kernels.memory import f32, i64
from mapper_kernels.split import share

GRAIN = 16
"""Rows of the weight are shared in whole cache lines of logits."""
_AT_ONCE = 4096
"""Logits that are made before they are looked at: they are still in the first-level cache then."""


@inline
def _before(a: Any, b: Any) -> bool:
    """Whether a, found later, comes before b."""
    return bool(a > b or (a != a and b == b))


@jit
def _insert(values: Any, indices: Any, held: int, value: Any, index: int) -> int:
    """Put one candidate in its place in the k best; how many are held now."""
    k: int = values.shape[0]
    if held == k and not _before(value, values[k - 1]):
        return held
    place = min(held, k - 1)
    while place > 0 and _before(value, values[place - 1]):
        values[place], indices[place] = values[place - 1], indices[place - 1]
        place -= 1
    values[place], indices[place] = value, index
    return min(held + 1, k)


@jit
def top_of(y: int, low: int, high: int, k: int, held: int, values: int, indices: int) -> int:
    """Add logits low..high - 1 of y (address, float32) to the k best, of which `held` are there; how many
    then.

    Addresses of float32 [k] and int64 [k]. Calls must go by rising index.
    """
    v, at, x = f32(values, k), i64(indices, k), f32(y, high)
    for i in range(low, high):
        held = _insert(v, at, held, x[i], i)
    return held


@jit
def product_top(
    code: int, w: int, s: int, z: int, x: int, k: int, n: int, y: int, best: int, values: int, indices: int,
    part: int, parts: int,
) -> int:  # fmt: skip
    """This part's logits y = W x, and the `best` largest of them; how many there are (its rows may be fewer).

    The first arguments are those of `linear.product`, x one prepared row; y [n] float32. values, indices:
    this part's own [best].
    """
    low, high = share(n, GRAIN, part, parts)
    held = 0
    for first in range(low, high, _AT_ONCE):
        last = min(first + _AT_ONCE, high)
        product(code, w, s, z, x, 1, k, y, 4 * n, first, last)
        held = top_of(y, first, last, best, held, values, indices)
    return held


@jit
def merge_top(values: int, indices: int, held: Any, best: int, out_values: int, out_indices: int) -> None:
    """The `best` of all parts' [parts, best], of which held[part] are there; parts hold rising indices."""
    v, at = f32(out_values, best), i64(out_indices, best)
    count = 0
    for part in range(held.shape[0]):
        theirs, where = f32(values + 4 * part * best, best), i64(indices + 8 * part * best, best)
        for i in range(held[part]):
            count = _insert(v, at, count, theirs[i], where[i])
