"""The compiled interpreter of all opcodes that are not on the decode path; see `interpreter.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_host.interpreter import BAD_INDEX, BAD_OPCODE, SOURCES, meet
from mapper_host.opcodes import (
    ARANGE,
    ARGMAX,
    ATTENTION,
    CONV,
    CUMSUM,
    ELEMENTWISE,
    FILL,
    GATHER_ELEMENTS,
    GATHER_ND,
    MATMUL,
    MOE,
    ONE_HOT,
    REDUCE,
    ROPE,
    ROUND_BLOCKS,
    SCATTER_ELEMENTS,
    SCATTER_ND,
    SOFTMAX,
    TOPK,
    TRILU,
)
from mapper_kernels import attention, elementwise, index, moe, product, reduce, rope
from mapper_kernels.jit import entry, jit
from mapper_kernels.memory import f32, f32_2d, f32_4d, i64, u8, u16, u32, u64
from mapper_kernels.split import share

# typed numbers: a literal argument would compile the callee once more for that literal
_NONE: Any = np.int64(0)
_ONE: Any = np.int64(1)


@jit
def _rope(r: Any, a: Any, part: int, parts: int) -> None:
    batch, heads, seq, d, rotary, step = a[0], a[1], a[2], a[3], a[4], a[6]
    width, batch_stride, row_stride = a[7], a[8], a[9]
    x, y = f32_2d(r[0], batch * heads * seq, d), f32_2d(r[3], batch * heads * seq, d)
    low, high = share(batch * heads * seq, 1, part, parts)
    for row in range(low, high):
        at = 4 * (row // (heads * seq) * batch_stride + row % seq * row_stride)
        rope.rotate(x[row], f32(r[1] + at, width), f32(r[2] + at, width), y[row], rotary, a[5] != 0, step)


@jit
def _attention(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    b, h, s, d, hkv, t, dv = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    masked, sinks, slopes = a[9], a[15], a[16]
    attention.masked_attention(
        f32_4d(r[0], b, h, s, d), f32_4d(r[1], b, hkv, t, d), f32_4d(r[2], b, hkv, t, dv),
        r[3] if masked else 0, a[10], a[11:15], f32(r[3 + masked], h if sinks else 0), f[19 : 19 + slopes],
        f32_4d(r[3 + masked + sinks], b, h, s, dv), f[17], a[8] != 0, a[7], f[18], part, parts,
    )  # fmt: skip


@jit
def _expert(r: Any, at: int, a: Any, e: int, x: Any, y: Any, form: int, biased: int) -> None:
    """y = x times matrix e of the stack at operand `at`, [K, N] or by rows, and its bias behind it."""
    k, n = x.shape[1], y.shape[1]
    first, second = (n, k) if form else (k, n)
    w = f32_2d(r[at] + 4 * e * n * k, first, second)
    bias = f32(r[at + 1] + 4 * e * n if biased else r[at], n if biased else 0)
    moe.matrix(x, w, form != 0, bias, y)


@jit
def _bad_expert(r: Any, a: Any) -> int:
    chosen = i64(r[1], a[0] * a[5])
    for i in range(chosen.shape[0]):
        if chosen[i] < 0 or chosen[i] >= a[1]:
            return BAD_INDEX
    return 0


@jit
def _moe(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    rows, d, inner, out, k, packing = a[0], a[2], a[3], a[4], a[5], a[6]
    gated, act = a[7], a[8]
    wide = inner if packing == moe.SPLIT else 2 * inner
    u, g = np.empty((1, wide), np.float32), np.empty((1, inner), np.float32)
    z, t = np.empty((1, out), np.float32), np.empty((1, d), np.float32)
    up = 3 + gated * (1 + a[12])
    down = up + 1 + a[13]
    last = down + 1 + a[14]
    low, high = share(rows, 1, part, parts)
    for row in range(low, high):
        chosen, weight = i64(r[1] + 8 * row * k, k), f32(r[2] + 4 * row * k, k)
        x, y = f32_2d(r[0] + 4 * row * d, 1, d), f32(r[last] + 4 * row * out, out)
        y[:] = np.float32(0)
        for i in range(k):
            e, factor = chosen[i], weight[i]
            if a[17] != 0:
                t[0, :] = x[0] * factor
                factor = np.float32(1)
            else:
                t[0, :] = x[0]
            if a[18] != 0:
                elementwise.round_blocks(t[0], t[0], a[18])
            if gated:
                _expert(r, 3, a, e, t, g, a[9], a[12])
            _expert(r, up, a, e, t, u, a[10], a[13])
            if gated or packing != moe.SPLIT:
                moe.combine(packing, act, f[15], f[16], u[0], g[0])
            else:
                moe.plain(act, u[0], g[0])
            if a[18] != 0:
                elementwise.round_blocks(g[0], g[0], a[18])
            _expert(r, down, a, e, g, z, a[11], a[14])
            moe.add_scaled(factor, z[0], y)


@jit
def _elementwise(r: Any, a: Any, part: int, parts: int) -> None:
    inputs, ndim = a[1], a[6]
    strides = a[7 + ndim : 7 + ndim + inputs * ndim].reshape((inputs, ndim))
    elementwise.elementwise(a[0], inputs, a[2:6], r, a[7 : 7 + ndim], strides, r[inputs], part, parts)


@jit
def _trilu(r: Any, a: Any) -> None:
    size, shape = a[0], (a[1], a[2], a[3])
    upper, k = a[4] != 0, a[5]
    n = a[1] * a[2] * a[3]
    if size == 4:
        elementwise.trilu(u32(r[0], n).reshape(shape), u32(r[1], n).reshape(shape), upper, k)
    elif size == 8:
        elementwise.trilu(u64(r[0], n).reshape(shape), u64(r[1], n).reshape(shape), upper, k)
    elif size == 2:
        elementwise.trilu(u16(r[0], n).reshape(shape), u16(r[1], n).reshape(shape), upper, k)
    else:
        elementwise.trilu(u8(r[0], n).reshape(shape), u8(r[1], n).reshape(shape), upper, k)


@jit
def _reduce(r: Any, a: Any) -> None:
    k, g = a[2], a[3]
    p = 4 + 2 * k
    reduce.reduce(
        a[0], r[0], a[1], r[1], a[4 : 4 + k], a[4 + k : p], a[p : p + g], a[p + g : p + 2 * g]
    )  # fmt: skip


@jit
def _matmul(r: Any, a: Any, part: int, parts: int) -> None:
    n = a[4]
    product.matmul(
        r[0], r[1], r[2], a[0], a[1], a[2], a[3], a[5 : 5 + n], a[5 + n : 5 + 2 * n],
        a[5 + 2 * n : 5 + 3 * n],
        part, parts,
    )  # fmt: skip


@jit
def _conv(r: Any, a: Any, part: int, parts: int) -> None:
    biased = a[17]
    x, w = f32_4d(r[0], a[0], a[1], a[2], a[3]), f32_4d(r[1], a[4], a[5], a[6], a[7])
    y = f32_4d(r[2 + biased], a[0], a[4], a[8], a[9])
    bias = f32(r[2], a[4] if biased else 0)
    product.conv(x, w, bias, y, a[10:12], a[12:14], a[14:16], a[16], part, parts)


@jit
def _indexed(op: int, r: Any, a: Any) -> int:
    """Ops that read indices: position of the first bad one + 1, or 0."""
    if op == GATHER_ELEMENTS:
        n = a[2]
        return index.gather_elements(r[0], r[1], a[1], r[2], a[0], a[4 : 4 + n], a[4 + n : 4 + 2 * n], a[3])
    if op == GATHER_ND:
        return index.gather_nd(r[0], r[1], a[1], r[2], a[0], a[2], a[3], a[4], a[6 : 6 + a[5]])
    if op == SCATTER_ND:
        return index.scatter_nd(r[1], a[1], r[2], r[3], a[0], a[2], a[3], a[6 : 6 + a[5]], a[4])
    n = a[3]
    return index.scatter_elements(
        r[1], a[1], r[2], r[3], a[0], a[5 : 5 + n], a[5 + n : 5 + 2 * n], a[4], a[2]
    )


@jit
def _alone(op: int, r: Any, a: Any, f: Any) -> int:
    """Ops that one thread runs."""
    if GATHER_ELEMENTS <= op <= SCATTER_ELEMENTS:
        return BAD_INDEX if _indexed(op, r, a) != 0 else 0
    if op == FILL:
        index.fill(r[0], a[0], a[1], f[3], a[2])
    elif op == ARANGE:
        index.arange(r[0], r[1], r[2], a[0], a[1])
    elif op == ONE_HOT:
        index.one_hot(r[0], a[0], r[1], a[1], a[2], a[3])
    elif op == TRILU:
        _trilu(r, a)
    elif op == REDUCE:
        _reduce(r, a)
    elif op == SOFTMAX:
        reduce.softmax(r[0], a[0], r[1], a[1], a[2], a[3], a[4] != 0)
    elif op == CUMSUM:
        reduce.cumsum(r[0], a[0], r[1], a[1], a[2], a[3], a[4] != 0, a[5] != 0)
    elif op == TOPK:
        reduce.topk(r[0], a[0], r[1], r[2], a[1], a[2], a[3], a[4], a[5] != 0)
    elif op == ARGMAX:
        reduce.topk(r[0], a[0], _NONE, r[1], a[1], a[2], a[3], _ONE, r[0] != 0)
    else:
        return BAD_OPCODE
    return 0


@entry(*SOURCES)
def interpret_general(
    rows: Any, args: Any, floats: Any, begin: int, end: int, part: int, parts: int, barrier: Any, scratch: int
) -> Any:
    """As `interpreter.interpret`, for the other opcodes."""
    arrivals = 0
    for i in range(begin, end):
        first = rows[i, 1]
        op, r, a, f = rows[i, 0], rows[i, 2:], args[first:], floats[first:]
        fault = 0
        if op == ROPE:
            _rope(r, a, part, parts)
        elif op == ATTENTION:
            _attention(r, a, f, part, parts)
        elif op == ELEMENTWISE:
            _elementwise(r, a, part, parts)
        elif op == MATMUL:
            _matmul(r, a, part, parts)
        elif op == CONV:
            _conv(r, a, part, parts)
        elif op == ROUND_BLOCKS:
            low, high = share(a[0], 1, part, parts)
            for row in range(low, high):
                at = 4 * row * a[1]
                elementwise.round_blocks(f32(r[0] + at, a[1]), f32(r[1] + at, a[1]), a[2])
        elif op == MOE:
            fault = _bad_expert(r, a)
            if fault == 0:
                _moe(r, a, f, part, parts)
        elif part == 0:
            fault = _alone(op, r, a, f)
        if parts > 1:
            arrivals += parts
            failed = meet(barrier, arrivals, 0 if fault == 0 else 8 * i + fault + 1)
            # a faster thread may have failed in the next step already; it waits there for this one
            if failed != 0 and (failed - 1) // 8 <= i:
                return failed
        elif fault != 0:
            return 8 * i + fault + 1
    return 0
