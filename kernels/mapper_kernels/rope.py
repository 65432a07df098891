"""Rotary position embedding in float32."""

from __future__ import annotations

from typing import Any

from mapper_kernels.jit import fast
from mapper_kernels.split import share


@fast
def rotate(x: Any, cos: Any, sin: Any, y: Any, rotary: int, interleaved: bool, angle_step: int) -> None:
    """Rotate one vector: pairs (a, b) of its first `rotary` columns become (a cos - b sin, b cos + a sin).

    x, y [Dh]; the angle of pair i is at index i * angle_step of cos and sin. Pairs are columns (i, i +
    rotary/2), or (2i, 2i + 1) where `interleaved`. The other columns are copied. y may be x.
    """
    half = rotary // 2
    for i in range(half):
        p = 2 * i if interleaved else i
        q = p + 1 if interleaved else i + half
        c, s = cos[i * angle_step], sin[i * angle_step]
        a, b = x[p], x[q]
        y[p] = a * c - b * s
        y[q] = b * c + a * s
    for i in range(rotary, x.shape[0]):
        y[i] = x[i]


@fast
def rope_at(
    x: Any, table: Any, y: Any, seq: int, past: int, rotary: int, interleaved: bool, part: int, parts: int
) -> None:
    """Rotate rows of x [R, Dh] (R = batch * heads * seq, seq innermost) at positions past .. past + seq - 1.

    table [2, L, rotary/2] holds cosines and sines by position; past + seq <= L. float32. Shares rows.
    """
    low, high = share(x.shape[0], 1, part, parts)
    for r in range(low, high):
        position = past + r % seq
        rotate(x[r], table[0, position], table[1, position], y[r], rotary, interleaved, 1)
