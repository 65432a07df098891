"""Register tiles: the inner loop of a matrix product as explicit vector code, sums kept in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mapper_kernels.jit import intrinsic

LANES = 8
"""Elements of one vector; the code generator splits or widens them to what the processor has."""
_F32, _I64 = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), mask)


def _emit(builder: Any, rows: int, vectors: int, args: Any) -> None:
    x, x_step, w, w_step, y, y_step, k = args
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    declare: Any = cgutils.get_or_insert_function
    muladd = declare(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")

    def element(address: Any, kind: Any) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

    def times(value: Any, n: int) -> Any:
        return builder.mul(value, ir.Constant(_I64, n))

    before = builder.block
    body = builder.append_basic_block("tile")
    after = builder.append_basic_block("tile.end")
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    empty = builder.icmp_signed("<=", k, ir.Constant(_I64, 0))
    builder.cbranch(empty, after, body)

    builder.position_at_end(body)
    i = builder.phi(_I64)
    i.add_incoming(ir.Constant(_I64, 0), before)
    sums = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(rows)]
    row = builder.add(w, times(builder.mul(i, w_step), 4))
    weights = [element(builder.add(row, ir.Constant(_I64, 4 * LANES * v)), _VECTOR) for v in range(vectors)]
    new = []
    for r in range(rows):
        at = builder.add(builder.mul(ir.Constant(_I64, r), x_step), i)
        factor = _splat(builder, element(builder.add(x, times(at, 4)), _F32))
        new.append([builder.call(muladd, [factor, weights[v], sums[r][v]]) for v in range(vectors)])
    following = builder.add(i, ir.Constant(_I64, 1))
    i.add_incoming(following, body)
    for old_row, new_row in zip(sums, new, strict=True):
        for old, value in zip(old_row, new_row, strict=True):
            old.add_incoming(zero, before)
            old.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, k), body, after)

    builder.position_at_end(after)
    for r in range(rows):
        for v in range(vectors):
            total = builder.phi(_VECTOR)
            total.add_incoming(zero, before)
            total.add_incoming(new[r][v], body)
            new[r][v] = total
    for r in range(rows):
        for v in range(vectors):
            at = builder.add(builder.mul(ir.Constant(_I64, r), y_step), ir.Constant(_I64, LANES * v))
            target = builder.inttoptr(builder.add(y, times(at, 4)), _VECTOR.as_pointer())
            builder.store(new[r][v], target, align=4)


def _tile(rows: int, vectors: int) -> Callable[..., None]:
    @intrinsic
    def tile(typingctx: Any, x: Any, x_step: Any, w: Any, w_step: Any, y: Any, y_step: Any, k: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(builder, rows, vectors, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), build

    made: Callable[..., None] = tile
    return made


tile_4x16 = _tile(4, 2)
"""y [4, 16] = x [4, K] w [K, 16]: addresses of float32 with row steps in elements, then K."""
