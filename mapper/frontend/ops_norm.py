"""Lowerings of normalisations that are fused or not over the last axes, and of the remaining reductions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers
from mapper.frontend.net import Net, Value, product
from mapper.frontend.ops_basic import reduce_axes
from mapper.frontend.ops_nn import inverse_root, layer_norm, rms, statistics
from mapper.ir.dims import ONE, ZERO, Dim


def _per_channel(net: Net, vector: Value, rank: int) -> Value:
    """[C] as [C, 1, ...], to meet axis 1 of a tensor of rank `rank`."""
    return b.reshape(net, vector, [vector.dims[0], *[ONE] * (rank - 2)])


def _scaled(net: Net, x: Value, scale: Value, bias: Value) -> Value:
    out = b.binary(net, "mul", x, _per_channel(net, scale, x.rank))
    return b.binary(net, "add", out, _per_channel(net, bias, x.rank))


@lowers("InstanceNormalization")
def _instance(c: Call) -> list[Value]:
    x = c.x()
    out = layer_norm(c.net, x, list(range(2, x.rank)), c.number("epsilon", 1e-5))
    return [_scaled(c.net, out, c.x(1), c.x(2))]


@lowers("GroupNormalization")
def _group(c: Call) -> list[Value]:
    """Scale and bias are per group before opset 21, per channel since."""
    net, x, groups = c.net, c.x(), c.integer("num_groups")
    if groups < 1:
        raise c.refuse("no number of groups")
    channels = x.dims[1]
    each = product([channels // groups, *x.dims[2:]])
    wide = b.cast(net, x, "f32") if c.integer("stash_type", 1) == 1 else x
    parts = b.reshape(net, wide, [x.dims[0], Dim.of(groups), each])
    out = b.reshape(net, layer_norm(net, parts, [2], c.number("epsilon", 1e-5)), x.dims)
    out = b.cast(net, out, x.dtype)
    scale, bias = (_channels(net, c.x(i), channels, groups) for i in (1, 2))
    return [_scaled(net, out, scale, bias)]


def _channels(net: Net, vector: Value, channels: Dim, groups: int) -> Value:
    if vector.dims[0] == channels:
        return vector
    column = b.reshape(net, vector, [Dim.of(groups), ONE])
    return b.reshape(net, b.expand(net, column, [Dim.of(groups), channels // groups]), [channels])


@lowers("BatchNormalization")
def _batch(c: Call) -> list[Value]:
    """In inference: stored mean and variance."""
    net, x = c.net, c.x()
    if c.integer("training_mode") or any(c.node.outputs[1:]):
        raise c.refuse("training mode is not supported")
    mean, variance = (b.cast(net, _per_channel(net, c.x(i), x.rank), x.dtype) for i in (3, 4))
    eps = net.scalar(c.number("epsilon", 1e-5), variance)
    inverse = net.make("rsqrt", [b.binary(net, "add", variance, eps)])
    out = b.binary(net, "mul", b.binary(net, "sub", x, mean), inverse)
    return [_scaled(net, out, b.cast(net, c.x(1), x.dtype), b.cast(net, c.x(2), x.dtype))]


@lowers("MeanVarianceNormalization")
def _mean_variance(c: Call) -> list[Value]:
    return [layer_norm(c.net, c.x(), c.integers("axes") or [0, 2, 3], 1e-9)]


@lowers("LpNormalization")
def _lp(c: Call) -> list[Value]:
    """x over its norm along one axis; zero where the norm is zero."""
    net, x, axes = c.net, c.x(), [c.axis(-1)]
    zero = net.scalar(0.0, x)
    if c.integer("p", 2) == 1:
        norm = b.reduce(net, "sum", b.unary(net, "abs", x), axes, True)
    else:
        norm = b.unary(net, "sqrt", b.reduce(net, "sum", b.binary(net, "mul", x, x), axes, True))
    empty = b.binary(net, "eq", norm, zero)
    return [
        b.select(net, empty, zero, b.binary(net, "div", x, b.select(net, empty, net.scalar(1.0, x), norm)))
    ]


@lowers("ReduceL1", "ReduceLogSum", "ReduceLogSumExp")
def _reduce(c: Call) -> list[Value]:
    net, x, op = c.net, c.x(), c.node.op
    axes, keep = reduce_axes(c, 18), bool(c.integer("keepdims", 1))
    if op == "ReduceLogSumExp":
        return [_log_sum_exp(net, x, axes, keep)]
    out = b.reduce(net, "sum", b.unary(net, "abs", x) if op == "ReduceL1" else x, axes, keep)
    return [b.unary(net, "log", out) if op == "ReduceLogSum" else out]


def _log_sum_exp(net: Net, x: Value, axes: Sequence[int], keep: bool) -> Value:
    if not axes or any(d.is_const and d.value == 0 for d in x.dims):
        return b.unary(net, "log", b.reduce(net, "sum", b.unary(net, "exp", x), axes, keep))
    return net.make(
        "reduce",
        [x],
        {"kind": "log_sum_exp", "axes": tuple(sorted(a % x.rank for a in axes)), "keepdims": keep},
    )


@lowers("ArgMin", "ArgMax")
def _arg_extreme(c: Call) -> list[Value]:
    """The first on a tie, or the last: then the axis is read from its end."""
    net, x, axis = c.net, c.x(), c.axis(0)
    if c.node.op == "ArgMin":
        x = b.unary(net, "neg", x if x.dtype[0] == "f" or x.dtype == "bf16" else b.cast(net, x, "i64"))
    size, last = x.dims[axis], bool(c.integer("select_last_index"))
    if last:
        x = b.slice_(net, x, [size - 1], [Dim.of(-(1 << 40))], [axis], [-1])
    out = net.make("argmax", [x], {"axis": axis, "keepdims": bool(c.integer("keepdims", 1))})
    return [b.binary(net, "sub", net.ints([size - 1], 0), out) if last else out]


@lowers("Hardmax")
def _hardmax(c: Call) -> list[Value]:
    """One at the first largest element of each run along the axis (of each flattened row before opset 13)."""
    net, x = c.net, c.x()
    axis, whole = c.axis(-1 if c.opset >= 13 else 1), x
    if c.opset < 13 and axis != x.rank - 1:
        x = b.reshape(net, x, [product(x.dims[:axis]), product(x.dims[axis:])])
        axis = 1
    first = net.make("argmax", [x], {"axis": axis, "keepdims": True})
    places = b.reshape(
        net, b.iota(net, Dim.of(0), x.dims[axis], 1), [x.dims[axis], *[ONE] * (x.rank - axis - 1)]
    )
    return [b.reshape(net, b.cast(net, b.binary(net, "eq", places, first), x.dtype), whole.dims)]


@lowers("SkipSimplifiedLayerNormalization", "SkipLayerNormalization", domain=MS)
@lowers("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
def _skip_norm(c: Call) -> list[Value]:
    """Operands: x, skip, gamma, beta (not the simplified one), bias.

    Results: the normalised sum, its mean, the inverse of its deviation, the sum."""
    net, eps, simplified = c.net, c.number("epsilon", 1e-12), c.node.op.startswith("SkipSimplified")
    at = 3 if simplified else 4
    x = b.binary(net, "add", c.x(0), c.x(at)) if c.has(at) else c.x(0)
    total = b.binary(net, "add", x, c.x(1))
    axes = [total.rank - 1]
    out = rms(net, total, axes, eps) if simplified else layer_norm(net, total, axes, eps)
    out = b.binary(net, "mul", out, c.x(2))
    out = b.binary(net, "add", out, c.x(3)) if not simplified and c.has(3) else out
    mean, inverse = statistics(net, total, axes, eps)
    return [out, mean, inverse_root(net, total, axes, eps) if simplified else inverse, total]


@lowers("EmbedLayerNormalization", domain=MS)
def _embed_norm(c: Call) -> list[Value]:
    """Operands: ids, segments, word, position and segment tables, gamma, beta, mask, positions."""
    net, ids = c.net, c.x(0)
    total = b.gather(net, c.x(2), ids, 0)
    places = c.x(8) if c.has(8) else b.iota(net, ZERO, ids.dims[1], 1)
    total = b.binary(net, "add", total, b.gather(net, c.x(3), places, 0))
    if c.has(1) and c.has(4):
        total = b.binary(net, "add", total, b.gather(net, c.x(4), c.x(1), 0))
    out = b.binary(net, "mul", layer_norm(net, total, [2], c.number("epsilon", 1e-12)), c.x(5))
    out = b.binary(net, "add", out, c.x(6))
    if c.has(7):
        lengths = b.reduce(net, "sum", b.cast(net, c.x(7), "i32"), [1], False)
    else:
        lengths = b.expand(net, net.constant(np.array(0), "i32"), [ids.dims[0]])
    return [out, lengths, total]
