"""The host's instruction set: opcode numbers and names, and how many bytes each operand of a step must have.

A step has its operands in order (reads, then writes; optional ones are left out as its arguments say) and
64-bit arguments; a floating-point argument is the bit pattern of a float64. The numbers are those that
`interpreter.py` branches on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

from mapper_kernels.formats import FORMATS
from mapper_kernels.names import ATTEND_HEAD, EPILOGUES, PROJECT_EACH

OPCODES = (
    "linear_nk", "linear_kn", "norm", "rope_at", "rope", "cache_append", "cached_attention", "attention",
    "embed_at",
    "gate", "activation", "elementwise", "copy", "fill", "arange", "one_hot", "trilu", "gather",
    "gather_elements",
    "gather_nd", "scatter_nd", "scatter_elements", "reduce", "softmax", "cumsum", "topk", "argmax",
    "matmul", "conv",
    "moe", "vector", "route", "round_blocks", "project", "attend_at", "merge_splits",
    "experts_up", "experts_down",
)  # fmt: skip
"""Opcode names; the position is the opcode."""
(
    LINEAR_NK, LINEAR_KN, NORM, ROPE_AT, ROPE, CACHE_APPEND, CACHED_ATTENTION, ATTENTION, EMBED_AT,
    GATE, ACTIVATION, ELEMENTWISE, COPY, FILL, ARANGE, ONE_HOT, TRILU, GATHER, GATHER_ELEMENTS,
    GATHER_ND, SCATTER_ND, SCATTER_ELEMENTS, REDUCE, SOFTMAX, CUMSUM, TOPK, ARGMAX, MATMUL, CONV,
    MOE, VECTOR, ROUTE, ROUND_BLOCKS, PROJECT, ATTEND_AT, MERGE_SPLITS,
    EXPERTS_UP, EXPERTS_DOWN,
) = range(len(OPCODES))  # fmt: skip

SIZES = (4, 8, 2, 2, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1)
"""Bytes of one element by type code (see mapper_kernels.memory)."""
CODES = {
    name: code
    for code, name in enumerate(
        (
            "f32",
            "f64",
            "f16",
            "bf16",
            "f8e4m3",
            "f8e5m2",
            "i64",
            "i32",
            "i16",
            "i8",
            "u64",
            "u32",
            "u16",
            "u8",
            "bool",
        )
    )
}
"""Element type name -> code."""
OPERANDS = 20
"""Most operands of a step."""

Args = Sequence[int]


def bits(value: float) -> int:
    """A float64 as the int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def span(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """(lowest, highest + 1) item offset that a strided array reaches, relative to its first item."""
    if 0 in shape:
        return 0, 0
    reach = [(d - 1) * s for d, s in zip(shape, strides, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + 1


def _linear(a: Args) -> list[int]:
    m, n, k, bias = a
    return [4 * m * k, 4 * n * k, *([4 * n] if bias else []), 4 * m * n]


def _norm(a: Args) -> list[int]:
    rows, d, _, weight, bias, _, _ = a
    return [4 * rows * d, *[4 * d] * (bool(weight) + bool(bias)), 4 * rows * d]


def _rope_at(a: Args) -> list[int]:
    rows, d, _, length, rotary, _ = a
    return [4 * rows * d, 4 * length * rotary, 8, 4 * rows * d]


def _rope(a: Args) -> list[int]:
    b, h, s, d, _, _, _, width, batch_stride, row_stride = a
    angles = 4 * ((b - 1) * batch_stride + (s - 1) * row_stride + width)
    return [4 * b * h * s * d, angles, angles, 4 * b * h * s * d]


def _cache_append(a: Args) -> list[int]:
    heads, length, s, d = a
    return [4 * heads * length * d, 4 * heads * s * d, 8, 4 * heads * length * d]


def _cached_attention(a: Args) -> list[int]:
    b, h, s, d, hkv, length, dv, _, sinks = a[:9]
    cache = 4 * b * hkv * length
    return [4 * b * h * s * d, cache * d, cache * dv, 8, *([4 * h] if sinks else []), 4 * b * h * s * dv]


def _attention(a: Args) -> list[int]:
    b, h, s, d, hkv, t, dv, _, _, mask, code, ms0, ms1, ms2, ms3, sinks = a[:16]
    reads = [4 * b * h * s * d, 4 * b * hkv * t * d, 4 * b * hkv * t * dv]
    if mask:
        reads.append(SIZES[code] * span((b, h, s, t), (ms0, ms1, ms2, ms3))[1])
    return [*reads, *([4 * h] if sinks else []), 4 * b * h * s * dv]


def _elementwise(a: Args) -> list[int]:
    _, inputs, *rest = a
    codes, ndim = rest[:4], rest[4]
    shape, strides = rest[5 : 5 + ndim], rest[5 + ndim :]
    reads = [SIZES[codes[j]] * span(shape, strides[j * ndim : (j + 1) * ndim])[1] for j in range(inputs)]
    return [*reads, SIZES[codes[3]] * math.prod(shape)]


def _copy(a: Args) -> list[int]:
    size, ndim, x0, y0, *rest = a
    shape, xs, ys = rest[:ndim], rest[ndim : 2 * ndim], rest[2 * ndim : 3 * ndim]
    ends = []
    for first, strides in ((x0, xs), (y0, ys)):
        low, high = span(shape, strides)
        ends.append(size * (first + high) if first + low >= 0 else 1 << 62)
    return ends


def _gather(a: Args) -> list[int]:
    size, code, outer, n, inner, count = a
    return [size * outer * n * inner, SIZES[code] * count, size * outer * count * inner]


def _gather_elements(a: Args) -> list[int]:
    size, code, ndim, _, *rest = a
    items = math.prod(rest[:ndim])
    return [size * math.prod(rest[ndim : 2 * ndim]), SIZES[code] * items, size * items]


def _gather_nd(a: Args) -> list[int]:
    size, code, batch, count, inner, ndim, *dims = a
    x = size * batch * math.prod(dims[:ndim]) * inner
    return [x, SIZES[code] * batch * count * ndim, size * batch * count * inner]


def _scatter_nd(a: Args) -> list[int]:
    code, index, count, inner, _, ndim, *dims = a
    y = SIZES[code] * math.prod(dims[:ndim]) * inner
    return [y, SIZES[index] * count * ndim, SIZES[code] * count * inner, y]


def _scatter_elements(a: Args) -> list[int]:
    code, index, _, ndim, _, *rest = a
    items, y = math.prod(rest[:ndim]), SIZES[code] * math.prod(rest[ndim : 2 * ndim])
    return [y, SIZES[index] * items, SIZES[code] * items, y]


def _reduce(a: Args) -> list[int]:
    _, code, kept, gone, *rest = a
    shape, strides = rest[:kept], rest[kept : 2 * kept]
    out = math.prod(shape)
    rest = rest[2 * kept :]
    high = span([*shape, *rest[:gone]], [*strides, *rest[gone : 2 * gone]])[1]
    return [SIZES[code] * high, SIZES[code] * out]


def _middle(a: Args) -> list[int]:
    return [SIZES[a[0]] * a[1] * a[2] * a[3]] * 2


def _topk(a: Args) -> list[int]:
    code, outer, n, inner, k, _ = a
    return [SIZES[code] * outer * n * inner, SIZES[code] * outer * k * inner, 8 * outer * k * inner]


def _argmax(a: Args) -> list[int]:
    code, outer, n, inner = a
    return [SIZES[code] * outer * n * inner, 8 * outer * inner]


def _matmul(a: Args) -> list[int]:
    code, m, n, k, ndim, *rest = a
    batch, xs, ws = rest[:ndim], rest[ndim : 2 * ndim], rest[2 * ndim : 3 * ndim]
    x, w = span(batch, xs)[1] - 1 + m * k, span(batch, ws)[1] - 1 + k * n
    return [SIZES[code] * v for v in (x, w, math.prod(batch) * m * n)]


def _conv(a: Args) -> list[int]:
    b, c, h, w, f, cg, kh, kw, oh, ow = a[:10]
    bias = a[17]
    return [4 * b * c * h * w, 4 * f * cg * kh * kw, *([4 * f] if bias else []), 4 * b * f * oh * ow]


def _route(a: Args) -> list[int]:
    rows, e, k, corrected = a[:4]
    return [4 * rows * e, *([4 * e] if corrected else []), 8 * rows * k, 4 * rows * k]


def _moe(a: Args) -> list[int]:
    rows, e, d, f, out, k, packing, gated, _, _, _, _, gate_bias, up_bias, down_bias = a[:15]
    wide = f if packing == 0 else 2 * f
    found = [4 * rows * d, 8 * rows * k, 4 * rows * k]
    if gated:
        found += [4 * e * d * f, *([4 * e * f] if gate_bias else [])]
    found += [4 * e * d * wide, *([4 * e * wide] if up_bias else [])]
    found += [4 * e * f * out, *([4 * e * out] if down_bias else [])]
    return [*found, 4 * rows * out]


def _stack(e: int, n: int, k: int, a: Args) -> list[int]:
    """Operands of a stack [E, N, K]; a: format, whether it has zeros, and a bias."""
    code, zeros, bias = a
    if code < 0 or zeros not in (0, 1) or bias not in (0, 1):
        raise ValueError("no such matrix")
    kind = _FORMATS[code]
    if zeros and not kind.zeros:
        raise ValueError("no zero points in this format")
    rows = [kind.value_bytes(k), *([kind.scale_bytes(k)] if kind.scale else [])]
    rows += [kind.zero_bytes(k)] if zeros else []
    return [*(e * n * size for size in rows), *([4 * e * n] if bias else [])]


def _experts_up(a: Args) -> list[int]:
    rows, k, e, d, f, shared, packing, gated, _, _, _, *rest = a
    odd = packing not in range(3) or gated not in (0, 1) or (packing and gated) or shared not in (0, 1)
    if odd or min(a[:5]) < 0 or len(rest) != STACK * (1 + gated):
        raise ValueError("no such experts")
    found = [4 * rows * d, 8 * rows * k, *([4 * rows * k] if shared else [])]
    for i in range(1 + gated):
        found += _stack(e, 2 * f if packing else f, d, rest[STACK * i : STACK * (i + 1)])
    return [*found, 4 * rows * k * f]


def _experts_down(a: Args) -> list[int]:
    rows, k, e, f, d, shared, *rest = a
    if shared not in (0, 1) or min(a[:5]) < 0:
        raise ValueError("no such experts")
    share = [4 * rows * k] if shared else []
    return [4 * rows * k * f, 8 * rows * k, *share, *_stack(e, d, f, rest), 4 * rows * d]


def _project(a: Args) -> list[int]:
    m, k, norm, weighted, biased, _, _, epilogue, _, count, *rest = a
    if (
        epilogue not in range(len(EPILOGUES))
        or count not in (1, 2, 3)
        or len(rest) != PROJECT_EACH * count
        or m < 0
    ):
        raise ValueError("no such product")
    reads, writes = [4 * m * k, *([4 * k] * (bool(weighted) + bool(biased)) if norm else [])], []
    for i in range(count):
        n, code, zeros, bias = rest[PROJECT_EACH * i : PROJECT_EACH * (i + 1)]
        kind = _FORMATS[code]
        reads += [n * kind.value_bytes(k), *([n * kind.scale_bytes(k)] if kind.scale else [])]
        reads += [*([n * kind.zero_bytes(k)] if zeros else []), *([4 * n] if bias else [])]
        writes.append(4 * m * n)
        if zeros not in (0, int(kind.zeros)) or code < 0:
            raise ValueError("no zero points in this format")
    if epilogue == EPILOGUES.index("plain"):
        return [*reads, *writes]
    if count != (2 if epilogue == EPILOGUES.index("gate") else 1) or len({*writes}) != 1:
        raise ValueError("the epilogue takes another number of products")
    return (
        [*reads, *writes[:1], writes[0]] if epilogue == EPILOGUES.index("residual") else [*reads, writes[0]]
    )


def _attend_at(a: Args) -> list[int]:
    b, h, d, kv, length, dv, _, sinks, _, _, _, rotary, _, rows, splits, code, _ = a[:ATTEND_HEAD]
    size = (4, 2, 2)[code]
    caches = [size * b * kv * length * n for n in (d, dv)]
    reads = [4 * b * h * d, 4 * b * kv * d, 4 * b * kv * dv, *caches, 8]
    reads += [*([4 * rows * rotary] if rotary else []), *([4 * h] if sinks else [])]
    if (
        h % kv
        or len(a) != ATTEND_HEAD + (h if a[8] else 0)
        or a[8] not in (0, h)
        or splits < 1
        or rotary > d
        or code < 0
    ):
        raise ValueError("no such attention")
    if rotary and rows < length:
        raise ValueError("the rotary table is shorter than the cache")
    return [*reads, *caches, 4 * b * h * (dv if splits == 1 else splits * (dv + 2))]


def _merge_splits(a: Args) -> list[int]:
    rows, heads, splits, dv, sinks = a
    return [4 * rows * splits * (dv + 2), *([4 * heads] if sinks else []), 4 * rows * dv]


_FORMATS = sorted(FORMATS.values(), key=lambda f: f.code)
STACK = 3
"""Arguments of a stack of experts: format, whether it has zeros, and a bias."""


_EXTENTS: dict[int, Callable[[Args], list[int]]] = {
    LINEAR_NK: _linear,
    LINEAR_KN: _linear,
    NORM: _norm,
    ROPE_AT: _rope_at,
    ROPE: _rope,
    CACHE_APPEND: _cache_append,
    CACHED_ATTENTION: _cached_attention,
    ATTENTION: _attention,
    EMBED_AT: lambda a: [4 * a[0] * a[1], 8, 4 * a[2] * a[3] * a[1]],
    GATE: lambda a: [4 * a[0]] * 3,
    ACTIVATION: lambda a: [4 * a[0]] * 2,
    ELEMENTWISE: _elementwise,
    COPY: _copy,
    FILL: lambda a: [SIZES[a[0]] * a[1]],
    ARANGE: lambda a: [SIZES[a[0]], SIZES[a[0]], SIZES[a[0]] * a[1]],
    ONE_HOT: lambda a: [SIZES[a[0]] * a[2], SIZES[a[1]] * a[2] * a[3]],
    TRILU: lambda a: [a[0] * a[1] * a[2] * a[3]] * 2,
    GATHER: _gather,
    GATHER_ELEMENTS: _gather_elements,
    GATHER_ND: _gather_nd,
    SCATTER_ND: _scatter_nd,
    SCATTER_ELEMENTS: _scatter_elements,
    REDUCE: _reduce,
    SOFTMAX: _middle,
    CUMSUM: _middle,
    TOPK: _topk,
    ARGMAX: _argmax,
    MATMUL: _matmul,
    CONV: _conv,
    MOE: _moe,
    ROUTE: _route,
    ROUND_BLOCKS: lambda a: [4 * a[0] * a[1]] * 2,
    VECTOR: lambda a: [4 * a[1], 4 * (1 if a[2] else a[1]), 4 * a[1]],
    PROJECT: _project,
    ATTEND_AT: _attend_at,
    MERGE_SPLITS: _merge_splits,
    EXPERTS_UP: _experts_up,
    EXPERTS_DOWN: _experts_down,
}


def extents(opcode: int, args: Args) -> list[int]:
    """Bytes that each operand of a step (reads, then writes) must hold at least.

    Raises ValueError or IndexError where the arguments are not those of the opcode.
    """
    found = _EXTENTS[opcode](args)
    if any(n < 0 for n in found):
        raise ValueError("negative size")
    return found
