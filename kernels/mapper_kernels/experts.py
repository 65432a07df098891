"""Routed experts in the stored format of their weights: only the chosen experts' rows are read.

    up    for each token and chosen expert: act(gate) (up + offset), with biases and clamping
    down  per token the sum of its experts' outputs, each times its share

A stack of experts is [E, N, K], each expert as a weight of `formats`. Pairs of a token and an expert are
taken expert by expert, so that a step reads each chosen expert once for every ROWS_AT_ONCE tokens that
chose it.
All take addresses and share columns: `part` of `parts`; see `fused` for what threads do alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.fused import GRAIN
from mapper_kernels.jit import fast, jit, splice
from mapper_kernels.linear import prepare_rows, prepared_bytes, product, row_bytes
from mapper_kernels.memory import f32, i64
from mapper_kernels.moe import HALVES, INTERLEAVED, SPLIT, route
from mapper_kernels.product import gate
from mapper_kernels.scalar import activate
from mapper_kernels.sizes import ROWS_AT_ONCE
from mapper_kernels.split import share

HEAD = 6
"""Arguments of both steps: tokens, experts per token, E, elements of a row that enters and of one that
leaves, whether the share multiplies what enters (up) or what leaves (down)."""
UP_HEAD = 11
"""Arguments of `up` before those of its matrices: HEAD, packing, whether there is a gate, activation, limit,
offset (float64 bits)."""
EACH = 3
"""Arguments of a matrix: format, whether it has zeros, and a bias."""
_NONE: Any = np.int64(0)
_ONE: Any = np.int64(1)


@jit
def route_rows(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    """`moe.route` of each row of logits; shares rows.

    a, f: tokens, E, experts per token, whether there is a correction, then what `route` takes after its
    arrays. r: addresses of logits [tokens, E], the correction [E], index (int64) and share [tokens, experts
    per token].
    """
    rows, e, k, corrected = a[0], a[1], a[2], a[3]
    low, high = share(rows, 1, part, parts)
    s = np.empty(e, np.float32)
    correction = f32(r[1], e if corrected else 0)
    for row in range(low, high):
        s[:] = f32(r[0] + 4 * row * e, e)
        route(
            s, correction, i64(r[1 + corrected] + 8 * row * k, k), f32(r[2 + corrected] + 4 * row * k, k),
            a[4], a[5], a[6], a[7] != 0, f[8], a[9] != 0, f[10], f[11],
        )  # fmt: skip


@jit
def _up(n: int) -> int:
    return (n + 63) // 64 * 64


@jit
def _by_expert(index: int, pairs: int, experts: int, scratch: int) -> bool:
    """The ends of the experts' pairs [E + 1] and the pairs in the order of their experts, at `scratch`; False
    where a chosen expert is not 0..experts - 1."""
    chosen = i64(index, pairs)
    ends, order = i64(scratch, experts + 1), i64(scratch + 8 * (experts + 1), pairs)
    ends[:] = 0
    for i in range(pairs):
        if chosen[i] < 0 or chosen[i] >= experts:
            return False
        ends[chosen[i] + 1] += 1
    for e in range(experts):
        ends[e + 1] += ends[e]
    for i in range(pairs):
        e = chosen[i]
        order[ends[e]] = i
        ends[e] += 1
    return True


@fast
def _scaled(x: int, factor: Any, y: int, n: int) -> None:
    source, target = f32(x, n), f32(y, n)
    for i in range(n):
        target[i] = factor * source[i]


@fast
def _added(bias: int, y: int, y_row: int, rows: int, low: int, high: int) -> None:
    b = f32(bias + 4 * low, high - low)
    for r in range(rows):
        out = f32(y + r * y_row + 4 * low, high - low)
        for i in range(high - low):
            out[i] += b[i]


@fast
def _joined(
    packing: int, gated: int, act: int, limit: Any, offset: Any, u: int, inner: int, out: int,
    low: int, high: int,
) -> None:  # fmt: skip
    """Columns low..high - 1 of an expert's inner row [F] from its products: gate and up as two runs of F, or
    alternating; or up alone."""
    width = high - low
    y = f32(out + 4 * low, width)
    a, b = f32(u + 4 * low, width), f32(u + 4 * (inner + low), width)
    if packing == SPLIT and gated == 0:
        for i in range(width):
            y[i] = activate(act, a[i])
        return
    if packing == INTERLEAVED:
        both = f32(u + 8 * low, 2 * width)
        a, b = y, f32(u + 8 * low, width)
        for i in range(width):  # what is written lies before what is still to be read
            y[i] = both[2 * i]
            b[i] = both[2 * i + 1]
    if limit > np.float32(0):
        for i in range(width):
            a[i] = min(a[i], limit)
            b[i] = max(min(b[i], limit), -limit)
    if offset != np.float32(0):
        for i in range(width):
            b[i] += offset
    gate(act, a, b, y, _NONE, _ONE)


@jit
def _operands(code: int, zeros: int, bias: int) -> int:
    return 1 + (1 if row_bytes(code, _ONE)[1] > 0 else 0) + zeros + bias


@fast
def _summed(factor: Any, z: int, y: int, n: int) -> None:
    made, total = f32(z, n), f32(y, n)
    for i in range(n):
        total[i] += factor * made[i]


@jit
def _left(
    up: bool, r: Any, a: Any, f: Any, order: Any, products: int, wide: int, y: int, low: int, high: int
) -> None:  # fmt: skip
    """Bring the products of some pairs to where they belong."""
    k, out, shared = a[1], a[4], a[5]
    for i in range(order.shape[0]):
        made = products + 4 * wide * i
        if up:
            limit, offset = np.float32(f[9]), np.float32(f[10])
            to = y + 4 * out * order[i]
            _joined(a[6], a[7], a[8], limit, offset, made, out, to, low, high)
        else:
            factor = f32(r[2] + 4 * order[i], 1)[0] if shared else np.float32(1)
            _summed(factor, made + 4 * low, y + 4 * (out * (order[i] // k) + low), high - low)


@splice
def _entered(up: bool, r: Any, a: Any, code: int, order: Any, row: int, prepared: int) -> None:
    """Prepare the rows of some pairs, times their shares where that is asked for."""
    k, d = a[1], a[3]
    for i in range(order.shape[0]):
        source = r[0] + 4 * d * (order[i] // k if up else order[i])
        if up and a[5]:
            _scaled(source, f32(r[2] + 4 * order[i], 1)[0], row, d)
            source = row
        prepare_rows(code, source, 4 * d, _ONE, d, prepared + i * prepared_bytes(code, d))


@splice
def _multiplied(
    m: Any, r: Any, at: int, e: int, n: int, k: int, x: int, rows: int, y: int, y_row: int,
    low: int, high: int,
) -> None:  # fmt: skip
    """Columns low..high - 1 of the products with expert e of the stack at operand `at`, and its bias."""
    values, scales, packed = row_bytes(m[0], k)
    scaled = 1 if scales > 0 else 0
    s = r[at + 1] + e * n * scales if scaled else 0
    z = r[at + 1 + scaled] + e * n * packed if m[1] else 0
    product(m[0], r[at] + e * n * values, s, z, x, rows, k, y, y_row, low, high)
    if m[2]:
        _added(r[at + 1 + scaled + m[1]] + 4 * e * n, y, y_row, rows, low, high)


@splice
def experts(up: bool, r: Any, a: Any, f: Any, scratch: int, part: int, parts: int) -> bool:
    """One of the two steps of routed experts; False where a chosen expert is not 0..E - 1. Shares columns.

    up: h [tokens, experts per token, F] = act(gate x) (up x + offset), or act(up x); x [tokens, D].
    Else y [tokens, D] = the sum of share (down h) over each token's experts.
    a, f: arguments (see HEAD, UP_HEAD and EACH; the gate's matrix before up's) as int64 and as float64.
    r: addresses of x or h, index (int64) and, where it counts, share [tokens, experts per token]; of each
    matrix its elements, scales, zeros and bias [E, N], as far as it has them; and the result.
    """
    count, d, out = a[2], a[3], a[4]
    pairs = a[0] * a[1]
    if not _by_expert(r[1], pairs, count, scratch):
        return False
    packing, gated = (a[6], a[7]) if up else (_NONE, _NONE)
    head = UP_HEAD if up else HEAD
    low, high = share(out, GRAIN, part, parts)
    wide = out if packing == SPLIT and gated == 0 else 2 * out
    n = out if packing == SPLIT else wide
    turns = 2 if n < wide or packing == HALVES else 1
    ends, order = i64(scratch, count + 1), i64(scratch + 8 * (count + 1), pairs)
    row_at = scratch + _up(8 * (count + 1 + pairs))
    prepared = row_at + _up(4 * d)
    firsts = 2 + a[5]
    seconds = firsts + _operands(a[head], a[head + 1], a[head + 2])
    last, each = seconds, prepared_bytes(a[head], d)
    if gated:
        last += _operands(a[head + EACH], a[head + EACH + 1], a[head + EACH + 2])
        each = max(each, prepared_bytes(a[head + EACH], d))
    products = prepared + _up((min(pairs, ROWS_AT_ONCE) + 3) // 4 * 4 * each)
    if not up:
        for token in range(a[0]):
            f32(r[last] + 4 * (out * token + low), high - low)[:] = 0
    held, held_code = -1, -1
    for e in range(count):
        for first in range(ends[e - 1] if e > 0 else 0, ends[e], ROWS_AT_ONCE):
            some = order[first : min(first + ROWS_AT_ONCE, ends[e])]
            token = some[0] // a[1] if up and a[5] == 0 and some.shape[0] == 1 else -2
            for turn in range(turns):
                second = turn * gated
                m = a[head + EACH * second :]
                if held_code != m[0] or (turn == 0 and (token < 0 or held != token)):
                    _entered(up, r, a, m[0], some, row_at, prepared)
                    held, held_code = token, m[0]
                begin, end = low, high
                if packing == INTERLEAVED:
                    begin, end = 2 * low, 2 * high
                elif turn > second:
                    begin, end = out + low, out + high
                _multiplied(
                    m, r, seconds if second else firsts, e, n, d, prepared, some.shape[0],
                    products + 4 * out * second, 4 * wide, begin, end,
                )  # fmt: skip
            _left(up, r, a, f, some, products, wide, r[last], low, high)
    return True
