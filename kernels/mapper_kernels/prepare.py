"""Rows of x in the form that the inner loops of `dot` take them in.

Formats of floating-point weights: x itself in float32, in the order in which a chunk's weights unpack, padded
with zeros. Integer formats: each block of 32 elements as integers of 16 bits times a scale, the largest
magnitude becoming 32,639 (so that both planes, 256 high + low with low in -128..127, fit bytes); behind the
planes of a chunk lie what the offset of its weights adds per lane, and the scales; behind all chunks, for
formats that may have zero points, scale times sum per block. A block with anything that is not finite has the
scale NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from mapper_kernels.dot import OFFSET
from mapper_kernels.formats import FORMATS
from mapper_kernels.jit import intrinsic
from mapper_kernels.vec import F32, I8, I32, Emitter, Value, features, vector

LARGEST = 127 * 256 + 127
"""Largest magnitude of an element of x as an integer."""


def _read16(e: Emitter, at: Value, left: Value | None) -> Value:
    kind = vector(F32, 16)
    return e.load(at, kind) if left is None else e.load_part(at, kind, e.mask(16, left))


def _vectors(e: Emitter, x: Value, n: int, left: Value | None) -> list[Value]:
    found = []
    for i in range(n):
        rest = None if left is None else e.b.sub(left, e.number(16 * i))
        found.append(_read16(e, e.b.add(x, e.number(64 * i)), rest))
    return found


def _floats(e: Emitter, name: str, x: Value, out: Value, left: Value | None) -> None:
    found = _vectors(e, x, FORMATS[name].chunk.values // 16, left)
    if name == "bf16":
        a, c = found
        found = [e.pick(a, range(i, 32, 2), c) for i in range(2)]
    for i, v in enumerate(found):
        e.store(v, e.b.add(out, e.number(64 * i)))


def _integers(e: Emitter, name: str, x: Value, out: Value, left: Value | None, sums: Value | None) -> None:
    """One chunk: 128 elements, four blocks."""
    b = e.b
    whole, scales, block_sums = [], [], []
    found = _vectors(e, x, 8, left)
    for block in range(4):
        pair = found[2 * block : 2 * block + 2]
        top = e.peak(e.larger(*(e.unary("fabs", v) for v in pair)))
        scale = b.fmul(top, ir.Constant(F32, 1.0 / LARGEST))
        some = b.fcmp_ordered(">", top, ir.Constant(F32, 1e-30))
        inverse = b.select(some, b.fdiv(ir.Constant(F32, float(LARGEST)), top), ir.Constant(F32, 0.0))
        scaled = [b.fmul(v, e.splat(inverse, 16)) for v in pair]
        # what is not finite less itself is NaN; its block has no integers, and its scale must show it
        odd = b.bitcast(b.fcmp_unordered("uno", *(b.fsub(v, v) for v in pair)), ir.IntType(16))
        finite = b.icmp_unsigned("==", odd, ir.Constant(ir.IntType(16), 0))
        scale = b.select(finite, scale, ir.Constant(F32, float("nan")))
        none = e.fill(I32, 16, 0)
        ints = [b.select(finite, b.fptosi(e.unary("rint", v), none.type), none) for v in scaled]
        whole += ints
        scales.append(scale)
        if sums is not None:
            count = b.sitofp(e.total(b.add(*ints)), F32)
            block_sums.append(b.fmul(scale, count))
    eight = name.startswith("int8")
    order = whole
    if not eight:  # even elements, then odd ones, as nibbles unpack
        pairs = list(zip(whole[::2], whole[1::2], strict=True))
        order = [e.pick(p, range(i, 32, 2), q) for i in range(2) for p, q in pairs]
    _planes(e, name, order, out)
    at = b.add(out, e.number(384 if eight else 320))
    e.store(_together(e, scales), at)
    if sums is not None:
        e.store(_together(e, block_sums), sums)


def _together(e: Emitter, scalars: list[Value]) -> Value:
    made: Value = ir.Constant(vector(F32, len(scalars)), ir.Undefined)
    for i, v in enumerate(scalars):
        made = e.b.insert_element(made, v, ir.Constant(I32, i))
    return made


def _planes(e: Emitter, name: str, order: list[Value], out: Value) -> None:
    """High and low bytes of eight vectors, and what the weights' offset adds per lane of the sums."""
    b = e.b
    lanes = []
    for i, q in enumerate(order):
        high = b.ashr(b.add(q, e.fill(I32, 16, 128)), e.fill(I32, 16, 8))
        low = b.sub(q, b.shl(high, e.fill(I32, 16, 8)))
        for plane, v in enumerate((high, low)):
            e.store(b.trunc(v, vector(I8, 16)), b.add(out, e.number(128 * plane + 16 * i)))
        quads = q
        for _ in range(2):
            n = quads.type.count
            quads = b.add(e.pick(quads, range(0, n, 2)), e.pick(quads, range(1, n, 2)))
        lanes.append(quads)  # sums of 4 neighbours: what one lane of a vector of 64 bytes multiplies
    halves = []
    for h in range(2):
        four = lanes[4 * h : 4 * h + 4]
        two = [e.pick(four[0], range(8), four[1]), e.pick(four[2], range(8), four[3])]
        halves.append(e.pick(two[0], range(16), two[1]))
    if not name.startswith("int8"):
        halves = [b.add(*halves)]
    for i, v in enumerate(halves):
        e.store(b.mul(v, e.fill(I32, 16, -OFFSET[name])), b.add(out, e.number(256 + 64 * i)))


def _emit(e: Emitter, name: str, args: Any) -> None:
    x, k, out = args
    b, chunk = e.b, FORMATS[name].chunk
    size = e.number(chunk.values)
    full, rest = b.sdiv(k, size), b.srem(k, size)
    chunks = b.sdiv(b.add(k, e.number(chunk.values - 1)), size)
    tail = e.at(out, (chunk.x_bytes, chunks))

    def one(c: Value, left: Value | None) -> list[Value]:
        source, target = e.at(x, (4 * chunk.values, c)), e.at(out, (chunk.x_bytes, c))
        if name in OFFSET:
            sums = e.at(tail, (16, c)) if FORMATS[name].zeros else None
            _integers(e, name, source, target, left, sums)
        else:
            _floats(e, name, source, target, left)
        return []

    e.loop(e.number(0), full, [], lambda c, _: one(c, None))
    some = b.icmp_signed(">", rest, e.number(0))
    e.when(some, [], lambda _: one(full, rest))
    if FORMATS[name].zeros:  # sums are read sixteen blocks at a time
        groups = b.sdiv(b.add(k, e.number(511)), e.number(512))
        blank = e.fill(F32, 4, 0.0)
        e.loop(chunks, b.shl(groups, e.number(2)), [], lambda c, _: _blank(e, blank, e.at(tail, (16, c))))


def _blank(e: Emitter, value: Value, at: Value) -> list[Value]:
    e.store(value, at)
    return []


def prepare(name: str) -> Callable[..., None]:
    """An intrinsic: (address of x [K] float32, K, address of `Format.prepared_bytes` bytes)."""

    def typed(typingctx: Any, x: Any, k: Any, out: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(Emitter(builder, "avx512vnni" in features()), name, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), build

    made: Callable[..., None] = intrinsic(typed)
    return made
