"""Inner loops of matrix products: dot products of several weight rows with several prepared rows of x.

A weight row is walked in chunks; four rows far apart in memory are read at once, so that four address streams
are in flight, each prefetched `AHEAD` bytes ahead and again, into the first cache, `NEAR` bytes ahead. The
last chunk of a row is read under a mask.

Integer formats multiply x as integers of 16 bits, exactly, in two planes of bytes (see `prepare`): 256 high
+ low. Sums of a chunk's block are exact in int32; blocks are scaled and added in float32, sixteen lanes at
a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from mapper_kernels.formats import FORMATS
from mapper_kernels.jit import intrinsic
from mapper_kernels.vec import F16, F32, I8, I16, I32, Emitter, Value, features, vector

ROWS = 4
"""Weight rows at a time."""
AHEAD, SKEW, NEAR = 4096, 576, 512
"""How far ahead of the first stream is prefetched, how much farther ahead of each further one, and how far
ahead a line is taken into the first cache, bytes.

Streams are often a multiple of 4096 bytes apart, and memory gives less where lines with the same low bits are
asked for at once; chosen with `python -m benchmarks.gemv`. What is computed stays in step; only what is asked
for is shifted, by an odd number of lines."""


OFFSET = {"int8": 128, "int8f": 128, "int8row": 128, "int4": 8, "int4f": 8, "mxfp4": 12}
"""What is added to a weight to make it an unsigned byte (for zero points, the middle one)."""
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12)
_FACTOR = {"mxfp4": 0.5, "f8e4m3": 256.0}
"""What the sums are multiplied by in the end: the weights are taken as multiples of it."""


def _read(e: Emitter, at: Value, kind: Any, left: Value | None) -> Value:
    """A vector, or as many of its elements as are `left`."""
    if left is None:
        return e.load(at, kind)
    return e.load_part(at, kind, e.mask(kind.count, left))


def weights_f(e: Emitter, name: str, at: Value, left: Value | None) -> list[Value]:
    """The weights of a chunk as vectors of 16 float32, `left` of them where it is given."""
    b = e.b
    wide = vector(F32, 16)

    def rest(n: int) -> Value | None:
        return None if left is None else b.sub(left, e.number(n))

    if name == "f32":
        return [_read(e, b.add(at, e.number(64 * i)), wide, rest(16 * i)) for i in range(4)]
    if name == "f16":
        return [
            b.fpext(_read(e, b.add(at, e.number(32 * i)), vector(F16, 16), rest(16 * i)), wide)
            for i in range(2)
        ]
    if name == "bf16":
        pairs = b.bitcast(_read(e, at, vector(I16, 32), left), vector(I32, 16))
        low = b.shl(pairs, e.fill(I32, 16, 16))
        high = b.and_(pairs, e.fill(I32, 16, 0xFFFF0000))
        return [b.bitcast(v, wide) for v in (low, high)]
    words = b.sext(_read(e, at, vector(I8, 32), left), vector(I16, 32))
    moved = b.and_(b.shl(words, e.fill(I16, 32, 7)), e.fill(I16, 32, 0xBFFF))
    halves = b.bitcast(moved, vector(F16, 32))
    return [b.fpext(e.pick(halves, range(16 * i, 16 * i + 16)), wide) for i in range(2)]


def weights_i(e: Emitter, name: str, at: Value, left: Value | None) -> list[Value]:
    """The weights of a chunk as vectors of 64 unsigned bytes; `left`: bytes."""
    b, bytes64 = e.b, vector(I8, 64)
    if name.startswith("int8"):
        second = None if left is None else b.sub(left, e.number(64))
        return [_read(e, at, bytes64, left), _read(e, b.add(at, e.number(64)), bytes64, second)]
    packed = _read(e, at, bytes64, left)
    low = b.and_(packed, e.fill(I8, 64, 15))
    high = b.lshr(packed, e.fill(I8, 64, 4))
    if name == "mxfp4":
        table = [12 + v for v in _MXFP4] + [12 - v for v in _MXFP4]
        return [e.lookup(v, table) for v in (low, high)]
    return [low, high]


def scales_of(e: Emitter, name: str, at: Value, left: Value | None) -> Value:
    """Four block scales as float32; `left`: blocks."""
    b = e.b
    if name == "mxfp4":
        exponent = b.zext(_read(e, at, vector(I8, 4), left), vector(I32, 4))
        normal = b.shl(exponent, e.fill(I32, 4, 23))
        tiny = b.icmp_unsigned("==", exponent, e.fill(I32, 4, 0))
        return b.bitcast(b.select(tiny, e.fill(I32, 4, 1 << 22), normal), vector(F32, 4))
    if name.endswith("f"):
        return _read(e, at, vector(F32, 4), left)
    return b.fpext(_read(e, at, vector(F16, 4), left), vector(F32, 4))


@dataclass(frozen=True)
class _Operands:
    """Where things are: bases and steps between streams (bytes), prepared x and its row step."""

    w: Value
    w_step: Value
    s: Value
    s_step: Value
    x: Value
    x_step: Value


def _stream(e: Emitter, base: Value, step: Value, r: int, size: int, c: Value) -> Value:
    return e.at(base, (r, step), (size, c))


def _ask(e: Emitter, o: _Operands, c: Value, size: int) -> None:
    """Prefetch for the chunks of `size` bytes after number c, a line of each stream in turn."""
    # four lines of a stream at once are more than the first cache keeps until they are read
    far = 2 if size > 128 else 1
    for line in range(0, max(64, size), 64):
        for r in range(ROWS):
            at = _stream(e, o.w, o.w_step, r, size, c)
            e.prefetch(e.b.add(at, e.number(AHEAD + SKEW * r + line)), far)
            e.prefetch(e.b.add(at, e.number(NEAR + line)))


def _step(
    e: Emitter, name: str, o: _Operands, c: Value, left: Value | None, sums: list[Value], m: int
) -> list[Value]:
    """Add chunk number c to the sums [ROWS * m]."""
    chunk = FORMATS[name].chunk
    integer = name in OFFSET
    part = left
    if integer and left is not None:
        part = left if chunk.bytes == chunk.values else e.b.lshr(e.b.add(left, e.number(1)), e.number(1))
    blocks = None if left is None else e.b.lshr(e.b.add(left, e.number(31)), e.number(5))
    xs = [e.at(o.x, (i, o.x_step), (chunk.x_bytes, c)) for i in range(m)]
    out: list[Value] = []
    if left is None:
        _ask(e, o, c, chunk.bytes)
    for r in range(ROWS):
        at = _stream(e, o.w, o.w_step, r, chunk.bytes, c)
        if not integer:
            found = weights_f(e, name, at, part)
            for i in range(m):
                total = sums[r * m + i]
                for j, w in enumerate(found):
                    total = e.fma(w, e.load(e.b.add(xs[i], e.number(64 * j)), w.type), total)
                out.append(total)
            continue
        scale = None
        if chunk.scales:
            place = _stream(e, o.s, o.s_step, r, chunk.scales, c)
            if left is None:
                e.prefetch(e.b.add(place, e.number(256)))
            scale = scales_of(e, name, place, blocks)
        found = weights_i(e, name, at, part)
        out += [_integers(e, name, found, scale, xs[i], sums[r * m + i]) for i in range(m)]
    return out


def _integers(e: Emitter, name: str, w: list[Value], scale: Value | None, x: Value, total: Value) -> Value:
    b, kind = e.b, vector(I32, 16)

    def plane(n: int) -> Value:
        return e.load(b.add(x, e.number(64 * n)), vector(I8, 64))

    def lanes(n: int) -> Value:
        return e.load(b.add(x, e.number(256 + 64 * n)), kind)

    eight = name.startswith("int8")
    xs = e.load(b.add(x, e.number(384 if eight else 320)), vector(F32, 4))
    both = xs if scale is None else b.fmul(scale, xs)
    if eight:
        groups = [([w[h]], [plane(h)], [plane(2 + h)], [2 * h] * 8 + [2 * h + 1] * 8) for h in range(2)]
    else:
        groups = [(w, [plane(0), plane(1)], [plane(2), plane(3)], [n // 4 for n in range(16)])]
    for h, (parts, high, low, order) in enumerate(groups):
        top, bottom = e.fill(I32, 16, 0), lanes(h)
        for v, p, q in zip(parts, high, low, strict=True):
            top, bottom = e.dot4(top, v, p), e.dot4(bottom, v, q)
        whole = b.sitofp(b.add(b.shl(top, e.fill(I32, 16, 8)), bottom), vector(F32, 16))
        total = e.fma(whole, e.pick(both, order), total)
    return total


def _emit(e: Emitter, name: str, m: int, args: Any) -> None:
    w, w_step, s, s_step, z, z_step, x, x_step, k, y, y_step, y_row, valid = args
    chunk, o = FORMATS[name].chunk, _Operands(w, w_step, s, s_step, x, x_step)
    b = e.b
    size = e.number(chunk.values)
    full, rest = b.sdiv(k, size), b.srem(k, size)
    zero = [e.fill(F32, 16, 0.0)] * (ROWS * m)
    sums = e.loop(e.number(0), full, zero, lambda c, now: _step(e, name, o, c, None, now, m))
    some = b.icmp_signed(">", rest, e.number(0))
    sums = e.when(some, sums, lambda now: _step(e, name, o, full, rest, now, m))
    totals = [e.total(v) for v in sums]
    if FORMATS[name].zeros:
        chunks = b.sdiv(b.add(k, e.number(chunk.values - 1)), size)
        given = b.icmp_signed("!=", z, e.number(0))
        totals = e.when(given, totals, lambda now: _zeros(e, name, o, z, z_step, k, chunks, now, m))
    for r in range(ROWS):
        factor = ir.Constant(F32, _FACTOR.get(name, 1.0))
        if name in ("int8row", "f8e4m3"):
            factor = b.fmul(factor, e.load(e.at(s, (r, s_step)), F32))
        for i in range(m):
            value = b.fmul(totals[r * m + i], factor)
            there = b.icmp_signed(">", valid, e.number(i))
            e.when(there, [], partial(_store, e, value, e.at(y, (r, y_step), (i, y_row))))


def _store(e: Emitter, value: Value, at: Value, _: list[Value]) -> list[Value]:
    e.store(value, at)
    return []


def _zeros(
    e: Emitter,
    name: str,
    o: _Operands,
    z: Value,
    z_step: Value,
    k: Value,
    chunks: Value,
    totals: list[Value],
    m: int,
) -> list[Value]:
    """Correct the sums for zero points other than the middle: sixteen blocks at a time."""
    b, chunk = e.b, FORMATS[name].chunk
    blocks = b.sdiv(b.add(k, e.number(31)), e.number(32))
    count = b.sdiv(b.add(blocks, e.number(15)), e.number(16))
    sums_at = e.at(o.x, (chunk.x_bytes, chunks))
    half = F32 if name.endswith("f") else F16

    def body(c: Value, now: list[Value]) -> list[Value]:
        left = b.sub(blocks, b.shl(c, e.number(4)))
        made = []
        for r in range(ROWS):
            scale = _read(e, e.at(o.s, (r, o.s_step), (chunk.scales * 4, c)), vector(half, 16), left)
            wide = scale if half is F32 else b.fpext(scale, vector(F32, 16))
            packed = _read(
                e, e.at(z, (r, z_step), (8, c)), vector(I8, 8), b.lshr(b.add(left, e.number(1)), e.number(1))
            )
            pair = e.pick(packed, [n // 2 for n in range(16)])
            shifted = b.lshr(pair, e.constant(I8, [0, 4] * 8))
            zero = b.zext(b.and_(shifted, e.fill(I8, 16, 15)), vector(I32, 16))
            offset = b.sitofp(b.sub(e.fill(I32, 16, OFFSET[name]), zero), vector(F32, 16))
            factor = b.fmul(offset, wide)
            for i in range(m):
                at = e.at(sums_at, (i, o.x_step), (64, c))
                made.append(e.fma(factor, e.load(at, vector(F32, 16)), now[r * m + i]))
        return made

    found = e.loop(e.number(0), count, [e.fill(F32, 16, 0.0)] * (ROWS * m), body)
    return [b.fadd(t, e.total(v)) for t, v in zip(totals, found, strict=True)]


def dot(name: str, m: int, vnni: bool | None = None) -> Callable[..., None]:
    """An intrinsic for four weight rows of format `name` and m prepared rows of x.

    Arguments, int64: w, step; scales, step; zeros (0: none), step; x, step; K; y, step, row step; rows of x
    that are valid. Addresses, and steps in bytes between weight rows (of x and y rows: `step`, `row step`).
    """
    use = "avx512vnni" in features() if vnni is None else vnni

    def typed(
        typingctx: Any,
        w: Any,
        _w1: Any,
        s: Any,
        _s1: Any,
        z: Any,
        _z1: Any,
        x: Any,
        _x1: Any,
        k: Any,
        y: Any,
        y1: Any,
        y2: Any,
        valid: Any,
    ) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(Emitter(builder, use), name, m, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), build

    made: Callable[..., None] = intrinsic(typed)
    return made
