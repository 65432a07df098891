"""Memory as compiled code sees it: typed views of raw addresses, element access by type code, atomics, hints.

Element type codes (`CODES`) are dense small integers. Floating-point elements are read and written as float64
values, all others as int64; both conversions are exact for every stored format but uint64 above 2^63.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.numpy_support import carray

from mapper_kernels.jit import inline, intrinsic, jit

F32, F64, F16, BF16, F8E4M3, F8E5M2, I64, I32, I16, I8, U64, U32, U16, U8, BOOL = range(15)
CODES = {
    "f32": F32, "f64": F64, "f16": F16, "bf16": BF16, "f8e4m3": F8E4M3, "f8e5m2": F8E5M2, "i64": I64,
    "i32": I32,
    "i16": I16, "i8": I8, "u64": U64, "u32": U32, "u16": U16, "u8": U8, "bool": BOOL,
}  # fmt: skip
"""Element type name -> code."""
SIZES = (4, 8, 2, 2, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1)
"""Bytes of one element, by code."""
FLOATS = 6
"""Codes below this one are floating-point formats."""


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), build


@intrinsic
def address_of(typingctx: Any, array: Any) -> Any:
    """Address of an array's first element, int64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), build


def _bitcast(source: Any, target: Any, target_ir: Any) -> Any:
    def typed(typingctx: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], target_ir)

        return target(source), build

    return typed


@intrinsic
def bits_to_f32(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are an int32."""
    return _bitcast(types.int32, types.float32, ir.FloatType())(typingctx, bits)


@intrinsic
def f32_to_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32, an int32."""
    return _bitcast(types.float32, types.int32, ir.IntType(32))(typingctx, value)


@intrinsic
def bits_to_f64(typingctx: Any, bits: Any) -> Any:
    """The float64 whose bits are an int64."""
    return _bitcast(types.int64, types.float64, ir.DoubleType())(typingctx, bits)


@intrinsic
def atomic_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value on a 1-d int64 array, sequentially consistent; the value before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), build


@intrinsic
def atomic_max(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = max(array[index], value) on a 1-d int64 array, sequentially consistent; the value
    before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("max", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), build


@intrinsic
def atomic_load(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] of a 1-d int64 array, sequentially consistent."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "seq_cst", 8)

    return types.int64(array, types.int64), build


@inline
def f32(address: int, n: int) -> Any:
    """View of n float32 at an address."""
    return carray(_pointer(address), (n,), np.float32)


@inline
def f32_2d(address: int, n: int, m: int) -> Any:
    """View of n x m float32 at an address, row-major."""
    return carray(_pointer(address), (n, m), np.float32)


@inline
def f32_3d(address: int, a: int, b: int, c: int) -> Any:
    """View of a x b x c float32 at an address, row-major."""
    return carray(_pointer(address), (a, b, c), np.float32)


@inline
def f32_4d(address: int, a: int, b: int, c: int, d: int) -> Any:
    """View of a x b x c x d float32 at an address, row-major."""
    return carray(_pointer(address), (a, b, c, d), np.float32)


@inline
def i64(address: int, n: int) -> Any:
    """View of n int64 at an address."""
    return carray(_pointer(address), (n,), np.int64)


@inline
def u8(address: int, n: int) -> Any:
    """View of n bytes at an address."""
    return carray(_pointer(address), (n,), np.uint8)


@inline
def u16(address: int, n: int) -> Any:
    """View of n 16-bit words at an address."""
    return carray(_pointer(address), (n,), np.uint16)


@inline
def u32(address: int, n: int) -> Any:
    """View of n 32-bit words at an address."""
    return carray(_pointer(address), (n,), np.uint32)


@inline
def u64(address: int, n: int) -> Any:
    """View of n 64-bit words at an address."""
    return carray(_pointer(address), (n,), np.uint64)


@jit
def small_to_f64(bits: Any, exponent_bits: int, mantissa_bits: int, finite: bool) -> Any:
    """The value of a small float's bits: IEEE-like with subnormals; `finite` formats (e4m3fn) have no
    infinity."""
    top = (1 << exponent_bits) - 1
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits >> mantissa_bits) & top
    sign = -1.0 if (bits >> (mantissa_bits + exponent_bits)) & 1 else 1.0
    bias = top >> 1
    full = (1 << mantissa_bits) - 1
    if finite and exponent == top and mantissa == full:
        return np.nan
    if not finite and exponent == top:
        return sign * np.inf if mantissa == 0 else np.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1.0 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@jit
def f64_to_small(value: float, exponent_bits: int, mantissa_bits: int, finite: bool) -> int:
    """The bits of the nearest small float (ties to even). Overflow gives infinity, NaN in `finite`
    formats."""
    top = (1 << exponent_bits) - 1
    bias = top >> 1
    sign = 1 << (exponent_bits + mantissa_bits) if np.signbit(value) else 0
    full = (1 << mantissa_bits) - 1
    nan = (top << mantissa_bits) | (full if finite else (1 << (mantissa_bits - 1)))
    size = abs(value)
    if np.isnan(value):
        return sign | nan
    overflow = sign | (nan if finite else top << mantissa_bits)
    if np.isinf(value):
        return overflow
    if size == 0.0:
        return sign
    exponent = int(np.floor(np.log2(size)))
    if 2.0**exponent > size:
        exponent -= 1
    exponent = max(exponent, 1 - bias)
    units = int(np.rint(size / 2.0 ** (exponent - mantissa_bits)))
    # a carry out of the mantissa moves to the next binade by itself in this sum
    bits = ((exponent + bias - 1) << mantissa_bits) + units
    largest = (top << mantissa_bits) + full - 1 if finite else (top << mantissa_bits) - 1
    return overflow if bits > largest else sign | bits


@jit
def load_f(address: int, code: int, index: int) -> Any:
    """Element `index` of an array of floating-point (or any) type `code`, as float64."""
    if code == F32:
        return np.float64(carray(_pointer(address), (index + 1,), np.float32)[index])
    if code == F64:
        return carray(_pointer(address), (index + 1,), np.float64)[index]
    if code == F16:
        return small_to_f64(np.int64(u16(address, index + 1)[index]), 5, 10, False)
    if code == BF16:
        word = np.int32(np.int64(u16(address, index + 1)[index]) << 16)
        return np.float64(bits_to_f32(word))
    if code == F8E4M3:
        return small_to_f64(np.int64(u8(address, index + 1)[index]), 4, 3, True)
    if code == F8E5M2:
        return small_to_f64(np.int64(u8(address, index + 1)[index]), 5, 2, False)
    return np.float64(load_i(address, code, index))


@jit
def load_i(address: int, code: int, index: int) -> Any:
    """Element `index` of an array of integer or bool type `code`, as int64."""
    if code in (I64, U64):
        return carray(_pointer(address), (index + 1,), np.int64)[index]
    if code == I32:
        return np.int64(carray(_pointer(address), (index + 1,), np.int32)[index])
    if code == I16:
        return np.int64(carray(_pointer(address), (index + 1,), np.int16)[index])
    if code == I8:
        return np.int64(carray(_pointer(address), (index + 1,), np.int8)[index])
    if code == U32:
        return np.int64(u32(address, index + 1)[index])
    if code == U16:
        return np.int64(u16(address, index + 1)[index])
    return np.int64(u8(address, index + 1)[index])


@jit
def store_f(address: int, code: int, index: int, value: float) -> None:
    """Write a float64 as element `index` of type `code`, rounded to nearest even (integers: truncated)."""
    if code == F32:
        carray(_pointer(address), (index + 1,), np.float32)[index] = np.float32(value)
    elif code == F64:
        carray(_pointer(address), (index + 1,), np.float64)[index] = value
    elif code == F16:
        u16(address, index + 1)[index] = np.uint16(f64_to_small(value, 5, 10, False))
    elif code == BF16:
        u16(address, index + 1)[index] = np.uint16(f64_to_small(value, 8, 7, False))
    elif code == F8E4M3:
        u8(address, index + 1)[index] = np.uint8(f64_to_small(value, 4, 3, True))
    elif code == F8E5M2:
        u8(address, index + 1)[index] = np.uint8(f64_to_small(value, 5, 2, False))
    elif code == BOOL:
        u8(address, index + 1)[index] = np.uint8(value != 0.0)
    else:
        store_i(address, code, index, np.int64(value))


@jit
def store_i(address: int, code: int, index: int, value: Any) -> None:
    """Write an int64 as element `index` of integer or bool type `code`; integers wrap, bool is value != 0."""
    if code in (I64, U64):
        carray(_pointer(address), (index + 1,), np.int64)[index] = value
    elif code in (I32, U32):
        u32(address, index + 1)[index] = np.uint32(value)
    elif code in (I16, U16):
        u16(address, index + 1)[index] = np.uint16(value)
    elif code == BOOL:
        u8(address, index + 1)[index] = np.uint8(value != 0)
    else:
        u8(address, index + 1)[index] = np.uint8(value)
