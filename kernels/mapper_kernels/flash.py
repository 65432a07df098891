"""Attention of one query row over a long range of cached rows, in one pass: blocks of scores, a running
maximum, a running sum and a running output, so that parts of the range can be merged exactly (log-sum-exp).

Keys and values are rows of D elements in float32, float16, bfloat16, or int8 with a float32 scale per row;
sums are in float32. A partial result is (maximum, sum, output not yet divided by the sum).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from mapper_kernels.jit import fast, intrinsic, jit
from mapper_kernels.memory import f32
from mapper_kernels.scalar import exp32, tanh32
from mapper_kernels.sizes import POSITIONS
from mapper_kernels.vec import F16, F32, I8, I16, I32, Emitter, Value, vector

KV_FORMATS = ("f32", "f16", "bf16", "int8")
"""Formats of cached rows; the position is the code."""
KV_SIZES = (4, 2, 2, 1)
"""Bytes of an element, by code."""
TILE = 16
"""Positions whose scores are made at once."""
_LOWEST = np.float32(-np.inf)
_SMALLEST = np.float32(-87.0)
_WIDE = vector(F32, 16)


def _elements(e: Emitter, name: str, at: Value, left: Value | None) -> Value:
    """Sixteen elements as float32, or `left` of them and zeros."""
    b = e.b
    kind = vector({"f32": F32, "f16": F16, "bf16": I16, "int8": I8}[name], 16)
    raw = e.load(at, kind) if left is None else e.load_part(at, kind, e.mask(16, left))
    if name == "f32":
        return raw
    if name == "f16":
        return b.fpext(raw, _WIDE)
    if name == "bf16":
        return b.bitcast(b.shl(b.zext(raw, vector(I32, 16)), e.fill(I32, 16, 16)), _WIDE)
    return b.sitofp(raw, _WIDE)


def _transposed_sums(e: Emitter, rows: list[Value]) -> Value:
    """The sums of the lanes of sixteen vectors, as one vector."""
    width = 8
    while len(rows) > 1:
        half = len(rows) // 2
        made = []
        for a, b in zip(rows[:half], rows[half:], strict=True):
            # lanes come in runs of 2 * width; the first half of each run is added to the second
            low = [i for i in range(16) if i % (2 * width) < width]
            high = [i for i in range(16) if i % (2 * width) >= width]
            order_low = _merged(low, width)
            order_high = _merged(high, width)
            made.append(e.b.fadd(e.pick(a, order_low, b), e.pick(a, order_high, b)))
        rows, width = made, width // 2
    return rows[0]


def _merged(lanes: list[int], width: int) -> list[int]:
    """`lanes` of a and the same of b, in runs of `width` by turns."""
    runs = [lanes[i : i + width] for i in range(0, len(lanes), width)]
    return [lane for run in runs for lane in (*run, *(i + 16 for i in run))]


def _emit_scores(e: Emitter, name: str, args: Any) -> None:
    q, k, step, count, d, out = args
    size = KV_SIZES[KV_FORMATS.index(name)]
    b = e.b
    full, rest = b.sdiv(d, e.number(16)), b.srem(d, e.number(16))

    def tile(first: Value, valid: Value | None) -> None:
        rows = []
        for i in range(TILE):
            t = e.number(i)
            if valid is not None:  # a row that is not there is the last one that is
                last = b.sub(valid, e.number(1))
                t = b.select(b.icmp_signed("<", t, last), t, last)
            rows.append(e.at(k, (b.add(first, t), step)))

        def part(c: Value, left: Value | None, sums: list[Value]) -> list[Value]:
            x = _elements(e, "f32", e.at(q, (64, c)), left)
            return [
                e.fma(x, _elements(e, name, e.at(row, (16 * size, c)), left), s)
                for row, s in zip(rows, sums, strict=True)
            ]

        zero = [e.fill(F32, 16, 0.0)] * TILE
        sums = e.loop(e.number(0), full, zero, lambda c, now: part(c, None, now))
        some = b.icmp_signed(">", rest, e.number(0))
        sums = e.when(some, sums, lambda now: part(full, rest, now))
        e.store(_transposed_sums(e, sums), e.at(out, (4, first)))

    whole = b.sdiv(count, e.number(TILE))

    def body(i: Value, _: list[Value]) -> list[Value]:
        tile(b.mul(i, e.number(TILE)), None)
        return []

    e.loop(e.number(0), whole, [], body)
    over = b.srem(count, e.number(TILE))

    def tail(_: list[Value]) -> list[Value]:
        tile(b.mul(whole, e.number(TILE)), over)
        return []

    e.when(b.icmp_signed(">", over, e.number(0)), [], tail)


def _emit_weigh(e: Emitter, name: str, args: Any) -> None:
    p, v, step, count, d, factor, out = args
    size = KV_SIZES[KV_FORMATS.index(name)]
    b = e.b
    wide = e.splat(factor, 16)

    def columns(first: Value, n: int, left: Value | None) -> None:
        base = e.at(v, (size, first))
        target = e.at(out, (4, first))

        def old(i: int) -> Value:
            at = b.add(target, e.number(64 * i))
            return e.load(at, _WIDE) if left is None else e.load_part(at, _WIDE, e.mask(16, left))

        def body(t: Value, now: list[Value]) -> list[Value]:
            weight = e.splat(e.load(e.at(p, (4, t)), F32), 16)
            row = e.at(base, (t, step))
            return [
                e.fma(weight, _elements(e, name, b.add(row, e.number(16 * size * i)), left), s)
                for i, s in enumerate(now)
            ]

        start = [b.fmul(old(i), wide) for i in range(n)]
        for i, s in enumerate(e.loop(e.number(0), count, start, body)):
            at = b.add(target, e.number(64 * i))
            if left is None:
                e.store(s, at)
            else:
                e.store_part(s, at, e.mask(16, left))

    def each(n: int) -> Callable[[Value, list[Value]], list[Value]]:
        def body(i: Value, _: list[Value]) -> list[Value]:
            columns(b.mul(i, e.number(16 * n)), n, None)
            return []

        return body

    groups = b.sdiv(d, e.number(64))
    e.loop(e.number(0), groups, [], each(4))
    singles = b.sdiv(d, e.number(16))
    e.loop(b.mul(groups, e.number(4)), singles, [], each(1))
    rest = b.srem(d, e.number(16))

    def tail(_: list[Value]) -> list[Value]:
        columns(b.mul(singles, e.number(16)), 1, rest)
        return []

    e.when(b.icmp_signed(">", rest, e.number(0)), [], tail)


def _scores(name: str) -> Callable[..., None]:
    @intrinsic
    def emitted(typingctx: Any, q: Any, k: Any, step: Any, count: Any, d: Any, out: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_scores(Emitter(builder, False), name, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), build

    @jit
    def _run(q: int, k: int, step: int, count: int, d: int, out: int) -> None:
        emitted(q, k, step, count, d, out)

    made: Callable[..., None] = _run
    return made


def _weigh(name: str) -> Callable[..., None]:
    @intrinsic
    def emitted(typingctx: Any, p: Any, v: Any, step: Any, count: Any, d: Any, factor: Any, out: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_weigh(Emitter(builder, False), name, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32, types.int64), build

    @jit
    def _run(p: int, v: int, step: int, count: int, d: int, factor: Any, out: int) -> None:
        emitted(p, v, step, count, d, factor, out)

    made: Callable[..., None] = _run
    return made


_scores_f32, _scores_f16, _scores_bf16, _scores_int8 = (_scores(name) for name in KV_FORMATS)
_weigh_f32, _weigh_f16, _weigh_bf16, _weigh_int8 = (_weigh(name) for name in KV_FORMATS)


@jit
def _all_scores(code: int, q: int, k: int, step: int, count: int, d: int, out: int) -> None:
    if code == 0:
        _scores_f32(q, k, step, count, d, out)
    elif code == 1:
        _scores_f16(q, k, step, count, d, out)
    elif code == 2:
        _scores_bf16(q, k, step, count, d, out)
    else:
        _scores_int8(q, k, step, count, d, out)


@jit
def _all_weigh(code: int, p: int, v: int, step: int, count: int, d: int, factor: Any, out: int) -> None:
    if code == 0:
        _weigh_f32(p, v, step, count, d, factor, out)
    elif code == 1:
        _weigh_f16(p, v, step, count, d, factor, out)
    elif code == 2:
        _weigh_bf16(p, v, step, count, d, factor, out)
    else:
        _weigh_int8(p, v, step, count, d, factor, out)


@fast
def _soften(s: Any, count: int, scale: Any, softcap: Any, slope: Any, position: int) -> Any:
    """Scale, cap and bias the scores of positions `position`..; the largest."""
    top = _LOWEST
    if softcap > 0:
        for t in range(count):
            s[t] = softcap * tanh32(s[t] * scale / softcap)
    else:
        for t in range(count):
            s[t] *= scale
    if slope != 0:
        for t in range(count):
            s[t] += slope * np.float32(position + t)
    for t in range(count):
        top = max(top, s[t])
    return top


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
def attend(
    code: int, q: int, k: int, k_step: int, k_scales: int, v: int, v_step: int, v_scales: int,
    low: int, high: int, d: int, dv: int, scale: Any, softcap: Any, slope: Any, last: int,
    scratch: int, out: int,
) -> tuple[Any, Any]:  # fmt: skip
    """Maximum and sum of the scores of positions low..high - 1; `out` [dv] becomes the sum of e^(score -
    maximum) times the values.

    Addresses; rows of k and v are `k_step` and `v_step` bytes apart; scales [positions] are those of int8
    rows; scratch has SCORES bytes. score = scale q.k, capped as c tanh(score / c) where softcap c > 0, plus
    slope (position - last). Without positions: -inf, 0 and zeros.
    """
    top, total = _LOWEST, np.float32(0)
    s, y = f32(scratch, POSITIONS), f32(out, dv)
    for i in range(dv):
        y[i] = np.float32(0)
    first = low
    while first < high:
        count = min(POSITIONS, high - first)
        _all_scores(code, q, k + first * k_step, k_step, count, d, scratch)
        if code == 3:
            factors = f32(k_scales + 4 * first, count)
            for t in range(count):
                s[t] *= factors[t]
        peak = max(top, _soften(s, count, scale, softcap, slope, first - last))
        factor = np.float32(0) if top == _LOWEST else exp32(top - peak)
        total = total * factor + _exponents(s, count, peak)
        if code == 3:
            factors = f32(v_scales + 4 * first, count)
            for t in range(count):
                s[t] *= factors[t]
        _all_weigh(code, scratch, v + first * v_step, v_step, count, dv, factor, out)
        top = peak
        first += count
    return top, total


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
