"""The compiled interpreter: one call runs a whole program, step by step, on raw memory addresses.

`rows` holds one line per step: opcode, first argument, addresses of the operands. `args` are the arguments of all
steps, `floats` the same bytes as float64. The addresses and arguments must have been checked (see `packed.py`):
nothing is checked here but what depends on data: positions, tokens and indices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mapper_kernels import attention, elementwise, gemm, index, norm, product, reduce, rope
from mapper_kernels.jit import entry, jit
from mapper_kernels.memory import atomic_add, atomic_load, atomic_max, f32, f32_2d, f32_3d, f32_4d, i64, u8, u16, u32, u64
from mapper_kernels.split import SPINS, give_way, share

from mapper_host.opcodes import (
    ACTIVATION,
    ARANGE,
    ARGMAX,
    ATTENTION,
    CACHE_APPEND,
    CACHED_ATTENTION,
    CONV,
    COPY,
    CUMSUM,
    ELEMENTWISE,
    EMBED_AT,
    FILL,
    GATE,
    GATHER,
    GATHER_ELEMENTS,
    GATHER_ND,
    LINEAR_KN,
    LINEAR_NK,
    MATMUL,
    MOE,
    NORM,
    ONE_HOT,
    REDUCE,
    ROPE,
    ROPE_AT,
    SCATTER_ELEMENTS,
    SCATTER_ND,
    SOFTMAX,
    TOPK,
    TRILU,
)

BAD_POSITION, BAD_INDEX, BAD_OPCODE = 1, 2, 3
FAULTS = {
    BAD_POSITION: "the position is outside of the context that the program was made for",
    BAD_INDEX: "an index read from data is out of range",
    BAD_OPCODE: "unknown opcode",
}
"""What each fault number means. See `unpack`."""


def unpack(result: int) -> tuple[int, int]:
    """(step, fault) of a result of `interpret` that is not 0."""
    return (result - 1) // 8, (result - 1) % 8


@jit
def _linear(op: int, r: Any, a: Any, part: int, parts: int) -> None:
    m, n, k, biased = a[0], a[1], a[2], a[3]
    x, y = f32_2d(r[0], m, k), f32_2d(r[3 if biased else 2], m, n)
    if op == LINEAR_NK:
        gemm.gemm_nk(x, f32_2d(r[1], n, k), y, part, parts)
    else:
        gemm.gemm_kn(x, f32_2d(r[1], k, n), y, part, parts)
    if biased:
        gemm.add_bias(y, f32(r[2], n), part, parts, 4 if op == LINEAR_NK else 16)


@jit
def _norm(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    rows, d, weighted, biased = a[0], a[1], a[3], a[4]
    weight = f32(r[1], d if weighted else 0)
    bias = f32(r[1 + weighted], d if biased else 0)
    y = f32_2d(r[1 + weighted + biased], rows, d)
    norm.norm(f32_2d(r[0], rows, d), weight, bias, y, a[2] != 0, f[5], f[6], part, parts)


@jit
def _rope_at(r: Any, a: Any, part: int, parts: int) -> int:
    rows, d, seq, length, rotary = a[0], a[1], a[2], a[3], a[4]
    past = i64(r[2], 1)[0]
    if past < 0 or past + seq > length:
        return BAD_POSITION
    table = f32_3d(r[1], 2, length, rotary // 2)
    x, y = f32_2d(r[0], rows, d), f32_2d(r[3], rows, d)
    rope.rope_at(x, table, y, seq, past, rotary, a[5] != 0, part, parts)
    return 0


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
def _cache_append(r: Any, a: Any, part: int, parts: int) -> int:
    heads, length, seq, d = a[0], a[1], a[2], a[3]
    past = i64(r[2], 1)[0]
    if past < 0 or past + seq > length:
        return BAD_POSITION
    low, high = share(heads, 1, part, parts)
    for h in range(low, high):
        index.move(r[1] + 4 * h * seq * d, r[3] + 4 * (h * length + past) * d, 4, seq * d, 1, 1)
    return 0


@jit
def _cached_attention(r: Any, a: Any, f: Any, part: int, parts: int) -> int:
    b, h, s, d, hkv, length, dv = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    sinks, slopes = a[8], a[9]
    past = i64(r[3], 1)[0]
    if past < 0 or past + s > length:
        return BAD_POSITION
    attention.cached_attention(
        f32_4d(r[0], b, h, s, d), f32_4d(r[1], b, hkv, length, d), f32_4d(r[2], b, hkv, length, dv),
        f32(r[4], h if sinks else 0), f[12 : 12 + slopes], f32_4d(r[4 + sinks], b, h, s, dv),
        past, f[10], a[7], f[11], part, parts,
    )  # fmt: skip
    return 0


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
def _embed_at(r: Any, a: Any) -> int:
    rows, d, batch, seq, offset = a[0], a[1], a[2], a[3], a[4]
    first = i64(r[1], 1)[0] + offset
    if first < 0 or first + seq > rows:
        return BAD_POSITION
    for b in range(batch):
        index.move(r[0] + 4 * first * d, r[2] + 4 * b * seq * d, 4, seq * d, 1, 1)
    return 0


@jit
def _moe(r: Any, a: Any, f: Any, part: int, parts: int) -> None:
    rows, d, e, inner = a[0], a[1], a[2], a[3]
    chosen, weight = np.empty(a[4], np.int64), np.empty(a[4], np.float32)
    s, g = np.empty((1, e), np.float32), np.empty((1, inner), np.float32)
    u, z = np.empty((1, inner), np.float32), np.empty((1, d), np.float32)
    router = f32_2d(r[1], d, e)
    gates, ups = f32_3d(r[2], e, d, inner), f32_3d(r[3], e, d, inner)
    downs = f32_3d(r[4], e, inner, d)
    low, high = share(rows, 1, part, parts)
    for row in range(low, high):
        x, y = f32_2d(r[0] + 4 * row * d, 1, d), f32_2d(r[5] + 4 * row * d, 1, d)
        gemm.gemm_kn(x, router, s, 0, 1)
        product.route(s[0], chosen, weight, a[6], a[7] != 0, f[8])
        product.experts(x, chosen, weight, gates, ups, downs, a[5], g, u, z, y)


@jit
def _elementwise(r: Any, a: Any, part: int, parts: int) -> None:
    inputs, ndim = a[1], a[6]
    strides = a[7 + ndim : 7 + ndim + inputs * ndim].reshape((inputs, ndim))
    elementwise.elementwise(a[0], inputs, a[2:6], r, a[7 : 7 + ndim], strides, r[inputs], part, parts)


@jit
def _copy(r: Any, a: Any, part: int, parts: int) -> None:
    size, n = a[0], a[1]
    x, y = r[0] + a[2] * size, r[1] + a[3] * size
    index.copy(x, y, size, a[4 : 4 + n], a[4 + n : 4 + 2 * n], a[4 + 2 * n : 4 + 3 * n], part, parts)


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
        r[0], r[1], r[2], a[0], a[1], a[2], a[3], a[5 : 5 + n], a[5 + n : 5 + 2 * n], a[5 + 2 * n : 5 + 3 * n],
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
    if op == GATHER:
        return index.gather(r[0], r[1], a[1], r[2], a[0], a[2], a[3], a[4], a[5])
    if op == GATHER_ELEMENTS:
        n = a[2]
        return index.gather_elements(r[0], r[1], a[1], r[2], a[0], a[4 : 4 + n], a[4 + n : 4 + 2 * n], a[3])
    if op == GATHER_ND:
        return index.gather_nd(r[0], r[1], a[1], r[2], a[0], a[2], a[3], a[4], a[6 : 6 + a[5]])
    if op == SCATTER_ND:
        return index.scatter_nd(r[1], a[1], r[2], r[3], a[0], a[2], a[3], a[6 : 6 + a[5]], a[4])
    n = a[3]
    return index.scatter_elements(r[1], a[1], r[2], r[3], a[0], a[5 : 5 + n], a[5 + n : 5 + 2 * n], a[4], a[2])


@jit
def _alone(op: int, r: Any, a: Any, f: Any) -> int:
    """Ops that one thread runs."""
    if GATHER <= op <= SCATTER_ELEMENTS:
        return BAD_INDEX if _indexed(op, r, a) != 0 else 0
    if op == EMBED_AT:
        return _embed_at(r, a)
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
        reduce.topk(r[0], a[0], 0, r[1], a[1], a[2], a[3], 1, True)
    else:
        return BAD_OPCODE
    return 0


@jit
def _meet(barrier: Any, arrivals: int, fault: int) -> int:
    """Wait until `arrivals` threads have come; the first fault that any of them brought."""
    if fault != 0:
        atomic_max(barrier, 1, fault)
    atomic_add(barrier, 0, 1)
    spins = 0
    while atomic_load(barrier, 0) < arrivals:
        spins += 1
        if spins > SPINS:
            give_way()
    return atomic_load(barrier, 1)


@entry(Path(__file__).parent)
def interpret(
    rows: Any, args: Any, floats: Any, begin: int, end: int, part: int, parts: int, barrier: Any
) -> int:
    """Run steps begin..end - 1 as thread `part` of `parts`; 0, or which step failed and how (see `unpack`).

    rows int64 [n, 2 + OPERANDS]; args int64 [m]; floats: args as float64; barrier int64 [2], zero at first, shared by
    the threads: arrivals, and the first fault.
    """
    arrivals = 0
    for i in range(begin, end):
        first = rows[i, 1]
        op, r, a, f = rows[i, 0], rows[i, 2:], args[first:], floats[first:]
        fault = 0
        if op == LINEAR_NK or op == LINEAR_KN:
            _linear(op, r, a, part, parts)
        elif op == NORM:
            _norm(r, a, f, part, parts)
        elif op == ROPE_AT:
            fault = _rope_at(r, a, part, parts)
        elif op == ROPE:
            _rope(r, a, part, parts)
        elif op == CACHE_APPEND:
            fault = _cache_append(r, a, part, parts)
        elif op == CACHED_ATTENTION:
            fault = _cached_attention(r, a, f, part, parts)
        elif op == ATTENTION:
            _attention(r, a, f, part, parts)
        elif op == GATE:
            product.gate(a[1], f32(r[0], a[0]), f32(r[1], a[0]), f32(r[2], a[0]), part, parts)
        elif op == ACTIVATION:
            product.activation(a[1], f32(r[0], a[0]), f32(r[1], a[0]), part, parts)
        elif op == ELEMENTWISE:
            _elementwise(r, a, part, parts)
        elif op == COPY:
            _copy(r, a, part, parts)
        elif op == MATMUL:
            _matmul(r, a, part, parts)
        elif op == CONV:
            _conv(r, a, part, parts)
        elif op == MOE:
            _moe(r, a, f, part, parts)
        elif part == 0:
            fault = _alone(op, r, a, f)
        if parts > 1:
            arrivals += parts
            failed = _meet(barrier, arrivals, 0 if fault == 0 else 8 * i + fault + 1)
            if failed != 0:
                return failed
        elif fault != 0:
            return 8 * i + fault + 1
    return 0
