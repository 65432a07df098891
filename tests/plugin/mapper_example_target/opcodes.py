"""What each opcode computes: NumPy in float32, shapes in the immediates, operands as the bytes they are.

An opcode is a function (arguments, operands) -> result. Arguments are integers; real numbers travel as the
bit pattern of a float64. `SIZES` has the bytes of each operand and of the result, for the check OperandsFit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Args = Sequence[int]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "tanh", "sigmoid")


def bits(value: float) -> int:
    """A real number as an integer argument."""
    return int(np.float64(value).view(np.int64))


def real(argument: int) -> np.float32:
    """The real number of an integer argument."""
    return np.float32(np.int64(argument).view(np.float64))


def _f32(raw: Bytes, *shape: int) -> F32:
    return np.asarray(raw.view(np.float32).reshape(shape))


def _i64(raw: Bytes) -> npt.NDArray[np.int64]:
    return raw.view(np.int64)


def embed(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [tokens, width, rows]; ids, table."""
    return _f32(r[1], a[2], a[1])[_i64(r[0])]


def embed_at(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [batch, tokens, width, rows, offset]; position, table."""
    first = int(_i64(r[0])[0]) + a[4]
    return np.broadcast_to(_f32(r[1], a[3], a[2])[first : first + a[1]], (a[0], a[1], a[2]))


def norm(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [rows, width, layer?, eps, weight offset, bias?]; x, weight, bias."""
    x = _f32(r[0], a[0], a[1])
    if a[2]:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + real(a[3]))
    y = y * (_f32(r[1], a[1]) + real(a[4]))
    return np.asarray(y + _f32(r[2], a[1]) if a[5] else y)


def linear(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [rows, inputs, outputs, transposed?, bias?]; x, weight, bias."""
    weight = _f32(r[1], a[2], a[1]).T if a[3] else _f32(r[1], a[1], a[2])
    y = _f32(r[0], a[0], a[1]) @ weight
    return np.asarray(y + _f32(r[2], a[2]) if a[4] else y)


def _erf(x: F32) -> F32:
    return np.vectorize(math.erf, otypes=[np.float32])(x) if x.size else x


def activation(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [elements, kind]; x."""
    x = _f32(r[0], a[0])
    with np.errstate(over="ignore"):
        match ACTIVATIONS[a[1]]:
            case "silu":
                return np.asarray(x / (1 + np.exp(-x)))
            case "gelu":
                return np.asarray(x / 2 * (1 + _erf(x / np.float32(math.sqrt(2)))))
            case "gelu_tanh":
                inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
                return np.asarray(x / 2 * (1 + np.tanh(inner)))
            case "gelu_quick":
                return np.asarray(x / (1 + np.exp(np.float32(-1.702) * x)))
            case "relu":
                return np.maximum(x, 0)
            case "tanh":
                return np.tanh(x)
        return np.asarray(1 / (1 + np.exp(-x)))


def _pair(a: Args, r: Sequence[Bytes]) -> tuple[F32, F32]:
    rank = a[0]
    return _f32(r[0], *a[1 + rank : 1 + 2 * rank]), _f32(r[1], *a[1 + 2 * rank :])


def add(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [rank, shape of the result, of x, of y]; x, y."""
    return np.add(*_pair(a, r))


def mul(a: Args, r: Sequence[Bytes]) -> F32:
    """As `add`."""
    return np.multiply(*_pair(a, r))


def sub(a: Args, r: Sequence[Bytes]) -> F32:
    """As `add`."""
    return np.subtract(*_pair(a, r))


def transpose(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [rank, shape, permutation]; x."""
    rank = a[0]
    return np.transpose(_f32(r[0], *a[1 : 1 + rank]), a[1 + rank :])


def cut(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [rank, shape, begins, ends]; x."""
    rank = a[0]
    x = _f32(r[0], *a[1 : 1 + rank])
    return x[tuple(slice(b, e) for b, e in zip(a[1 + rank : 1 + 2 * rank], a[1 + 2 * rank :], strict=True))]


def rope_at(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [batch, heads, tokens, width, turned, interleaved?, rows]; x, past, table [2, rows, turned/2]."""
    x, first = _f32(r[0], *a[:4]), int(_i64(r[1])[0])
    cos, sin = _f32(r[2], 2, a[6], a[4] // 2)[:, first : first + a[2]]
    out = x.copy()
    one = slice(0, a[4], 2) if a[5] else slice(0, a[4] // 2)
    two = slice(1, a[4], 2) if a[5] else slice(a[4] // 2, a[4])
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out


def cache_append(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [batch, heads, tokens, width, rows]; cache, new, position."""
    cache = _f32(r[0], a[0], a[1], a[4], a[3]).copy()
    first = int(_i64(r[2])[0])
    cache[:, :, first : first + a[2]] = _f32(r[1], *a[:4])
    return cache


def cached_attention(a: Args, r: Sequence[Bytes]) -> F32:
    """a = [batch, heads, kv heads, tokens, width, value width, rows, scale, window, cap]; q, k, v, past."""
    b, h, kv, s, d, dv, rows = a[:7]
    q = _f32(r[0], b, kv, h // kv, s, d)
    k, v = _f32(r[1], b, kv, 1, rows, d), _f32(r[2], b, kv, 1, rows, dv)
    scores = (q @ np.swapaxes(k, -1, -2)) * real(a[7])
    if real(a[9]):
        scores = np.tanh(scores / real(a[9])) * real(a[9])
    query = int(_i64(r[3])[0]) + np.arange(s)[:, None]
    seen = np.arange(rows) <= query
    if a[8]:
        seen &= np.arange(rows) > query - a[8]
    scores = np.where(seen, scores, np.float32(-np.inf))
    share = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray((share / share.sum(-1, keepdims=True)) @ v).reshape(b, h, s, dv)


OPCODES: dict[str, Callable[[Args, Sequence[Bytes]], Any]] = {
    f.__name__: f
    for f in (
        *(embed, embed_at, norm, linear, activation, add, mul, sub, transpose, cut),
        *(rope_at, cache_append, cached_attention),
    )
}


def _elementwise(a: Args) -> list[int]:
    rank = a[0]
    return [4 * math.prod(a[1 + rank * k : 1 + rank * (k + 1)]) for k in (1, 2, 0)]


def _cut(a: Args) -> list[int]:
    n = a[0]
    kept = math.prod(e - b for b, e in zip(a[1 + n : 1 + 2 * n], a[1 + 2 * n : 1 + 3 * n], strict=True))
    return [4 * math.prod(a[1 : 1 + n]), 4 * kept]


SIZES: dict[str, Callable[[Args], list[int]]] = {
    "embed": lambda a: [8 * a[0], 4 * a[1] * a[2], 4 * a[0] * a[1]],
    "embed_at": lambda a: [8, 4 * a[2] * a[3], 4 * a[0] * a[1] * a[2]],
    "norm": lambda a: [4 * a[0] * a[1], 4 * a[1], *[4 * a[1]] * a[5], 4 * a[0] * a[1]],
    "linear": lambda a: [4 * a[0] * a[1], 4 * a[1] * a[2], *[4 * a[2]] * a[4], 4 * a[0] * a[2]],
    "activation": lambda a: [4 * a[0], 4 * a[0]],
    "add": _elementwise,
    "mul": _elementwise,
    "sub": _elementwise,
    "transpose": lambda a: [4 * math.prod(a[1 : 1 + a[0]])] * 2,
    "cut": _cut,
    "rope_at": lambda a: [4 * math.prod(a[:4]), 8, 4 * a[6] * a[4], 4 * math.prod(a[:4])],
    "cache_append": lambda a: [
        4 * a[0] * a[1] * a[4] * a[3],
        4 * math.prod(a[:4]),
        8,
        4 * a[0] * a[1] * a[4] * a[3],
    ],
    "cached_attention": lambda a: [
        *(4 * a[0] * a[1] * a[3] * a[4], 4 * a[0] * a[2] * a[6] * a[4], 4 * a[0] * a[2] * a[6] * a[5], 8),
        4 * a[0] * a[1] * a[3] * a[5],
    ],
}
"""Opcode -> bytes of each operand, then of the result."""
