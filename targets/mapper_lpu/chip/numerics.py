"""Exact arithmetic of the chip, compiled: fp16 as bits, casts, functions rounded once, and dot products.

Lane registers are uint32 arrays: the low bytes of a lane hold the value's bits, whatever its type.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_kernels.jit import jit
from mapper_lpu.chip.codes import (
    ADD,
    COPY,
    EXP2,
    F16,
    F32,
    I8,
    I16,
    I32,
    IADD,
    LANES,
    MAX,
    MIN,
    MUL,
    NEG,
    RELU,
    RSQRT,
    SUB,
)

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
F32s = npt.NDArray[np.float32]
F64s = npt.NDArray[np.float64]

_WIDTH = 16
PARTIALS = 4 * _WIDTH


TANH_IN, TANH_OUT = 6.0 / 32767.0, 32767.0
"""tanh takes int16 in units of 6/32767 and returns int16 in units of 1/32767."""


@jit
def widen(half: Any) -> np.float32:
    """The float32 equal to the fp16 number with bits `half` (exact; NaN stays NaN)."""
    shifted = np.uint32((half & 0x7FFF) << 13)
    exponent = np.uint32(shifted & 0x0F800000)
    subnormal = np.uint32(shifted + 0x38800000).view(np.float32) - np.float32(6.103515625e-05)
    bits = np.uint32(shifted + (0x70000000 if exponent == 0x0F800000 else 0x38000000))
    bits = np.float32(subnormal).view(np.uint32) if exponent == 0 else bits
    return np.uint32(bits | ((half & 0x8000) << 16)).view(np.float32)


@jit
def narrow(single: Any) -> np.uint32:
    """Bits of the fp16 number nearest to the float32 with bits `single`; ties to even, overflow to inf."""
    magnitude = np.uint32(single & 0x7FFFFFFF)
    odd = np.uint32((magnitude >> 13) & 1)
    normal = np.uint32(np.uint32(magnitude - 0x37FFF001 + odd) >> 13)
    # adding 1/2 makes the FPU round at the last place of an fp16 subnormal, 2**-24
    rounded = np.uint32(magnitude).view(np.float32) + np.float32(0.5)
    subnormal = np.uint32(np.float32(rounded).view(np.uint32) - 0x3F000000)
    bits = subnormal if magnitude < 0x38800000 else normal
    bits = np.uint32(0x7C00) if magnitude >= 0x477FF000 else bits
    bits = np.uint32(0x7E00 | ((magnitude >> 13) & 0x1FF)) if magnitude > 0x7F800000 else bits
    return np.uint32(bits | ((single >> 16) & 0x8000))


@jit
def saturate(value: Any, low: int, high: int) -> int:
    """The integer nearest to the float `value`, ties to even, within low..high; NaN gives 0."""
    if value != value:
        return 0
    if value <= low:
        return low
    if value >= high:
        return high
    return int(np.rint(value))


@jit
def _load(bits: Any, kind: int) -> float:
    """The number with these bits as a float64 (every type's values are float64 numbers)."""
    if kind == I8:
        return float(np.int8(bits & 0xFF))
    if kind == I16:
        return float(np.int16(bits & 0xFFFF))
    if kind == I32:
        return float(np.int32(bits))
    if kind == F16:
        return float(widen(bits))
    return float(np.uint32(bits).view(np.float32))


@jit
def cast_lanes(source: U32, target: U32, kind: int, to: int) -> None:
    """Convert lanes of type `kind` to type `to`: to nearest even; to integers saturating."""
    if kind == F32 and to == F16:
        for i in range(LANES):
            target[i] = narrow(source[i])
    elif kind == F16 and to == F32:
        for i in range(LANES):
            target[i] = np.float32(widen(source[i])).view(np.uint32)
    else:
        for i in range(LANES):
            value = _load(source[i], kind)
            if to == F32:
                target[i] = np.float32(value).view(np.uint32)
            elif to == F16:
                target[i] = narrow(np.float32(value).view(np.uint32))
            else:
                top = 127 if to == I8 else 32767 if to == I16 else 2147483647
                target[i] = np.uint32(saturate(value, -top - 1, top))


@jit
def inverse_root(value: Any) -> np.float32:
    """1 / sqrt(value) of a float32, computed in float64 and rounded to float32 at the end."""
    if value == 0:
        return np.float32(math.copysign(math.inf, value))
    return np.float32(1.0 / math.sqrt(np.float64(value))) if value > 0 else np.float32(math.nan)


@jit
def power_of_two(value: Any) -> np.float32:
    """2 ** value of a float32, computed in float64 and rounded to float32 at the end."""
    return np.float32(np.exp2(np.float64(value)))


@jit
def binary_lanes(operation: int, left: U32, right: U32, target: U32) -> None:
    """Lane by lane: float32 add, sub, mul, max, min (NaN if either is NaN), or wrapping int32 add."""
    a, b, out = left.view(np.float32), right.view(np.float32), target.view(np.float32)
    if operation == ADD:
        for i in range(LANES):
            out[i] = a[i] + b[i]
    elif operation == SUB:
        for i in range(LANES):
            out[i] = a[i] - b[i]
    elif operation == MUL:
        for i in range(LANES):
            out[i] = a[i] * b[i]
    elif operation == MAX:
        for i in range(LANES):
            out[i] = a[i] if a[i] >= b[i] or a[i] != a[i] else b[i]
    elif operation == MIN:
        for i in range(LANES):
            out[i] = a[i] if a[i] <= b[i] or a[i] != a[i] else b[i]
    elif operation == IADD:
        for i in range(LANES):
            target[i] = np.uint32(left[i] + right[i])


@jit
def unary_lanes(operation: int, source: U32, target: U32) -> None:
    """Lane by lane on float32: neg, copy, relu (NaN stays NaN), exp2, rsqrt; on int16: tanh."""
    a, out = source.view(np.float32), target.view(np.float32)
    if operation == NEG:
        for i in range(LANES):
            target[i] = source[i] ^ np.uint32(0x80000000)
    elif operation == COPY:
        for i in range(LANES):
            target[i] = source[i]
    elif operation == RELU:
        for i in range(LANES):
            out[i] = np.float32(0) if a[i] <= 0 else a[i]
    elif operation == EXP2:
        for i in range(LANES):
            out[i] = power_of_two(a[i])
    elif operation == RSQRT:
        for i in range(LANES):
            out[i] = inverse_root(a[i])
    else:
        for i in range(LANES):
            whole = np.float64(np.int16(source[i] & np.uint32(0xFFFF)))
            target[i] = np.uint32(np.int64(np.rint(TANH_OUT * math.tanh(whole * TANH_IN))) & 0xFFFF)


@jit
def split_halves(low: U8, high: U8, lower: F32s, upper: F32s) -> None:
    """Weights of an fp16 pair: `upper` = the number whose low byte is zeroed, `lower` = the rest (exact).

    low, high: the bytes of 320 x 320 fp16 numbers; lower, upper: float32 of the same shape.
    """
    for n in range(LANES):
        for k in range(LANES):
            top = np.uint32(high[n, k]) << 8
            upper[n, k] = widen(top)
            lower[n, k] = widen(top | low[n, k]) - upper[n, k]


@jit
def signed_bytes(source: U8, target: F32s) -> None:
    """The bytes of 320 x 320 int8 weights as float32 (exact)."""
    for n in range(LANES):
        for k in range(LANES):
            target[n, k] = np.float32(np.int8(source[n, k]))


@jit
def dot_rows(weights: F32s, vector: F64s, partial: F64s, result: F64s) -> None:
    """result[n] = sum over k of vector[k] weights[n, k], in float64. `partial`: scratch, PARTIALS numbers.

    Products of fp16 or int8 numbers are exact. For every row, lanes k, k + 16, ... are summed first, then the
    16 partial sums in order: the same on every processor. Four rows at once share the loads of the vector.
    """
    for n in range(0, LANES, 4):
        for j in range(4 * _WIDTH):
            partial[j] = 0.0
        for i in range(0, LANES, _WIDTH):
            for j in range(_WIDTH):
                a = vector[i + j]
                partial[j] += a * np.float64(weights[n, i + j])
                partial[_WIDTH + j] += a * np.float64(weights[n + 1, i + j])
                partial[2 * _WIDTH + j] += a * np.float64(weights[n + 2, i + j])
                partial[3 * _WIDTH + j] += a * np.float64(weights[n + 3, i + j])
        for row in range(4):
            total = 0.0
            for j in range(_WIDTH):
                total += partial[row * _WIDTH + j]
            result[n + row] = total
