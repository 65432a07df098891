"""Attention of query rows over a long range of cached rows, in one pass: blocks of scores, a running
maximum, a running sum and a running output, so that parts of the range can be merged exactly (log-sum-exp).

Keys and values are rows of D elements in float32, float16, bfloat16, or int8 with a float32 scale per row;
sums are in float32. A partial result is (maximum, sum, output not yet divided by the sum).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from mapper_kernels.cached import scores, weigh
from mapper_kernels.jit import fast, intrinsic, jit
from mapper_kernels.memory import f32
from mapper_kernels.scalar import exp32, tanh32
from mapper_kernels.sizes import FACTORS, POSITIONS, QUERIES
from mapper_kernels.vec import F32, Emitter, Value, vector

_LOWEST = np.float32(-np.inf)
_SMALLEST = np.float32(-87.0)
_WIDE = vector(F32, 16)
_NONE: Any = np.int64(0)


@intrinsic
def _scaled_peak(typingctx: Any, s: Any, count: Any, scale: Any) -> Any:
    """Scale scores; the largest. A loop of Numba's would do the maximum one by one."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, (at, n, factor) = Emitter(builder, False), args
        wide, low = e.splat(factor, 16), e.fill(F32, 16, float("-inf"))
        full, rest = builder.sdiv(n, e.number(16)), builder.srem(n, e.number(16))

        def part(i: Value, left: Value | None, top: Value) -> Value:
            place = e.at(at, (64, i))
            if left is None:
                made = builder.fmul(e.load(place, _WIDE), wide)
                e.store(made, place)
                return e.larger(made, top)
            mask = e.mask(16, left)
            made = builder.fmul(e.load_part(place, _WIDE, mask), wide)
            e.store_part(made, place, mask)
            return e.larger(builder.select(mask, made, low), top)

        tops = e.loop(e.number(0), full, [low], lambda i, now: [part(i, None, now[0])])
        some = builder.icmp_signed(">", rest, e.number(0))
        return e.peak(e.when(some, tops, lambda now: [part(full, rest, now[0])])[0])

    return types.float32(types.int64, types.int64, types.float32), build


@fast
def _soften(at: int, count: int, scale: Any, softcap: Any, slope: Any, position: int) -> Any:
    """Scale, cap and bias the scores of positions `position`..; the largest."""
    if softcap > 0:
        s = f32(at, count)
        for t in range(count):
            s[t] = softcap * tanh32(s[t] * scale / softcap)
        scale = np.float32(1)
    if slope != 0:
        s = f32(at, count)
        for t in range(count):
            s[t] = s[t] * scale + slope * np.float32(position + t)
        scale = np.float32(1)
    return _scaled_peak(at, count, scale)


@fast
def _exponents(s: Any, count: int, top: Any) -> Any:
    """s = e^(s - top); their sum."""
    total = np.float32(0)
    for t in range(count):
        difference = s[t] - top
        e = exp32(difference)
        s[t] = np.float32(0) if difference < _SMALLEST else e
        total += s[t]
    return total


@jit
def _block(
    code: int, s: int, queries: int, state: int, step: int, count: int, scale: Any, softcap: Any, slopes: int,
    position: int, k_scales: int, v_scales: int, factors: int,
) -> None:  # fmt: skip
    """Scores [queries, POSITIONS] at `s` become weights; maxima and sums at `state`, `step` bytes apart, are
    brought up to date; factors [queries]: what sums so far are to be multiplied by."""
    by = f32(factors, queries)
    for g in range(queries):
        at, now = s + 4 * POSITIONS * g, f32(state + g * step, 2)
        p = f32(at, count)
        if code == 3:
            own = f32(k_scales, count)
            for t in range(count):
                p[t] *= own[t]
        slope = f32(slopes + 4 * g, 1)[0] if slopes else np.float32(0)
        peak = max(now[0], _soften(at, count, scale, softcap, slope, position))
        by[g] = np.float32(0) if now[0] == _LOWEST else exp32(now[0] - peak)
        now[1] = now[1] * by[g] + _exponents(p, count, peak)
        now[0] = peak
        if code == 3:
            own = f32(v_scales, count)
            for t in range(count):
                p[t] *= own[t]


@jit
def _at_once(left: int) -> int:
    for n in QUERIES:
        if n <= left:
            return n
    return 0


@jit
def attend(
    code: int, q: int, q_step: int, group: int, k: int, k_step: int, k_scales: int, v: int, v_step: int,
    v_scales: int, low: int, high: int, d: int, dv: int, scale: Any, softcap: Any, slopes: int, last: int,
    scratch: int, out: int, out_step: int,
) -> None:  # fmt: skip
    """Partial results of `group` queries that read the same positions low..high - 1: for each, `out_step`
    bytes apart, the maximum and the sum of the scores, then [dv], the sum of e^(score - maximum) times the
    values. Without positions: -inf, 0 and zeros.

    Addresses; queries are `q_step` bytes apart, rows of k and v `k_step` and `v_step`; scales [positions] are
    those of int8 rows; scratch has SCORES bytes. score = scale q.k, capped as c tanh(score / c) where softcap
    c > 0, plus slopes[query] (position - last) where there are slopes.
    """
    for g in range(group):
        y = f32(out + g * out_step, dv + 2)
        for i in range(1, dv + 2):
            y[i] = np.float32(0)
        y[0] = _LOWEST
    factors = scratch + FACTORS
    first = low
    while first < high:
        # all queries take a block of rows while it is in the caches
        count = min(POSITIONS, high - first)
        keys, values, following = k + first * k_step, v + first * v_step, first + POSITIONS < high
        g = _NONE
        while g < group:
            n = _at_once(group - g)
            cold = g == 0
            scores(
                code, n, q + g * q_step, q_step, keys, k_step, count, d, scratch,
                values if cold else _NONE, v_step,
            )  # fmt: skip
            to = out + g * out_step
            _block(
                code, scratch, n, to, out_step, count, scale, softcap, slopes + 4 * g if slopes else _NONE,
                first - last, k_scales + 4 * first, v_scales + 4 * first, factors,
            )  # fmt: skip
            weigh(
                code, n, scratch, values, v_step, count, dv, factors, to + 8, out_step,
                keys + POSITIONS * k_step if cold and following else _NONE, k_step,
            )  # fmt: skip
            g += n
        first += count


@jit
def merge(partial: int, step: int, parts: int, dv: int, has_sink: bool, sink: Any, out: int) -> None:
    """out [dv] = attention from `parts` partial results, `step` bytes apart: maximum, sum, then [dv].

    A sink is one more score in the denominator. All float32. Without a single finite score the result is NaN.
    """
    top = sink if has_sink else _LOWEST
    for p in range(parts):
        top = max(top, f32(partial + p * step, 1)[0])
    total = exp32(sink - top) if has_sink else np.float32(0)
    y = f32(out, dv)
    for p in range(parts):
        head = f32(partial + p * step, 2 + dv)
        factor = np.float32(0) if head[0] == _LOWEST else exp32(head[0] - top)
        total += factor * head[1]
        if p == 0:
            for i in range(dv):
                y[i] = factor * head[2 + i]
        else:
            for i in range(dv):
                y[i] += factor * head[2 + i]
    share = np.float32(np.nan) if top == _LOWEST else np.float32(1) / total
    for i in range(dv):
        y[i] *= share
