"""Routed experts in the stored format of their weights: only the chosen experts' rows are read.

    experts_up    for each token and chosen expert: act(gate) (up + offset), with biases and clamping
    experts_down  per token the sum of its experts' outputs, each times its share

A stack of experts is [E, N, K], each expert as a weight of `formats`. Pairs of a token and an expert are taken
expert by expert, so that a step reads each chosen expert once, whatever the number of tokens (64 at a time).
All take addresses and share columns: `part` of `parts`; see `fused` for what threads do alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.fused import GRAIN
from mapper_kernels.jit import fast, jit
from mapper_kernels.linear import prepare_rows, prepared_bytes, product, row_bytes
from mapper_kernels.memory import f32, i64
from mapper_kernels.moe import HALVES, INTERLEAVED, SPLIT, route
from mapper_kernels.product import gate
from mapper_kernels.scalar import activate
from mapper_kernels.sizes import ROWS_AT_ONCE
from mapper_kernels.split import share

UP_HEAD = 11
"""Arguments of `experts_up` before those of its matrices: tokens, experts per token, E, D, F, packing, whether
there is a gate, activation, limit, offset (float64 bits), whether the share multiplies x."""
DOWN_HEAD = 6
"""Arguments of `experts_down` before those of its matrix: tokens, experts per token, E, F, D, whether the share
multiplies what an expert makes."""
EACH = 3
"""Arguments of a matrix: format, whether it has zeros, and a bias."""
_NONE: Any = np.int64(0)
_ONE: Any = np.int64(1)


@jit
def route_rows(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    """`moe.route` of each row of logits; shares rows.

    a, f: tokens, E, experts per token, whether there is a correction, then what `route` takes after its arrays.
    r: addresses of logits [tokens, E], the correction [E], index (int64) and share [tokens, experts per token].
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
def known_experts(index: int, pairs: int, experts: int) -> bool:
    """Whether all of `pairs` chosen experts are 0..experts - 1."""
    chosen = i64(index, pairs)
    for i in range(pairs):
        if chosen[i] < 0 or chosen[i] >= experts:
            return False
    return True


@jit
def _up(n: int) -> int:
    return (n + 63) // 64 * 64


@jit
def _by_expert(index: int, pairs: int, experts: int, scratch: int) -> None:
    """The ends of the experts' pairs [E] and the pairs in the order of their experts, at `scratch`."""
    chosen = i64(index, pairs)
    ends, order = i64(scratch, experts + 1), i64(scratch + 8 * (experts + 1), pairs)
    ends[:] = 0
    for i in range(pairs):
        ends[chosen[i] + 1] += 1
    for e in range(experts):
        ends[e + 1] += ends[e]
    for i in range(pairs):
        e = chosen[i]
        order[ends[e]] = i
        ends[e] += 1


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
    packing: int, gated: int, act: int, limit: Any, offset: Any, u: int, inner: int, out: int, low: int, high: int
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
def _multiply(
    code: int, zeros: int, bias: int, r: Any, at: int, e: int, n: int, k: int,
    x: int, rows: int, y: int, y_row: int, low: int, high: int,
) -> None:  # fmt: skip
    """Columns low..high - 1 of the products with expert e of the stack at operand `at`, and its bias."""
    values, scales, packed = row_bytes(code, k)
    scaled = 1 if scales > 0 else 0
    s = r[at + 1] + e * n * scales if scaled else 0
    z = r[at + 1 + scaled] + e * n * packed if zeros else 0
    product(code, r[at] + e * n * values, s, z, x, rows, k, y, y_row, low, high)
    if bias:
        _added(r[at + 1 + scaled + zeros] + 4 * e * n, y, y_row, rows, low, high)


@jit
def _operands(code: int, zeros: int, bias: int) -> int:
    return 1 + (1 if row_bytes(code, _ONE)[1] > 0 else 0) + zeros + bias


@jit
def experts_up(r: Any, a: Any, f: Any, scratch: int, part: int, parts: int) -> None:
    """h [tokens, experts per token, F] = act(gate x) (up x + offset) for the chosen experts, or act(up x).

    a, f: arguments (see UP_HEAD and EACH; the gate's matrix first) as int64 and as float64. r: addresses of
    x [tokens, D], index (int64) and, where it multiplies x, share [tokens, experts per token]; of the matrices
    their elements, scales, zeros and bias [E, N], as far as they have them; and h. Shares columns of h.
    """
    k, experts, d, inner, packing, gated, shared = a[1], a[2], a[3], a[4], a[5], a[6], a[10]
    pairs = a[0] * k
    low, high = share(inner, GRAIN, part, parts)
    wide = inner if packing == SPLIT and gated == 0 else 2 * inner
    n = inner if packing == SPLIT else wide
    begins, width = low, high
    if packing == INTERLEAVED:
        begins, width = 2 * low, 2 * high
    ends, order = i64(scratch, experts + 1), i64(scratch + 8 * (experts + 1), pairs)
    row_at = scratch + _up(8 * (experts + 1 + pairs))
    prepared = row_at + _up(4 * d)
    each = prepared_bytes(a[UP_HEAD], d)
    at_up = 2 + shared
    h = at_up + _operands(a[UP_HEAD], a[UP_HEAD + 1], a[UP_HEAD + 2])
    if gated:
        each = max(each, prepared_bytes(a[UP_HEAD + EACH], d))
        at_up = h
        h += _operands(a[UP_HEAD + EACH], a[UP_HEAD + EACH + 1], a[UP_HEAD + EACH + 2])
    products = prepared + _up((min(pairs, ROWS_AT_ONCE) + 3) // 4 * 4 * each)
    limit, offset = np.float32(f[8]), np.float32(f[9])
    _by_expert(r[1], pairs, experts, scratch)
    held, held_code = -1, -1
    for e in range(experts):
        for first in range(ends[e - 1] if e > 0 else 0, ends[e], ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, ends[e] - first)
            for turn in range(2 if n < wide or packing == HALVES else 1):
                second = turn == 1 and gated != 0
                m = a[UP_HEAD + EACH * (1 if second else 0) :]
                token = order[first] // k
                alone = rows == 1 and shared == 0 and held == token
                if held_code != m[0] or (turn == 0 and not alone):
                    _entered(r, shared, m[0], k, d, order[first : first + rows], row_at, prepared)
                    held, held_code = token if rows == 1 else -1, m[0]
                # the second half of a packed matrix is as far behind the first as gate and up lie apart
                c = inner if turn == 1 and not second else 0
                to = products + (4 * inner if second else 0)
                _multiply(
                    m[0], m[1], m[2], r, at_up if second else 2 + shared, e, n, d, prepared, rows, to, 4 * wide,
                    begins + c, width + c,
                )  # fmt: skip
            for i in range(rows):
                to = r[h] + 4 * inner * order[first + i]
                _joined(packing, gated, a[7], limit, offset, products + 4 * wide * i, inner, to, low, high)


@jit
def _entered(r: Any, shared: int, code: int, k: int, d: int, order: Any, row: int, prepared: int) -> None:
    """Prepare the rows of x of some pairs, times their shares where that is asked for."""
    step = prepared_bytes(code, d)
    for i in range(order.shape[0]):
        x = r[0] + 4 * d * (order[i] // k)
        if shared:
            _scaled(x, f32(r[2] + 4 * order[i], 1)[0], row, d)
            x = row
        prepare_rows(code, x, 4 * d, _ONE, d, prepared + i * step)


@fast
def _summed(factor: Any, z: int, y: int, n: int) -> None:
    made, total = f32(z, n), f32(y, n)
    for i in range(n):
        total[i] += factor * made[i]


@jit
def experts_down(r: Any, a: Any, f: Any, scratch: int, part: int, parts: int) -> None:
    """y [tokens, D] = sum of share (down h) over each token's experts.

    a: arguments (see DOWN_HEAD and EACH). r: addresses of h [tokens, experts per token, F], index (int64) and,
    where it counts here, share [tokens, experts per token]; of the matrix its elements, scales, zeros and bias
    [E, D], as far as it has them; and y. Shares columns of y.
    """
    k, experts, inner, out, shared = a[1], a[2], a[3], a[4], a[5]
    pairs = a[0] * k
    m = a[DOWN_HEAD:]
    low, high = share(out, GRAIN, part, parts)
    ends, order = i64(scratch, experts + 1), i64(scratch + 8 * (experts + 1), pairs)
    prepared = scratch + _up(8 * (experts + 1 + pairs))
    step = prepared_bytes(m[0], inner)
    products = prepared + _up((min(pairs, ROWS_AT_ONCE) + 3) // 4 * 4 * step)
    y = r[2 + shared + _operands(m[0], m[1], m[2])]
    for token in range(a[0]):
        f32(y + 4 * (out * token + low), high - low)[:] = 0
    _by_expert(r[1], pairs, experts, scratch)
    for e in range(experts):
        for first in range(ends[e - 1] if e > 0 else 0, ends[e], ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, ends[e] - first)
            for i in range(rows):
                prepare_rows(
                    m[0], r[0] + 4 * inner * order[first + i], 4 * inner, _ONE, inner, prepared + i * step
                )
            _multiply(
                m[0], m[1], m[2], r, 2 + shared, e, out, inner, prepared, rows, products, 4 * out, low, high
            )
            for i in range(rows):
                pair = order[first + i]
                factor = f32(r[2] + 4 * pair, 1)[0] if shared else np.float32(1)
                _summed(
                    factor, products + 4 * (out * i + low), y + 4 * (out * (pair // k) + low), high - low
                )
