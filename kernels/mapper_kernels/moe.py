"""Routed experts: choosing them from router scores, and the products of the chosen ones alone.

Float32 throughout; sums accumulate in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.gemm import gemm_kn, gemm_nk
from mapper_kernels.jit import fast, jit
from mapper_kernels.product import activation, gate
from mapper_kernels.scalar import exp32

SOFTMAX, SIGMOID, TOPK_SOFTMAX, PLAIN = range(4)
"""How scores become shares: see `route`."""
SPLIT, HALVES, INTERLEAVED = range(3)
"""How gate and up lie: as two matrices, as halves of one, as alternating columns of one."""

# typed numbers: a literal argument would compile the callee once more for that literal
_NONE: Any = np.int64(0)
_ONE: Any = np.int64(1)


# not `fast`: masked scores may be infinite
@jit
def _best(s: Any, taken: Any) -> int:
    """The index of the largest score not taken, the lower one of equal ones; it is taken then."""
    best = -1
    for e in range(s.shape[0]):
        if not taken[e] and (best < 0 or s[e] > s[best]):
            best = e
    taken[best] = True
    return best


@jit
def _keep_groups(choice: Any, groups: int, kept: int, pairs: bool, fill: float) -> None:
    """Replaces by `fill` the scores outside of the `kept` best of `groups` equal runs."""
    size = choice.shape[0] // groups
    value, out = np.empty(groups, np.float32), np.ones(groups, np.bool_)
    for g in range(groups):
        used = np.zeros(size, np.bool_)
        run = choice[g * size : (g + 1) * size]
        value[g] = run[_best(run, used)]
        if pairs and size > 1:
            value[g] += run[_best(run, used)]
    used = np.zeros(groups, np.bool_)
    for _ in range(kept):
        out[_best(value, used)] = False
    for e in range(choice.shape[0]):
        if out[e // size]:
            choice[e] = np.float32(fill)


@jit
def route(
    s: Any, correction: Any, chosen: Any, weight: Any, scoring: int, groups: int, kept: int, pairs: bool,
    fill: float, normalise: bool, epsilon: float, scale: float,
) -> None:  # fmt: skip
    """Choose len(chosen) experts by the logits s [E] (overwritten by scores): their indices and shares.

    scoring: SOFTMAX over all, SIGMOID of each, TOPK_SOFTMAX over the chosen, PLAIN logits. The choice is by
    score + correction [E] (or length 0). groups > 0: only the `kept` best runs stay eligible, a run counting
    as its best score or (pairs) its best two; the others become `fill`. Ties go to the lower index.
    """
    top = s[0]
    for e in range(s.shape[0]):
        top = max(top, s[e])
    total = np.float32(0)
    for e in range(s.shape[0]):
        if scoring == SIGMOID:
            s[e] = np.float32(1) / (np.float32(1) + exp32(-s[e]))
        elif scoring != PLAIN:
            s[e] = exp32(s[e] - top)
        total += s[e]
    if scoring == SOFTMAX:
        for e in range(s.shape[0]):
            s[e] /= total
    choice = s.copy()
    for e in range(correction.shape[0]):
        choice[e] += correction[e]
    if groups > 0:
        _keep_groups(choice, groups, kept, pairs, fill)
    taken = np.zeros(s.shape[0], np.bool_)
    part = np.float32(0)
    for i in range(chosen.shape[0]):
        chosen[i] = _best(choice, taken)
        weight[i] = s[chosen[i]]
        part += weight[i]
    factor = np.float32(scale)
    if normalise or scoring == TOPK_SOFTMAX:
        factor = np.float32(scale) / (part + np.float32(epsilon))
    for i in range(chosen.shape[0]):
        weight[i] *= factor


@fast
def matrix(x: Any, w: Any, rows: bool, bias: Any, y: Any) -> None:
    """y [1, N] = x [1, K] times w, [N, K] where `rows` else [K, N], plus bias [N] (or length 0)."""
    if rows:
        gemm_nk(x, w, y, _NONE, _ONE)
    else:
        gemm_kn(x, w, y, _NONE, _ONE)
    for j in range(bias.shape[0]):
        y[0, j] += bias[j]


@fast
def combine(packing: int, act: int, limit: float, offset: float, u: Any, g: Any) -> None:
    """g [F] = act(gate) (up + offset), clamped as `limit` says. Gate and up lie in u [2F] where packed, else
    in g [F] and u [F]."""
    inner = g.shape[0]
    for i in range(inner):
        a, b = g[i], u[i]
        if packing == HALVES:
            a, b = u[i], u[inner + i]
        elif packing == INTERLEAVED:
            a, b = u[2 * i], u[2 * i + 1]
        if limit > 0:
            a = min(a, np.float32(limit))
            b = max(min(b, np.float32(limit)), -np.float32(limit))
        g[i], u[i] = a, b + np.float32(offset)  # of u only what lies behind 2i + 1 is still to be read
    gate(act, g, u[:inner], g, _NONE, _ONE)


@fast
def plain(act: int, u: Any, g: Any) -> None:
    """g [F] = act(u [F])."""
    activation(act, u, g, _NONE, _ONE)


@fast
def add_scaled(factor: Any, z: Any, y: Any) -> None:
    """y [D] += factor z [D]."""
    for d in range(y.shape[0]):
        y[d] += factor * z[d]
