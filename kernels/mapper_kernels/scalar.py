"""Scalar functions in float32 that vectorise inside loops, and activation functions by number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mapper_kernels.jit import inline, jit
from mapper_kernels.memory import bits_to_f32

SILU, GELU, GELU_TANH, GELU_QUICK, RELU, RELU_SQUARED, SIGMOID, TANH, IDENTITY = range(9)

_LOG2E: Any = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _HALF, _TWO = np.float32(1.0), np.float32(0.5), np.float32(2.0)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_GELU_A, _GELU_B = np.float32(0.7978845608028654), np.float32(0.044715)
_QUICK = np.float32(1.702)
_SQRT_HALF = np.float32(0.7071067811865476)


@inline
def exp32(x: Any) -> Any:
    """e to the x in float32, relative error below 2e-7; arguments are clamped to -87..88.

    The polynomial is that of the Cephes library's expf.
    """
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.int32(x * _LOG2E + (_HALF if x >= 0 else -_HALF))
    whole = np.float32(n)
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    return (p * r * r + r + _ONE) * bits_to_f32(np.int32((n + np.int32(127)) << np.int32(23)))


@inline
def sigmoid32(x: Any) -> Any:
    """1 / (1 + e^-x) in float32."""
    return _ONE / (_ONE + exp32(-x))


@inline
def tanh32(x: Any) -> Any:
    """Hyperbolic tangent in float32, absolute error below 3e-7."""
    return _ONE - _TWO / (_ONE + exp32(_TWO * x))


@jit
def activate(kind: int, x: Any) -> Any:
    """Activation number `kind` of a float32."""
    if kind == SILU:
        return x * sigmoid32(x)
    if kind == GELU:
        return _HALF * x * (_ONE + np.float32(math.erf(x * _SQRT_HALF)))
    if kind == GELU_TANH:
        return _HALF * x * (_ONE + tanh32(_GELU_A * (x + _GELU_B * x * x * x)))
    if kind == GELU_QUICK:
        return x * sigmoid32(_QUICK * x)
    if kind == RELU:
        return max(x, np.float32(0.0))
    if kind == RELU_SQUARED:
        return max(x, np.float32(0.0)) * max(x, np.float32(0.0))
    if kind == SIGMOID:
        return sigmoid32(x)
    if kind == TANH:
        return tanh32(x)
    return x
