"""Lowerings of onnxruntime's products and activations with something fused in, and of T5's position biases.

Semantics: the public contrib operator documentation of onnxruntime (com.microsoft, version 1).
"""

from __future__ import annotations

import math

import numpy as np

from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers
from mapper.frontend.net import Net, Value, product
from mapper.frontend.ops_nn import gelu_erf, gelu_tanh, plus, times
from mapper.ir.dims import ONE, ZERO, Dim


@lowers("FusedMatMul", "TransposeMatMul", "FusedMatMulActivation", domain=MS)
def _fused_matmul(c: Call) -> list[Value]:
    net = c.net
    left = _turned(net, c.x(0), bool(c.integer("transBatchA")), bool(c.integer("transA")))
    right = _turned(net, c.x(1), bool(c.integer("transBatchB")), bool(c.integer("transB")))
    return [_activated(c, times(net, b.matmul(net, left, right), c.number("alpha", 1.0)))]


def _turned(net: Net, x: Value, batch: bool, last: bool) -> Value:
    """`batch`: the first axis becomes the last but one. `last`: the last two axes change places."""
    axes = list(range(x.rank))
    if batch and x.rank > 2:
        axes = [*axes[1:-1], 0, axes[-1]]
    if last and x.rank > 1:
        axes[-2:] = axes[:-3:-1]
    return b.transpose(net, x, axes)


def _activated(c: Call, x: Value) -> Value:
    kind = c.text("activation", "")
    if kind in ("", "Identity"):
        return x
    if kind in ("Relu", "Sigmoid", "Tanh"):
        return b.unary(c.net, kind.lower(), x)
    if kind == "LeakyRelu":
        slope = c.number("activation_alpha", c.number("leaky_relu_alpha", 0.01))
        return b.select(c.net, b.binary(c.net, "lt", x, c.net.scalar(0.0, x)), times(c.net, x, slope), x)
    raise c.refuse(f"activation {kind[:40]!r} is not supported")


@lowers("FusedGemm", domain=MS)
def _fused_gemm(c: Call) -> list[Value]:
    net = c.net
    left, right = (_turned(net, c.x(i), False, bool(c.integer(n))) for i, n in ((0, "transA"), (1, "transB")))
    out = times(net, b.matmul(net, left, right), c.number("alpha", 1.0))
    if c.has(2):
        out = b.binary(net, "add", out, times(net, c.x(2), c.number("beta", 1.0)))
    return [_activated(c, out)]


@lowers("GemmFastGelu", domain=MS)
def _gemm_gelu(c: Call) -> list[Value]:
    out = b.matmul(c.net, c.x(0), c.x(1))
    return [gelu_tanh(c.net, b.binary(c.net, "add", out, c.x(2)) if c.has(2) else out)]


@lowers("BiasAdd", domain=MS)
def _bias_add(c: Call) -> list[Value]:
    return [b.binary(c.net, "add", b.binary(c.net, "add", c.x(0), c.x(1)), c.x(2))]


@lowers("BiasSplitGelu", domain=MS)
def _bias_split(c: Call) -> list[Value]:
    net, x = c.net, b.binary(c.net, "add", c.x(0), c.x(1))
    half, last = x.dims[-1] // 2, x.rank - 1
    left = b.slice_(net, x, [ZERO], [half], [last], [1])
    right = b.slice_(net, x, [half], [x.dims[-1]], [last], [1])
    return [b.binary(net, "mul", left, gelu_erf(net, right))]


@lowers("BiasSoftmax", domain=MS)
def _bias_softmax(c: Call) -> list[Value]:
    """Softmax over all axes from `axis` on. The bias is broadcast over inner batch axes, or outer ones."""
    net, x, bias, axis = c.net, c.x(0), c.x(1), c.axis(1)
    if c.integer("is_inner_broadcast", 1) and bias.rank < x.rank:
        lead = axis - (x.rank - bias.rank)
        bias = b.reshape(net, bias, [*bias.dims[:lead], *[ONE] * (x.rank - bias.rank), *bias.dims[lead:]])
    total = b.binary(net, "add", x, bias)
    flat = b.reshape(net, total, [*x.dims[:axis], product(x.dims[axis:])])
    return [b.reshape(net, net.make("softmax", [flat], {"axis": axis}), x.dims)]


@lowers("RelativePositionBias", domain=MS)
def _relative_bias(c: Call) -> list[Value]:
    """[1, H, S, T]: the table's row for the bucket of key position minus query position. Buckets: half are
    exact distances, the other half logarithmic up to the largest; T5, arXiv:1910.10683, section 2.1."""
    net, table = c.net, c.x(0)
    queries, keys = c.content(1, "the number of queries")[0], c.content(2, "the number of keys")[0]
    both, furthest = bool(c.integer("is_bidirectional")), c.integer("max_distance", 128)
    if not table.dims[0].is_const or furthest < 1:
        raise c.refuse("the number of buckets is not known")
    buckets = table.dims[0].value
    apart = b.binary(
        net,
        "sub",
        b.iota(net, ZERO, keys, 1),
        b.reshape(net, b.iota(net, ZERO, queries, 1), [queries, ONE]),
    )
    index = _bucket(net, apart, buckets, both, furthest)
    rows = b.gather(net, table, index, 0)
    return [b.reshape(net, b.transpose(net, rows, (2, 0, 1)), [ONE, table.dims[1], queries, keys])]


def _whole(net: Net, number: int) -> Value:
    return net.constant(np.array(number, np.int64), "i64")


def _bucket(net: Net, apart: Value, buckets: int, both: bool, furthest: int) -> Value:
    zero = _whole(net, 0)
    back = b.unary(net, "neg", apart)  # positive: the key is before the query
    if both:
        buckets //= 2
        side = b.select(net, b.binary(net, "lt", back, zero), _whole(net, buckets), zero)
        back = b.unary(net, "abs", back)
    else:
        side, back = zero, b.binary(net, "max", back, zero)
    exact = buckets // 2
    ratio = times(net, b.cast(net, b.binary(net, "max", back, _whole(net, 1)), "f32"), 1.0 / exact)
    steps = times(net, b.unary(net, "log", ratio), (buckets - exact) / math.log(furthest / exact))
    far = b.binary(net, "add", b.cast(net, steps, "i64"), _whole(net, exact))
    far = b.binary(net, "min", far, _whole(net, buckets - 1))
    near = b.binary(net, "lt", back, _whole(net, exact))
    return b.binary(net, "add", side, b.select(net, near, back, far))


@lowers("GatedRelativePositionBias", domain=MS)
def _gated_bias(c: Call) -> list[Value]:
    """Operands: queries [B, S, H*D], their bias, position biases [1, H, S, S], the gates' weights [D, E] and
    bias, and a factor per head [1, H, 1, 1]."""
    net, heads = c.net, c.integer("num_heads")
    if c.has(6) or heads < 1:
        raise c.refuse("packed sequences are not supported")
    x = b.binary(net, "add", c.x(0), c.x(1))
    batch, length, width = x.dims
    x = b.transpose(net, b.reshape(net, x, [batch, length, Dim.of(heads), width // heads]), (0, 2, 1, 3))
    gates = b.binary(net, "add", b.matmul(net, x, c.x(3)), c.x(4))
    gates = b.reshape(net, gates, [batch, Dim.of(heads), length, Dim.of(2), gates.dims[-1] // 2])
    gates = b.unary(net, "sigmoid", b.reduce(net, "sum", gates, [4], False))
    first, second = (b.slice_(net, gates, [Dim.of(i)], [Dim.of(i + 1)], [3], [1]) for i in (0, 1))
    inner = plus(net, b.binary(net, "mul", second, c.x(5)), -1.0)
    return [b.binary(net, "mul", plus(net, b.binary(net, "mul", first, inner), 2.0), c.x(2))]
