"""Products of tiles with AMX: y^T = W x^T for 32 weight rows and 32 rows of x at a time.

Both operands lie in tiles of 1 KiB (see `tiles`): weights as 16 rows of 64 bytes, x as 16 groups of 4 bytes
of 16 rows. Floating-point formats are sums of bfloat16 planes, 8 bits of the significand each: three of x,
and one (bf16, fp8), two (f16) or three (f32) of the weights. Of the products of planes those whose factors
are at least 2^-16 together are taken: what is left out is below 2^-26 of the product of the magnitudes, less
than the rounding of one float32 product. Values and products below 2^-108 lose their last planes, because AMX
takes subnormal numbers as zero; infinite x gives NaN where weights are in several planes, some of which are
zero.

Integer formats multiply signed bytes of weights with both byte planes of x (256 high + low, as in `dot`): the
sums of a block of 32 are exact in int32, and are scaled and added in float32.

Linux gives a process the tiles only when it asks: `usable` asks once. MAPPER_AMX=0 in the environment turns
them off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mapper_kernels.jit import intrinsic, jit
from mapper_kernels.vec import F32, I8, I32, I64, Emitter, Value, features, vector

THERE = sys.platform == "linux" and features() >= {"amx-tile", "amx-int8", "amx-bf16", "avx512bf16"}
"""Whether this processor has the tiles; whether the process may use them says `usable`."""
TILE = 1024
"""Bytes of a tile: 16 rows of 64."""
PLANES = 3
"""Planes of x for floating-point weights."""
_ARCH_PRCTL, _REQUEST, _TILES = (
    158,
    0x1023,
    18,
)  # asm/unistd_64.h, asm/prctl.h: ARCH_REQ_XCOMP_PERM, XTILEDATA
_PAIRS = {1: ((0, 2), (0, 1), (0, 0)), 2: ((0, 2), (0, 1), (1, 1), (1, 0), (0, 0))}
_PAIRS[3] = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))
"""Planes of (weights, x) whose products are taken, by planes of the weights; neighbours share a plane."""


def _constant(e: Emitter, name: str, data: bytes) -> Value:
    kind = ir.ArrayType(I8, len(data))
    made: Any = ir.GlobalVariable(e.b.module, kind, e.b.module.get_unique_name(name))
    made.linkage, made.global_constant, made.align = "internal", True, 64
    made.initializer = ir.Constant(kind, bytearray(data))
    return e.b.bitcast(made, I8.as_pointer())


def _shape(e: Emitter, wide: bool) -> None:
    """Load the tile configuration: tiles 0..3 sums, 4 and 5 weights, 6 and 7 x; `wide`: 64 bytes of K, else
    32. Layout: Intel SDM, LDTILECFG."""
    rows = [16] * 6 + [16 if wide else 8] * 2
    columns = [64] * 4 + [64 if wide else 32] * 2 + [64] * 2
    data = bytearray(64)
    data[0] = 1
    for i in range(8):
        data[16 + 2 * i], data[48 + i] = columns[i], rows[i]
    e.call("llvm.x86.ldtilecfg", ir.VoidType(), _constant(e, "tiles", bytes(data)))


def _n(tile: int) -> Value:
    return ir.Constant(I8, tile)


def _load(e: Emitter, tile: int, at: Value) -> None:
    pointer = e.b.inttoptr(at, I8.as_pointer())
    e.call("llvm.x86.tileloadd64", ir.VoidType(), _n(tile), pointer, e.number(64))


def _store(e: Emitter, tile: int, at: Value) -> None:
    pointer = e.b.inttoptr(at, I8.as_pointer())
    e.call("llvm.x86.tilestored64", ir.VoidType(), _n(tile), pointer, e.number(64))


def _zero(e: Emitter, tiles: Sequence[int]) -> None:
    for tile in tiles:
        e.call("llvm.x86.tilezero", ir.VoidType(), _n(tile))


def _floats(e: Emitter, planes: int, args: Any) -> None:
    w, x, x_step, chunks, out = args
    _shape(e, True)
    _zero(e, range(4))

    def body(c: Value, _: list[Value]) -> list[Value]:
        held = [-1, -1]
        for pair in _PAIRS[planes]:
            for side, plane in enumerate(pair):
                if held[side] == plane:
                    continue
                held[side] = plane
                for i in range(2):
                    if side == 0:
                        at = e.at(w, (2 * planes * TILE, c), (TILE, 2 * plane + i))
                    else:
                        at = e.at(x, (PLANES * TILE, c), (i, x_step), (TILE, plane))
                    _load(e, 4 + 2 * side + i, at)
            for i in range(4):
                found = _n(i), _n(4 + i // 2), _n(6 + i % 2)
                e.call("llvm.x86.tdpbf16ps", ir.VoidType(), *found)
        return []

    e.loop(e.number(0), chunks, [], body)
    for i in range(4):
        _store(e, i, e.b.add(out, e.number(TILE * i)))
    e.call("llvm.x86.tilerelease", ir.VoidType())


def _integers(e: Emitter, args: Any) -> None:
    """One tile of weights (every other of `w`), one of x."""
    w, ws, x, xs, chunks, out, space = args
    b = e.b
    _shape(e, False)
    kind = vector(F32, 16)

    def body(c: Value, sums: list[Value]) -> list[Value]:
        for block in range(2):
            at = e.at(w, (2 * TILE, c), (32, block))
            _load(e, 4, at)
            for plane in range(2):
                _load(e, 6 + plane, e.at(x, (2 * TILE, c), (TILE, plane), (TILE // 2, block)))
            first = 2 * block
            _zero(e, (first, first + 1))
            for plane in range(2):
                e.call("llvm.x86.tdpbssd", ir.VoidType(), _n(first + plane), _n(4), _n(6 + plane))
            for plane in range(2):
                _store(e, first + plane, e.b.add(space, e.number(TILE * (first + plane))))
        for block in range(2):
            from_x = e.load(e.at(xs, (128, c), (64, block)), kind)
            for r in range(16):
                high, low = (
                    e.load(b.add(space, e.number(TILE * (2 * block + p) + 64 * r)), vector(I32, 16))
                    for p in range(2)
                )
                whole = b.sitofp(b.add(b.shl(high, e.fill(I32, 16, 8)), low), kind)
                scale = e.splat(e.load(e.at(ws, (256, c), (128, block), (4, r)), F32), 16)
                sums[r] = e.fma(b.fmul(whole, from_x), scale, sums[r])
        return sums

    sums = e.loop(e.number(0), chunks, [e.fill(F32, 16, 0.0)] * 16, body)
    for r, v in enumerate(sums):
        e.store(v, b.add(out, e.number(64 * r)))
    e.call("llvm.x86.tilerelease", ir.VoidType())


def _ask(e: Emitter) -> Value:
    """1 where the environment does not forbid the tiles and the system grants them, else 2."""
    b = e.b
    tools: Any = cgutils
    declare = tools.get_or_insert_function
    find = declare(b.module, ir.FunctionType(I8.as_pointer(), [I8.as_pointer()]), "getenv")
    value = b.call(find, [_constant(e, "name", b"MAPPER_AMX\0")])
    state = tools.alloca_once_value(b, ir.Constant(I32, 2))
    given = b.icmp_unsigned("!=", b.ptrtoint(value, I64), e.number(0))
    first = b.load(b.select(given, value, _constant(e, "one", b"1")))
    with b.if_then(b.icmp_unsigned("!=", first, ir.Constant(I8, ord("0")))):
        call = declare(b.module, ir.FunctionType(I64, [I64] * 3), "syscall")
        failed = b.call(call, [e.number(n) for n in (_ARCH_PRCTL, _REQUEST, _TILES)])
        granted = b.icmp_signed("==", failed, e.number(0))
        b.store(b.select(granted, ir.Constant(I32, 1), ir.Constant(I32, 2)), state)
    return b.load(state)


@intrinsic
def _granted(typingctx: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder, True)
        known: Any = ir.GlobalVariable(builder.module, I32, builder.module.get_unique_name("granted"))
        known.linkage, known.initializer = "internal", ir.Constant(I32, 0)
        with builder.if_then(builder.icmp_signed("==", builder.load(known), ir.Constant(I32, 0))):
            builder.store(_ask(e), known)  # threads may ask at the same time: they get the same answer
        return builder.icmp_signed("==", builder.load(known), ir.Constant(I32, 1))

    return types.boolean(), build


if THERE:

    @jit
    def usable() -> bool:
        """Whether this process may use the tiles."""
        found: bool = _granted()
        return found

else:

    @jit
    def usable() -> bool:
        """Whether this process may use the tiles: this processor has none."""
        return False


def floats(planes: int) -> Callable[..., None]:
    """An intrinsic for weights of as many planes: (w, x, step between tiles of x, chunks of 32 elements,
    out). Addresses; out: four tiles float32, of weights and x (0, 0), (0, 1), (1, 0), (1, 1)."""

    def typed(typingctx: Any, w: Any, x: Any, x_step: Any, chunks: Any, out: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if THERE:
                _floats(Emitter(builder, True), planes, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    made: Callable[..., None] = intrinsic(typed)
    return made


@intrinsic
def integers(typingctx: Any, w: Any, ws: Any, x: Any, xs: Any, chunks: Any, out: Any, space: Any) -> Any:
    """For integer weights: weights, their scales, x, its scales, chunks of 64 elements, out (one tile
    float32), four tiles of space. Addresses."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if THERE:
            _integers(Emitter(builder, True), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), build
