"""Reference semantics of the elementwise primitives, matrix product, convolution, reductions, scans and
sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mapper.ir.reference import Step, meaning, result_dtype
from mapper.ir.types import Array

_ERF = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The error function, through the C library's."""
    return np.asarray(_ERF(x.astype(np.float64))).astype(x.dtype)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + small), small / (1 + small)))


def softmax(x: Array, axis: int, extra: Array | None = None) -> Array:
    """exp(x) / sum(exp(x)) along `axis`; `extra` (broadcastable, size 1 on the axis) joins the denominator
    only."""
    top = np.max(x, axis=axis, keepdims=True)
    if extra is not None:
        top = np.maximum(top, extra)
    shifted = np.exp(x - top)
    total = np.sum(shifted, axis=axis, keepdims=True)
    if extra is not None:
        total = total + np.exp(extra - top)
    return np.asarray(shifted / total)


def _divide(a: Array, b: Array) -> Array:
    if not np.issubdtype(a.dtype, np.integer):
        return np.asarray(a / b)
    quotient = a // b
    return np.asarray(quotient + ((a % b != 0) & ((a < 0) != (b < 0))))


def _logical(bitwise: Any) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.asarray(bitwise(a, b))


_UNARY: dict[str, Callable[[Array], Any]] = {
    "neg": np.negative, "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "reciprocal": lambda x: 1 / x,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "atan": np.arctan, "tanh": np.tanh, "erf": erf,
    "sigmoid": sigmoid,
    "softplus": lambda x: np.logaddexp(x, np.zeros_like(x)), "relu": lambda x: np.maximum(x, 0),
    "floor": np.floor, "ceil": np.ceil, "round": np.rint, "sign": np.sign,
    "not": np.logical_not, "isnan": np.isnan, "isinf": np.isinf,
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "pow": np.power,
    "min": np.minimum, "max": np.maximum, "and": _logical(np.bitwise_and), "or": _logical(np.bitwise_or),
    "xor": _logical(np.bitwise_xor), "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "matmul": np.matmul,
}  # fmt: skip


@meaning(*_UNARY)
def _unary(s: Step) -> Array:
    return np.asarray(_UNARY[s.op.mnemonic](s.arg("x")))


@meaning(*_BINARY)
def _binary(s: Step) -> Array:
    return np.asarray(_BINARY[s.op.mnemonic](s.arg("a"), s.arg("b")))


@meaning("mod")
def _mod(s: Step) -> Array:
    function = np.fmod if s.attr("fmod") else np.mod
    return np.asarray(function(s.arg("a"), s.arg("b")))


@meaning("cast")
def _cast(s: Step) -> Array:
    return s.arg("x").astype(result_dtype(s.attr("dtype"), s.precision))


@meaning("select")
def _select(s: Step) -> Array:
    return np.where(s.arg("condition"), s.arg("a"), s.arg("b"))


@meaning("softmax")
def _softmax(s: Step) -> Array:
    x, axis = s.arg("x"), s.attr("axis")
    if not s.attr("log"):
        return softmax(x, axis)
    shifted = x - np.max(x, axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True)))


@meaning("reduce")
def _reduce(s: Step) -> Array:
    x, axes, keep = s.arg("x"), s.attr("axes"), s.attr("keepdims")
    axis = None if axes is None else tuple(axes)
    kinds: dict[str, Callable[[], Any]] = {
        "sum": lambda: np.sum(x, axis=axis, keepdims=keep),
        "mean": lambda: np.mean(x, axis=axis, keepdims=keep),
        "max": lambda: np.max(x, axis=axis, keepdims=keep),
        "min": lambda: np.min(x, axis=axis, keepdims=keep),
        "prod": lambda: np.prod(x, axis=axis, keepdims=keep),
        "sum_square": lambda: np.sum(x * x, axis=axis, keepdims=keep),
        "l2": lambda: np.sqrt(np.sum(x * x, axis=axis, keepdims=keep)),
        "l1": lambda: np.sum(np.abs(x), axis=axis, keepdims=keep),
        "log_sum_exp": lambda: np.log(np.sum(np.exp(x), axis=axis, keepdims=keep)),
    }
    return np.asarray(kinds[s.attr("kind")]())


@meaning("cumsum")
def _cumsum(s: Step) -> Array:
    x, axis = s.arg("x"), s.attr("axis")
    flipped = np.flip(x, axis) if s.attr("reverse") else x
    total = np.cumsum(flipped, axis=axis, dtype=x.dtype)
    if s.attr("exclusive"):
        total = total - flipped
    return np.flip(total, axis) if s.attr("reverse") else total


@meaning("argmax")
def _argmax(s: Step) -> Array:
    return np.asarray(np.argmax(s.arg("x"), axis=s.attr("axis"), keepdims=s.attr("keepdims")))


@meaning("topk")
def _topk(s: Step) -> tuple[Array, Array]:
    x, axis = s.arg("x"), s.attr("axis")
    order = np.argsort(-x if s.attr("largest") else x, axis=axis, kind="stable")
    indices = np.take(order, np.arange(s.attr("k")), axis=axis)
    return np.take_along_axis(x, indices, axis), indices


@meaning("conv")
def _conv(s: Step) -> Array:
    x, w, bias, group = s.arg("x"), s.arg("w"), s.optional("bias"), s.attr("group")
    spatial = x.ndim - 2
    pads, strides, dilations = s.attr("pads"), s.attr("strides"), s.attr("dilations")
    widths = [(0, 0), (0, 0), *((pads[i], pads[spatial + i]) for i in range(spatial))]
    reach = [(w.shape[2 + i] - 1) * dilations[i] + 1 for i in range(spatial)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, widths), reach, tuple(range(2, x.ndim)))
    steps = tuple(slice(None, None, v) for v in (1, 1, *strides, *dilations))
    windows = windows[steps]
    batch, channels, out = x.shape[0], x.shape[1] // group, windows.shape[2 : 2 + spatial]
    grouped = windows.reshape(batch, group, channels, *out, *w.shape[2:])
    kernel = w.reshape(group, w.shape[0] // group, channels, *w.shape[2:])
    result = np.einsum(grouped, [0, 1, 2, *range(3, 3 + spatial), *range(5, 5 + spatial)], kernel,
                       [1, 9, 2, *range(5, 5 + spatial)], [0, 1, 9, *range(3, 3 + spatial)])  # fmt: skip
    result = result.reshape(batch, w.shape[0], *out)
    return np.asarray(result if bias is None else result + bias.reshape(-1, *[1] * spatial))


def round_blocks(x: Array, block: int) -> Array:
    """x [..., K] in multiples of 1/127 of each block's largest magnitude."""
    columns = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-columns // block) * block), x.dtype)
    padded[..., :columns] = x
    runs = padded.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(runs).max(-1, keepdims=True) / x.dtype.type(127)
    steps = np.rint(runs / np.where(scale > 0, scale, 1))
    return np.asarray((steps * scale).reshape(padded.shape)[..., :columns], x.dtype)


@meaning("round_blocks")
def _round_blocks(s: Step) -> Array:
    return round_blocks(s.arg("x"), s.attr("block"))
