"""Lowering of the primitives: elementwise, views and moves, gathers and scatters, reductions, products."""

from __future__ import annotations

import math

import numpy as np

from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.weights import decode
from mapper_host.context import Context, rule
from mapper_host.opcodes import (
    ARANGE,
    ARGMAX,
    CONV,
    CUMSUM,
    FILL,
    GATHER,
    GATHER_ELEMENTS,
    GATHER_ND,
    MATMUL,
    ONE_HOT,
    REDUCE,
    SCATTER_ELEMENTS,
    SCATTER_ND,
    SIZES,
    SOFTMAX,
    TOPK,
    TRILU,
    bits,
)
from mapper_host.program import Value
from mapper_host.rules_transformer import copy, join
from mapper_host.strides import around, broadcast, row_major
from mapper_kernels.names import COMBINATIONS, ELEMENTWISE, REDUCTIONS

_UNARY = (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "atan", "tanh", "erf",
    "sigmoid",
    "softplus", "relu", "floor", "ceil", "round", "sign", "not", "isnan", "isinf", "cast",
)  # fmt: skip
_BINARY = (
    "add", "sub", "mul", "div", "pow", "min", "max", "and", "or", "xor", "eq", "ne", "lt", "le", "gt",
    "ge", "select",
)  # fmt: skip


@rule(*_UNARY, *_BINARY)
def _elementwise(c: Context, op: DataflowOp) -> None:
    c.elementwise(ELEMENTWISE[op.mnemonic], [c.value(v) for v in op.operands], c.out())


@rule("mod")
def _mod(c: Context, op: DataflowOp) -> None:
    number = ELEMENTWISE["fmod" if op.attr("fmod") else "mod"]
    c.elementwise(number, [c.value(v) for v in op.operands], c.out())


@rule("constant")
def _constant(c: Context, op: DataflowOp) -> None:
    dtype = tensor_type(op.results[0]).dtype
    array = decode(np.frombuffer(op.attr("value"), np.uint8), op.result_shape(), dtype)
    c.values[op.results[0]] = c.weights.constant(array, dtype)


@rule("load")
def _load(c: Context, op: DataflowOp) -> None:
    c.values[op.results[0]] = c.need("weight", None)


@rule("reshape", "squeeze", "unsqueeze")
def _view(c: Context, op: DataflowOp) -> None:
    c.alias(c.value(op.operands[0]))


@rule("transpose")
def _transpose(c: Context, op: DataflowOp) -> None:
    x, perm = c.value(op.operands[0]), op.attr("perm")
    moved = [d for d in perm if x.shape[d] != 1]
    if moved == sorted(moved):
        c.alias(x)
        return
    y, strides = c.out(), row_major(x.shape)
    copy(c, x, y, SIZES[x.code], y.shape, tuple(strides[d] for d in perm), row_major(y.shape))


@rule("expand")
def _expand(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    if math.prod(op.result_shape()) == x.items:
        c.alias(x)
        return
    y = c.out()
    copy(c, x, y, SIZES[x.code], y.shape, broadcast(x.shape, y.shape), row_major(y.shape))


@rule("concat")
def _concat(c: Context, op: DataflowOp) -> None:
    y = c.out()
    join(c, [c.value(v) for v in op.operands], op.attr("axis") % len(y.shape), y)


@rule("split")
def _split(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    strides = row_major(x.shape)
    axis, at = op.attr("axis") % len(x.shape), 0
    for i in range(len(op.results)):
        y = c.out(i)
        copy(c, x, y, SIZES[x.code], y.shape, strides, row_major(y.shape), at * strides[axis])
        at += y.shape[axis]


@rule("slice")
def _slice(c: Context, op: DataflowOp) -> None:
    if op.attr("starts") is None or op.attr("ends") is None:
        c.fail("its bounds are not known before it runs")
    x, y = c.value(op.operands[0]), c.out()
    strides, first = list(row_major(x.shape)), 0
    axes = op.attr("axes")
    steps = op.attr("steps") or (1,) * len(axes)
    for axis, begin, end, step in zip(axes, op.attr("starts"), op.attr("ends"), steps, strict=True):
        a = axis % len(x.shape)
        start = slice(begin.value, end.value, step).indices(x.shape[a])[0]
        first += start * strides[a]
        strides[a] *= step
    if y.items:
        copy(c, x, y, SIZES[x.code], y.shape, tuple(strides), row_major(y.shape), first)


@rule("pad")
def _pad(c: Context, op: DataflowOp) -> None:
    x, y, value = c.value(op.operands[0]), c.out(), op.attr("value")
    rank = len(x.shape)
    pads = op.attr("pads")
    fill(c, y, value)
    xs, ys = row_major(x.shape), row_major(y.shape)
    begin = [max(0, p) for p in pads[:rank]]
    crop = [max(0, -p) for p in pads[:rank]]
    shape = tuple(min(x.shape[d] - crop[d], y.shape[d] - begin[d]) for d in range(rank))
    if min(shape, default=1) > 0:
        x0 = sum(a * s for a, s in zip(crop, xs, strict=True))
        y0 = sum(a * s for a, s in zip(begin, ys, strict=True))
        copy(c, x, y, SIZES[x.code], shape, xs, ys, x0, y0)


def fill(c: Context, y: Value, value: float) -> None:
    """Emit y[...] = value."""
    whole = int(value) if math.isfinite(value) else 0
    c.emit(FILL, [y.code, y.items, whole, bits(value)], [y], y.items)


@rule("fill")
def _fill(c: Context, op: DataflowOp) -> None:
    fill(c, c.out(), op.attr("value"))


@rule("tile")
def _tile(c: Context, op: DataflowOp) -> None:
    x, y = c.value(op.operands[0]), c.out()
    if y.items == 0:
        return
    times = [b // a for a, b in zip(x.shape, y.shape, strict=True)]
    shape = tuple(d for pair in zip(times, x.shape, strict=True) for d in pair)
    xs = tuple(s for stride in row_major(x.shape) for s in (0, stride))
    copy(c, x, y, SIZES[x.code], shape, xs, row_major(shape))


@rule("range")
def _range(c: Context, op: DataflowOp) -> None:
    start, _, delta = (c.value(v) for v in op.operands)
    y = c.out()
    c.emit(ARANGE, [y.code, y.items], [start, delta, y], y.items)


@rule("shape_of")
def _shape_of(c: Context, op: DataflowOp) -> None:
    shape = op.operand_shape(0)[op.attr("start") : op.attr("end")]
    c.values[op.results[0]] = c.weights.constant(np.array(shape, np.int64), "i64")


@rule("trilu")
def _trilu(c: Context, op: DataflowOp) -> None:
    x, y = c.value(op.operands[0]), c.out()
    m, n = x.shape[-2:]
    size = SIZES[x.code]
    args = [size, math.prod(x.shape[:-2]), m, n, int(op.attr("upper")), op.attr("k")]
    c.emit(TRILU, args, [x, y], x.items)


@rule("one_hot")
def _one_hot(c: Context, op: DataflowOp) -> None:
    indices, y = c.value(op.operands[0]), c.out()
    c.emit(ONE_HOT, [indices.code, y.code, indices.items, op.attr("depth")], [indices, y], y.items)


@rule("gather")
def _gather(c: Context, op: DataflowOp) -> None:
    x, indices, y = c.value(op.operands[0]), c.value(op.operands[1]), c.out()
    outer, n, inner = around(x.shape, op.attr("axis"))
    args = [SIZES[x.code], indices.code, outer, n, inner, indices.items]
    c.emit(GATHER, args, [x, indices, y], y.items, bytes=2 * y.bytes + indices.bytes)


@rule("gather_elements")
def _gather_elements(c: Context, op: DataflowOp) -> None:
    x, indices, y = c.value(op.operands[0]), c.value(op.operands[1]), c.out()
    axis = op.attr("axis") % len(x.shape)
    args = [SIZES[x.code], indices.code, len(x.shape), axis, *indices.shape, *x.shape]
    c.emit(GATHER_ELEMENTS, args, [x, indices, y], y.items)


@rule("gather_nd")
def _gather_nd(c: Context, op: DataflowOp) -> None:
    x, indices, y = c.value(op.operands[0]), c.value(op.operands[1]), c.out()
    first = op.attr("batch_dims")
    batch, last = math.prod(x.shape[:first]), indices.shape[-1]
    dims = x.shape[first : first + last]
    inner = math.prod(x.shape[first + last :])
    count = math.prod(indices.shape[first:-1])
    args = [SIZES[x.code], indices.code, batch, count, inner, last, *dims]
    c.emit(GATHER_ND, args, [x, indices, y], y.items)


def _same(c: Context, x: Value, y: Value) -> None:
    copy(c, x, y, SIZES[x.code], (x.items,), (1,), (1,))


@rule("scatter_nd")
def _scatter_nd(c: Context, op: DataflowOp) -> None:
    x, indices, updates = (c.value(v) for v in op.operands)
    y = c.out()
    _same(c, x, y)
    last = indices.shape[-1]
    inner = math.prod(x.shape[last:])
    how = COMBINATIONS.index(op.attr("reduction"))
    args = [y.code, indices.code, math.prod(indices.shape[:-1]), inner, how, last, *x.shape[:last]]
    c.emit(SCATTER_ND, args, [y, indices, updates, y], updates.items)


@rule("scatter_elements")
def _scatter_elements(c: Context, op: DataflowOp) -> None:
    x, indices, updates = (c.value(v) for v in op.operands)
    y = c.out()
    _same(c, x, y)
    axis, how = op.attr("axis") % len(x.shape), COMBINATIONS.index(op.attr("reduction"))
    args = [y.code, indices.code, how, len(x.shape), axis, *indices.shape, *x.shape]
    c.emit(SCATTER_ELEMENTS, args, [y, indices, updates, y], updates.items)


@rule("reduce")
def _reduce(c: Context, op: DataflowOp) -> None:
    x, y = c.value(op.operands[0]), c.out()
    axes = op.attr("axes")
    gone = set(range(len(x.shape))) if axes is None else {a % len(x.shape) for a in axes}
    strides = row_major(x.shape)
    kept = [d for d in range(len(x.shape)) if d not in gone]
    away = sorted(gone)
    args = [
        REDUCTIONS.index(op.attr("kind")), x.code, len(kept), len(away), *(x.shape[d] for d in kept),
        *(strides[d] for d in kept), *(x.shape[d] for d in away), *(strides[d] for d in away),
    ]  # fmt: skip
    c.emit(REDUCE, args, [x, y], x.items)


@rule("softmax")
def _softmax(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    args = [x.code, *around(x.shape, op.attr("axis")), int(op.attr("log"))]
    c.emit(SOFTMAX, args, [x, c.out()], 5 * x.items)


@rule("cumsum")
def _cumsum(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    args = [x.code, *around(x.shape, op.attr("axis")), int(op.attr("exclusive")), int(op.attr("reverse"))]
    c.emit(CUMSUM, args, [x, c.out()], x.items)


@rule("topk")
def _topk(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    args = [x.code, *around(x.shape, op.attr("axis")), op.attr("k"), int(op.attr("largest"))]
    c.emit(TOPK, args, [x, c.out(0), c.out(1)], 2 * x.items, writes=2)


@rule("argmax")
def _argmax(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    c.emit(ARGMAX, [x.code, *around(x.shape, op.attr("axis"))], [x, c.out()], x.items)


@rule("sample")
def _sample(c: Context, op: DataflowOp) -> None:
    x = c.value(op.operands[0])
    c.emit(ARGMAX, [x.code, *around(x.shape, -1)], [x, c.out()], x.items)


@rule("matmul")
def _matmul(c: Context, op: DataflowOp) -> None:
    a, b, y = c.value(op.operands[0]), c.value(op.operands[1]), c.out()
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    m, k, n = left[-2], left[-1], right[-1]
    if all(d == 1 for d in right[:-2]) and len(left) > 2:
        # one matrix for all rows: a single product reads it once
        m, left = math.prod(left[:-1]), (math.prod(left[:-1]), k)
    batch = np.broadcast_shapes(left[:-2], right[:-2])
    walks = [tuple(s * size for s in broadcast(v[:-2], batch)) for v, size in ((left, m * k), (right, k * n))]
    args = [y.code, m, n, k, len(batch), *batch, *walks[0], *walks[1]]
    c.emit(MATMUL, args, [a, b, y], 2 * y.items * k)


@rule("conv")
def _conv(c: Context, op: DataflowOp) -> None:
    x, w, bias = c.f32(op.operands[0]), c.f32(op.operands[1]), c.operand("bias")
    y = c.out()
    flat = len(x.shape) == 3

    def both(values: tuple[int, ...], other: int) -> list[int]:
        return [other, *values] if flat else list(values)

    def four(shape: tuple[int, ...]) -> list[int]:
        return [*shape[:2], 1, shape[2]] if flat else list(shape)

    rank = len(x.shape) - 2
    args = [
        *four(x.shape), *four(w.shape), *four(y.shape)[2:], *both(op.attr("strides"), 1),
        *both(op.attr("pads")[:rank], 0), *both(op.attr("dilations"), 1), op.attr("group"),
        int(bias is not None),
    ]  # fmt: skip
    c.emit(CONV, args, [v for v in (x, w, bias, y) if v is not None], 2 * y.items * math.prod(w.shape[1:]))
