"""Operands of products with many rows of x, laid out in tiles of 1 KiB as `amx` takes them.

Weights, 32 rows at a time: for every chunk of K (64 bytes of a row in a tile), plane by plane, two tiles of
16 rows of 64 bytes. Floating-point formats are split into planes of bfloat16, 32 elements a chunk; integer
formats become signed bytes, zero points subtracted, 64 elements a chunk, and their scales go apart, [blocks,
32] float32.

x, 16 rows at a time: for every chunk its planes, a tile each. A row of x is written as 64 bytes of the tile
first; `turn` then exchanges rows and groups of 4 bytes in place. Scales of integer x: [blocks, 16] float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from mapper_kernels.amx import PLANES, THERE, TILE
from mapper_kernels.dot import AHEAD, OFFSET, weights_f
from mapper_kernels.formats import FORMATS
from mapper_kernels.jit import intrinsic
from mapper_kernels.prepare import LARGEST
from mapper_kernels.vec import F16, F32, I8, I16, I32, Emitter, Value, features, vector

WEIGHT_PLANES = {"f32": 3, "f16": 2, "bf16": 1, "f8e4m3": 1}
"""Planes that hold a weight exactly."""
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12)
_WIDE, _BITS = vector(F32, 16), vector(I32, 16)


def _read(e: Emitter, at: Value, kind: Any, left: Value | None) -> Value:
    return e.load(at, kind) if left is None else e.load_part(at, kind, e.mask(kind.count, left))


def _rest(e: Emitter, left: Value | None, n: int) -> Value | None:
    return None if left is None else e.b.sub(left, e.number(n))


_Half: Any = ir.types.HalfType


class _Bfloat(_Half):  # type: ignore[misc]  # llvmlite has no name for it
    def __str__(self) -> str:
        return "bfloat"


_Bfloat._create_instance()
_NARROW = vector(_Bfloat(), 16)
_LARGEST16 = 3.3895313892515355e38
"""The largest finite bfloat16."""


def _planes(e: Emitter, pair: list[Value], planes: int) -> list[Value]:
    """32 elements as `planes` vectors of 32 bfloat16: each the nearest to what the ones before leave."""
    b = e.b
    found: list[list[Value]] = [[] for _ in range(planes)]
    for v in pair:
        finite = b.fcmp_ordered("<", e.unary("fabs", v), e.fill(F32, 16, float("inf")))
        bound, other = e.fill(F32, 16, _LARGEST16), e.fill(F32, 16, -_LARGEST16)
        below = b.select(b.fcmp_ordered("<", v, bound), v, bound)
        near = b.select(b.fcmp_ordered(">", below, other), below, other)
        first = b.select(finite, near, v)  # a finite number is not rounded to infinity
        top = b.fptrunc(first, _NARROW)
        left = b.select(finite, b.fsub(v, b.fpext(top, _WIDE)), e.fill(F32, 16, 0.0))
        found[0].append(top)
        for p in range(1, planes):
            top = b.fptrunc(left, _NARROW)
            left = b.fsub(left, b.fpext(top, _WIDE))
            found[p].append(top)
    words = [[b.bitcast(v, vector(I16, 16)) for v in both] for both in found]
    return [e.pick(both[0], range(32), both[1]) for both in words]


def _floats(e: Emitter, name: str, at: Value, left: Value | None) -> list[Value]:
    """32 weights as vectors of 64 bytes, one per plane."""
    if name == "bf16":
        return [_read(e, at, vector(I16, 32), left)]
    if name == "f32":
        pair = [_read(e, e.b.add(at, e.number(64 * i)), _WIDE, _rest(e, left, 16 * i)) for i in range(2)]
    else:
        pair = weights_f(e, name, at, left)
    return _planes(e, pair, WEIGHT_PLANES[name])


def _integers(e: Emitter, name: str, at: Value, z: Value, left: Value | None) -> Value:
    """64 weights as signed bytes."""
    b, kind = e.b, vector(I8, 64)
    if name.startswith("int8"):
        return b.xor(_read(e, at, kind, left), e.fill(I8, 64, 128))
    part = None if left is None else b.lshr(b.add(left, e.number(1)), e.number(1))
    packed = b.zext(_read(e, at, vector(I8, 32), part), vector(I16, 32))
    spread = b.or_(packed, b.shl(packed, e.fill(I16, 32, 4)))
    nibbles = b.bitcast(b.and_(spread, e.fill(I16, 32, 0x0F0F)), kind)
    if name == "mxfp4":
        return e.lookup(nibbles, [*_MXFP4, *[-v & 255 for v in _MXFP4]])
    both = b.insert_element(ir.Constant(vector(I8, 2), ir.Undefined), z, ir.Constant(I32, 0))
    both = b.insert_element(both, b.lshr(z, ir.Constant(I8, 4)), ir.Constant(I32, 1))
    zero = b.and_(both, e.fill(I8, 2, 15))
    return b.sub(nibbles, e.pick(zero, [n // 32 for n in range(64)]))


def _scale(e: Emitter, kind: str, s: Value, block: Value) -> Value:
    """A weight's scale as float32."""
    b = e.b
    if kind == "e8m0":
        exponent = b.zext(e.load(b.add(s, block), I8), I32)
        tiny = b.icmp_unsigned("==", exponent, ir.Constant(I32, 0))
        power = b.select(tiny, ir.Constant(I32, 1 << 22), b.shl(exponent, ir.Constant(I32, 23)))
        return b.fmul(b.bitcast(power, F32), ir.Constant(F32, 0.5))  # weights are multiples of a half
    if kind == "row":
        return e.load(s, F32)
    if kind == "f32":
        return e.load(e.at(s, (4, block)), F32)
    return b.fpext(e.load(e.at(s, (2, block)), F16), F32)


_KINDS = (
    ("f32",),
    ("f16",),
    ("bf16",),
    ("f8e4m3",),
    ("int8", "int8row", "int8f"),
    ("int4", "int4f"),
    ("mxfp4",),
)
"""Formats whose elements are alike."""
_SCALES = {"f16": ("int8", "int4"), "f32": ("int8f", "int4f"), "e8m0": ("mxfp4",), "row": ("int8row",)}
"""Kind of scales -> formats."""


def _cases(e: Emitter, code: Value, bodies: list[tuple[tuple[str, ...], Callable[[], None]]]) -> None:
    """Do what belongs to the format of a code."""
    after = e.b.append_basic_block("after")
    choice = e.b.switch(code, after)
    for names, body in bodies:
        block = e.b.append_basic_block(names[0])
        for name in names:
            choice.add_case(e.number(FORMATS[name].code), block)
        e.b.position_at_end(block)
        body()
        e.b.branch(after)
    e.b.position_at_end(after)


def _pack_row(e: Emitter, name: str, w: Value, z: Value, k: Value, out: Value) -> None:
    b, integer = e.b, name in OFFSET
    size, planes = 64 if integer else 32, WEIGHT_PLANES.get(name, 1)
    stored = size * FORMATS[name].bits // 8

    def one(c: Value, left: Value | None) -> list[Value]:
        at, to = e.at(w, (stored, c)), e.at(out, (2 * planes * TILE, c))
        if left is None:
            for line in range(-(-stored // 64)):
                e.prefetch(b.add(at, e.number(AHEAD + 64 * line)))
        if not integer:
            for p, v in enumerate(_floats(e, name, at, left)):
                e.store(v, b.add(to, e.number(2 * TILE * p)))
            return []
        zero: Value = ir.Constant(I8, 0x88)
        if FORMATS[name].zeros:
            given = b.icmp_signed("!=", z, e.number(0))
            zero = e.when(given, [zero], lambda _: [e.load(b.add(z, c), I8)])[0]
        e.store(_integers(e, name, at, zero, left), to)
        return []

    full, rest = b.sdiv(k, e.number(size)), b.srem(k, e.number(size))
    e.loop(e.number(0), full, [], lambda c, _: one(c, None))
    e.when(b.icmp_signed(">", rest, e.number(0)), [], lambda _: one(full, rest))


def _pack(e: Emitter, args: Any) -> None:
    code, w, w_row, z, z_row, rows, k, out = args
    b = e.b

    def rows_of(name: str) -> None:
        def body(r: Value, _: list[Value]) -> list[Value]:
            to = e.at(out, (TILE, b.lshr(r, e.number(4))), (64, b.and_(r, e.number(15))))
            at_z = b.select(b.icmp_signed("!=", z, e.number(0)), e.at(z, (r, z_row)), z)
            _pack_row(e, name, e.at(w, (r, w_row)), at_z, k, to)
            return []

        e.loop(e.number(0), rows, [], body)

    _cases(e, code, [(names, partial(rows_of, names[0])) for names in _KINDS])


def _pack_scales(e: Emitter, args: Any) -> None:
    code, s, s_row, rows, k, out = args
    b = e.b
    last = b.sub(b.lshr(b.add(k, e.number(31)), e.number(5)), e.number(1))
    whole = b.shl(b.lshr(b.add(k, e.number(63)), e.number(6)), e.number(1))

    def scales_of(kind: str) -> None:
        def one(r: Value, block: Value) -> list[Value]:
            there = b.select(b.icmp_signed("<", block, last), block, last)  # x is zero beyond the last
            e.store(_scale(e, kind, e.at(s, (r, s_row)), there), e.at(out, (128, block), (4, r)))
            return []

        def body(r: Value, _: list[Value]) -> list[Value]:
            return e.loop(e.number(0), whole, [], lambda block, _: one(r, block))

        e.loop(e.number(0), rows, [], body)

    _cases(e, code, [(names, partial(scales_of, kind)) for kind, names in _SCALES.items()])


def _row_floats(e: Emitter, x: Value, left: Value | None) -> list[Value]:
    pair = [_read(e, e.b.add(x, e.number(64 * i)), _WIDE, _rest(e, left, 16 * i)) for i in range(2)]
    return _planes(e, pair, PLANES)


def _row_integers(e: Emitter, x: Value, scales: Value, left: Value | None) -> list[Value]:
    """64 elements as high and low bytes; as in `prepare`."""
    b = e.b
    found = [_read(e, b.add(x, e.number(64 * i)), _WIDE, _rest(e, left, 16 * i)) for i in range(4)]
    halves: list[list[Value]] = [[], []]
    for block in range(2):
        pair = found[2 * block : 2 * block + 2]
        top = e.peak(e.larger(*(e.unary("fabs", v) for v in pair)))
        some = b.fcmp_ordered(">", top, ir.Constant(F32, 1e-30))
        inverse = b.select(some, b.fdiv(ir.Constant(F32, float(LARGEST)), top), ir.Constant(F32, 0.0))
        for v in pair:
            q = b.fptosi(e.unary("rint", b.fmul(v, e.splat(inverse, 16))), _BITS)
            high = b.ashr(b.add(q, e.fill(I32, 16, 128)), e.fill(I32, 16, 8))
            halves[0].append(b.trunc(high, vector(I8, 16)))
            halves[1].append(b.trunc(b.sub(q, b.shl(high, e.fill(I32, 16, 8))), vector(I8, 16)))
        e.store(b.fmul(top, ir.Constant(F32, 1.0 / LARGEST)), b.add(scales, e.number(64 * block)))
    planes = []
    for four in halves:
        two = [e.pick(four[i], range(32), four[i + 1]) for i in (0, 2)]
        planes.append(e.pick(two[0], range(64), two[1]))
    return planes


def _row(e: Emitter, integer: bool, args: Any) -> None:
    x, k, out, scales = args
    b, size = e.b, 64 if integer else 32
    planes = 2 if integer else PLANES

    def one(c: Value, left: Value | None) -> list[Value]:
        at = e.at(x, (4 * size, c))
        found = _row_integers(e, at, e.at(scales, (128, c)), left) if integer else _row_floats(e, at, left)
        for p, v in enumerate(found):
            e.store(v, e.at(out, (planes * TILE, c), (TILE, p)))
        return []

    full, rest = b.sdiv(k, e.number(size)), b.srem(k, e.number(size))
    e.loop(e.number(0), full, [], lambda c, _: one(c, None))
    e.when(b.icmp_signed(">", rest, e.number(0)), [], lambda _: one(full, rest))


def _transposed(e: Emitter, rows: list[Value]) -> list[Value]:
    """16 vectors of 16 lanes: lane i of row j becomes lane j of row i."""
    for step in (1, 2, 4, 8):
        for i in (i for i in range(16) if not i & step):
            a, c = rows[i], rows[i + step]
            low = [n if not n & step else 16 + n - step for n in range(16)]
            high = [n + step if not n & step else 16 + n for n in range(16)]
            rows[i], rows[i + step] = e.pick(a, low, c), e.pick(a, high, c)
    return rows


def _turn(e: Emitter, args: Any) -> None:
    at, tiles = args

    def body(t: Value, _: list[Value]) -> list[Value]:
        places = [e.at(at, (TILE, t), (64, r)) for r in range(16)]
        for place, v in zip(places, _transposed(e, [e.load(p, _BITS) for p in places]), strict=True):
            e.store(v, place)
        return []

    e.loop(e.number(0), tiles, [], body)


def _write(e: Emitter, args: Any) -> None:
    tile, factors, y, y_row, rows, columns, more = args
    b = e.b
    scale, mask = e.load(factors, _WIDE), e.mask(16, columns)
    adds = b.icmp_signed("!=", more, e.number(0))
    sixteen = e.number(16)
    count = b.select(b.icmp_signed("<", rows, sixteen), rows, sixteen)

    def body(r: Value, _: list[Value]) -> list[Value]:
        at = e.at(y, (r, y_row))
        new = b.fmul(e.load(e.at(tile, (64, r)), _WIDE), scale)
        sums = e.when(adds, [new], lambda now: [b.fadd(now[0], e.load_part(at, _WIDE, mask))])
        e.store_part(sums[0], at, mask)
        return []

    e.loop(e.number(0), count, [], body)


def _made(count: int, emit: Callable[[Emitter, Any], None]) -> Any:
    """An intrinsic of `count` int64 arguments."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if THERE:
            emit(Emitter(builder, "avx512vnni" in features()), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), build


@intrinsic
def pack(
    typingctx: Any, code: Any, w: Any, w_row: Any, z: Any, z_row: Any, rows: Any, k: Any, out: Any
) -> Any:
    """Weight rows (at most 32) of a format as tiles. Addresses, steps between rows in bytes; w and z (0:
    none) where the stretch of K begins."""
    return _made(8, _pack)


@intrinsic
def pack_scales(typingctx: Any, code: Any, s: Any, s_row: Any, rows: Any, k: Any, out: Any) -> Any:
    """Their scales, for integer formats, as float32 [blocks, 32]."""
    return _made(6, _pack_scales)


def row(integer: bool) -> Callable[..., None]:
    """An intrinsic for one row of x [K] float32: (x, K, its place in the first tile, its place in the
    scales), addresses."""

    def typed(typingctx: Any, x: Any, k: Any, out: Any, scales: Any) -> Any:
        return _made(4, lambda e, args: _row(e, integer, args))

    made: Callable[..., None] = intrinsic(typed)
    return made


@intrinsic
def turn(typingctx: Any, at: Any, tiles: Any) -> Any:
    """Exchange rows and groups of 4 bytes of tiles in place."""
    return _made(2, _turn)


@intrinsic
def write(
    typingctx: Any, tile: Any, factors: Any, y: Any, y_row: Any, rows: Any, columns: Any, more: Any
) -> Any:
    """y [rows, columns], of both at most 16, rows `y_row` bytes apart, = (more: +=) a turned tile of sums
    times a factor [16] per column."""
    return _made(7, _write)
