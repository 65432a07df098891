"""Elementwise operations over strided N-dimensional arrays of any element type, by operation number.

Floating-point elements are computed in float64 and rounded once; integers in int64. Sums, differences,
products and quotients of float32 rows have vector paths of their own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mapper_kernels.jit import fast, jit
from mapper_kernels.memory import F32, FLOATS, f32, load_f, load_i, store_f, store_i
from mapper_kernels.split import share

(
    NEG, ABS, EXP, LOG, SQRT, RSQRT, RECIPROCAL, SIN, COS, TAN, ATAN, TANH, ERF, SIGMOID,
    SOFTPLUS, RELU, FLOOR, CEIL, ROUND, SIGN, NOT, ISNAN, ISINF, ADD, SUB, MUL, DIV, POW,
    MIN, MAX, AND, OR, XOR, EQ, NE, LT, LE, GT, GE, MOD, FMOD, CAST, SELECT,
) = range(43)  # fmt: skip
# typed numbers: a literal argument would compile the callee once more for that literal
_NONE: Any = np.int64(0)
_ONE: Any = np.int64(1)


@jit
def _unary_f(op: int, x: float) -> Any:
    if op == NEG:
        return -x
    if op == ABS:
        return abs(x)
    if op == EXP:
        return math.exp(x)
    if op == LOG:
        return np.log(x)
    if op == SQRT:
        return np.sqrt(x)
    if op == RSQRT:
        return np.divide(1.0, np.sqrt(x))
    if op == RECIPROCAL:
        return np.divide(1.0, x)
    if op == SIN:
        return math.sin(x)
    if op == COS:
        return math.cos(x)
    if op == TAN:
        return math.tan(x)
    if op == ATAN:
        return math.atan(x)
    if op == TANH:
        return math.tanh(x)
    if op == ERF:
        return math.erf(x)
    return _unary_f_more(op, x)


@jit
def _unary_f_more(op: int, x: float) -> Any:
    if op == SIGMOID:
        return 1.0 / (1.0 + math.exp(-x))
    if op == SOFTPLUS:
        return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))
    if op == RELU:
        return 0.0 if x < 0.0 else x
    if op == FLOOR:
        return np.floor(x)
    if op == CEIL:
        return np.ceil(x)
    if op == ROUND:
        return np.rint(x)
    if op == SIGN:
        return np.sign(x)
    if op == NOT:
        return np.float64(x == 0.0)
    if op == ISNAN:
        return np.float64(np.isnan(x))
    if op == ISINF:
        return np.float64(np.isinf(x))
    return x


@jit
def _unary_i(op: int, x: int) -> Any:
    if op == NEG:
        return -x
    if op == ABS:
        return abs(x)
    if op == RELU:
        return max(x, 0)
    if op == SIGN:
        return np.int64(x > 0) - np.int64(x < 0)
    if op == NOT:
        return np.int64(x == 0)
    if ISNAN <= op <= ISINF:
        return 0
    return x


@jit
def _binary_f(op: int, a: float, b: float) -> Any:
    if op == ADD:
        return a + b
    if op == SUB:
        return a - b
    if op == MUL:
        return a * b
    if op == DIV:
        return np.divide(a, b)
    if op == POW:
        return np.power(a, b)
    if op == MIN:
        return np.minimum(a, b)
    if op == MAX:
        return np.maximum(a, b)
    if op == MOD:
        return np.mod(a, b)
    if op == FMOD:
        return np.fmod(a, b)
    return np.float64(_compare_f(op, a, b))


@jit
def _compare_f(op: int, a: float, b: float) -> bool:
    if op == EQ:
        return a == b
    if op == NE:
        return a != b
    if op == LT:
        return a < b
    if op == LE:
        return a <= b
    if op == GT:
        return a > b
    return a >= b


@jit
def _binary_i(op: int, a: int, b: int) -> Any:
    if op == ADD:
        return a + b
    if op == SUB:
        return a - b
    if op == MUL:
        return a * b
    if op == DIV:
        return _truncated(a, b)
    if op == POW:
        return _power(a, b)
    if op == MIN:
        return min(a, b)
    if op == MAX:
        return max(a, b)
    if op == AND:
        return a & b
    if op == OR:
        return a | b
    if op == XOR:
        return a ^ b
    if op == MOD:
        return 0 if b == 0 else a - a // b * b
    if op == FMOD:
        return 0 if b == 0 else a - _truncated(a, b) * b
    return np.int64(_compare_i(op, a, b))


@jit
def _truncated(a: int, b: int) -> Any:
    if b == 0:
        return 0
    size = abs(a) // abs(b)
    return size if (a < 0) == (b < 0) else -size


@jit
def _power(a: int, b: int) -> Any:
    if b < 0:
        return np.int64(np.float64(a) ** np.float64(b))
    result = np.int64(1)
    for _ in range(b):
        result *= a
    return result


@jit
def _compare_i(op: int, a: int, b: int) -> bool:
    if op == EQ:
        return a == b
    if op == NE:
        return a != b
    if op == LT:
        return a < b
    if op == LE:
        return a <= b
    if op == GT:
        return a > b
    return a >= b


@fast
def _vectors(op: int, a: Any, b: Any, y: Any, low: int, high: int) -> None:
    if op == 0:
        for i in range(low, high):
            y[i] = a[i] + b[i]
    elif op == 1:
        for i in range(low, high):
            y[i] = a[i] - b[i]
    elif op == 2:
        for i in range(low, high):
            y[i] = a[i] * b[i]
    else:
        for i in range(low, high):
            y[i] = a[i] / b[i]


@fast
def _vector_scalar(op: int, a: Any, b: Any, y: Any, low: int, high: int) -> None:
    if op == 0:
        for i in range(low, high):
            y[i] = a[i] + b
    elif op == 1:
        for i in range(low, high):
            y[i] = a[i] - b
    elif op == 2:
        for i in range(low, high):
            y[i] = a[i] * b
    else:
        for i in range(low, high):
            y[i] = a[i] / b


@jit
def vector(op: int, a: int, b: int, y: int, n: int, scalar: bool, part: int, parts: int) -> None:
    """y = a op b on n float32 at addresses a, b, y (b one number where `scalar`): 0 add, 1 subtract, 2
    multiply, 3 divide; y may be a or b. Shares elements."""
    low, high = share(n, 64, part, parts)
    if scalar:
        _vector_scalar(op, f32(a, n), f32(b, 1)[0], f32(y, n), low, high)
    else:
        _vectors(op, f32(a, n), f32(b, n), f32(y, n), low, high)


@jit
def _element(op: int, inputs: int, codes: Any, at: Any, i: Any, out: int, out_code: int, to: int) -> None:
    """One element: operand j is element i[j] at address at[j]."""
    if op == SELECT:
        chosen = 1 if load_i(at[0], codes[0], i[0]) != 0 else 2
        _element_unary(CAST, codes[chosen], at[chosen], i[chosen], out, out_code, to)
    elif inputs == 1:
        _element_unary(op, codes[0], at[0], i[0], out, out_code, to)
    elif codes[0] < FLOATS or codes[1] < FLOATS:
        store_f(
            out, out_code, to, _binary_f(op, load_f(at[0], codes[0], i[0]), load_f(at[1], codes[1], i[1]))
        )
    else:
        value = _binary_i(op, load_i(at[0], codes[0], i[0]), load_i(at[1], codes[1], i[1]))
        store_i(out, out_code, to, value)


@jit
def _element_unary(op: int, code: int, at: int, i: int, out: int, out_code: int, to: int) -> None:
    if code < FLOATS:
        store_f(out, out_code, to, _unary_f(op, load_f(at, code, i)))
        return
    value = load_i(at, code, i)
    if out_code < FLOATS:
        store_f(out, out_code, to, _unary_f(op, np.float64(value)))
    else:
        store_i(out, out_code, to, _unary_i(op, value))


@jit
def elementwise(
    op: int, inputs: int, codes: Any, at: Any, shape: Any, strides: Any, out: int, part: int, parts: int
) -> None:
    """out = op(operands) over `shape` (at least one dimension; `out` is contiguous).

    codes [4]: element types of up to three operands, last that of the result; at[inputs]: addresses; strides
    [inputs, ndim] in elements, 0 along broadcast dimensions. Shares rows of the last dimension, or that
    dimension where there is one row.
    """
    ndim = shape.shape[0]
    inner = shape[ndim - 1]
    rows = 1
    for d in range(ndim - 1):
        rows *= shape[d]
    low, high = share(rows, 1, part, parts) if rows > 1 else (0, rows)
    begin, end = share(inner, 64, part, parts) if rows == 1 else (0, inner)
    index = np.zeros(3, np.int64)
    for row in range(low, high):
        for j in range(inputs):
            rest = row
            offset = 0
            for d in range(ndim - 2, -1, -1):
                offset += rest % shape[d] * strides[j, d]
                rest //= shape[d]
            index[j] = offset + begin * strides[j, ndim - 1]
        _row(op, inputs, codes, at, strides, ndim - 1, index, out, row * inner + begin, end - begin)


@jit
def _row(
    op: int, inputs: int, codes: Any, at: Any, strides: Any, last: int, index: Any, out: int, to: int, n: int
) -> None:
    if inputs == 2 and ADD <= op <= DIV and codes[0] == F32 and codes[1] == F32:
        sa, sb = strides[0, last], strides[1, last]
        if sa == 1 and sb <= 1:
            vector(
                op - ADD, at[0] + 4 * index[0], at[1] + 4 * index[1], out + 4 * to, n, sb == 0, _NONE, _ONE
            )
            return
    for i in range(n):
        _element(op, inputs, codes, at, index, out, codes[3], to + i)
        for j in range(inputs):
            index[j] += strides[j, last]


@jit
def trilu(x: Any, y: Any, upper: bool, k: int) -> None:
    """y = triangle of the last two dimensions of x [B, M, N] (any item view): column - row >= k, or <= k if
    lower."""
    for b in range(x.shape[0]):
        for r in range(x.shape[1]):
            for c in range(x.shape[2]):
                keep = c - r >= k if upper else c - r <= k
                y[b, r, c] = x[b, r, c] if keep else 0


@jit
def round_blocks(x: Any, y: Any, block: int) -> None:
    """y [K] = x [K] in whole multiples of 1/127 of the largest magnitude of each run of `block`; float32."""
    for first in range(0, x.shape[0], block):
        last = min(first + block, x.shape[0])
        top = np.float32(0)
        for i in range(first, last):
            top = max(top, abs(x[i]))
        scale = top / np.float32(127)
        for i in range(first, last):
            y[i] = np.rint(x[i] / scale) * scale if scale > 0 else np.float32(0)
