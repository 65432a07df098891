"""Lowerings of the standard neural-network operators: every fused one is expanded to canonical primitives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mapper.errors import ModelError
from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers, type_name
from mapper.frontend.net import Net, Value
from mapper.ir.dims import ONE, Dim

LOWEST = -3.4028234663852886e38


@lowers("MatMul")
def _matmul(c: Call) -> list[Value]:
    return [b.matmul(c.net, c.x(0), c.x(1))]


@lowers("Gemm")
def _gemm(c: Call) -> list[Value]:
    left = b.transpose(c.net, c.x(0), (1, 0)) if c.integer("transA") else c.x(0)
    right = b.transpose(c.net, c.x(1), (1, 0)) if c.integer("transB") else c.x(1)
    out = times(c.net, b.matmul(c.net, left, right), c.number("alpha", 1.0))
    if c.has(2):
        out = b.binary(c.net, "add", out, times(c.net, c.x(2), c.number("beta", 1.0)))
    return [out]


def times(net: Net, x: Value, factor: float) -> Value:
    """`x` times a number; times one is `x`."""
    return x if factor == 1.0 else b.binary(net, "mul", x, net.scalar(factor, x))


def plus(net: Net, x: Value, number: float) -> Value:
    """`x` plus a number."""
    return b.binary(net, "add", x, net.scalar(number, x))


def rms(net: Net, x: Value, axes: list[int], eps: float) -> Value:
    """`x` divided by the root of its mean square."""
    square = b.reduce(net, "mean", b.binary(net, "mul", x, x), axes, True)
    return b.binary(net, "mul", x, net.make("rsqrt", [plus(net, square, eps)]))


def layer_norm(net: Net, x: Value, axes: list[int], eps: float) -> Value:
    """`x` minus its mean, divided by its standard deviation."""
    centred = b.binary(net, "sub", x, b.reduce(net, "mean", x, axes, True))
    return rms(net, centred, axes, eps)


def _norm_axes(c: Call) -> list[int]:
    return list(range(c.axis(-1), c.x().rank))


@lowers("RMSNormalization", "SimplifiedLayerNormalization")
@lowers("SimplifiedLayerNormalization", domain=MS)
def _rms(c: Call) -> list[Value]:
    """Results: the normalised tensor and the inverse root mean square."""
    net, x, axes, eps = c.net, c.x(), _norm_axes(c), c.number("epsilon", 1e-5)
    wide = b.cast(net, x, stash_type(c))
    out = b.binary(net, "mul", b.cast(net, rms(net, wide, axes, eps), c.x(1).dtype), c.x(1))
    return [out, inverse_root(net, wide, axes, eps)] if any(c.node.outputs[1:]) else [out]


@lowers("LayerNormalization")
@lowers("LayerNormalization", domain=MS)
def _layer_norm(c: Call) -> list[Value]:
    """Results: the normalised tensor, the mean and the inverse standard deviation."""
    net, x, axes, eps = c.net, c.x(), _norm_axes(c), c.number("epsilon", 1e-5)
    wide = b.cast(net, x, stash_type(c))
    out = b.cast(net, layer_norm(net, wide, axes, eps), x.dtype)
    out = b.binary(net, "mul", out, c.x(1)) if c.has(1) else out
    out = b.binary(net, "add", out, c.x(2)) if c.has(2) else out
    return [out, *statistics(net, wide, axes, eps)] if any(c.node.outputs[1:]) else [out]


def stash_type(c: Call) -> str:
    """The type that a normalisation computes its statistics in."""
    return type_name(c, "stash_type", 1)


def statistics(net: Net, x: Value, axes: list[int], eps: float) -> list[Value]:
    """The mean and the inverse standard deviation."""
    mean = b.reduce(net, "mean", x, axes, True)
    return [mean, inverse_root(net, b.binary(net, "sub", x, mean), axes, eps)]


def inverse_root(net: Net, x: Value, axes: list[int], eps: float) -> Value:
    """1 / sqrt(mean of squares + eps)."""
    square = b.reduce(net, "mean", b.binary(net, "mul", x, x), axes, True)
    return net.make("rsqrt", [plus(net, square, eps)])


@lowers("Softmax")
def _softmax(c: Call) -> list[Value]:
    x = c.x()
    if c.opset >= 13:
        return [c.net.make("softmax", [x], {"axis": c.axis(-1)})]
    axis = c.axis(1)  # before opset 13 the input is flattened to two dimensions
    if axis == x.rank - 1:
        return [c.net.make("softmax", [x], {"axis": axis})]
    head, tail = ONE, ONE
    for i, d in enumerate(x.dims):
        head, tail = (head * d, tail) if i < axis else (head, tail * d)
    flat = c.net.make("softmax", [b.reshape(c.net, x, [head, tail])], {"axis": 1})
    return [b.reshape(c.net, flat, x.dims)]


@lowers("LogSoftmax")
def _log_softmax(c: Call) -> list[Value]:
    return [b.unary(c.net, "log", v) for v in _softmax(c)]


@lowers("Gelu")
def _gelu(c: Call) -> list[Value]:
    return [gelu_tanh(c.net, c.x()) if c.text("approximate", "none") == "tanh" else gelu_erf(c.net, c.x())]


def gelu_erf(net: Net, x: Value) -> Value:
    """x/2 (1 + erf(x / sqrt 2)); half precision is widened first, for its own constants are too coarse."""
    if x.dtype in ("f16", "bf16"):
        return b.cast(net, gelu_erf(net, b.cast(net, x, "f32")), x.dtype)
    inner = plus(net, b.unary(net, "erf", times(net, x, math.sqrt(0.5))), 1.0)
    return b.binary(net, "mul", times(net, x, 0.5), inner)


def gelu_tanh(net: Net, x: Value) -> Value:
    """The tanh approximation of gelu; half precision is widened first."""
    if x.dtype in ("f16", "bf16"):
        return b.cast(net, gelu_tanh(net, b.cast(net, x, "f32")), x.dtype)
    cube = b.binary(net, "mul", b.binary(net, "mul", x, x), x)
    inner = times(net, b.binary(net, "add", x, times(net, cube, 0.044715)), math.sqrt(2 / math.pi))
    return b.binary(net, "mul", times(net, x, 0.5), plus(net, b.unary(net, "tanh", inner), 1.0))


def silu(net: Net, x: Value, alpha: float = 1.0) -> Value:
    """x sigmoid(alpha x)."""
    return b.binary(net, "mul", x, b.unary(net, "sigmoid", times(net, x, alpha)))


@lowers("Swish")
def _swish(c: Call) -> list[Value]:
    return [silu(c.net, c.x(), c.number("alpha", 1.0))]


@lowers("Softplus")
def _softplus(c: Call) -> list[Value]:
    return [softplus(c.net, c.x())]


def softplus(net: Net, x: Value) -> Value:
    """log(1 + exp(x)), without overflow."""
    decay = b.unary(net, "exp", b.unary(net, "neg", b.unary(net, "abs", x)))
    return b.binary(net, "add", b.unary(net, "relu", x), b.unary(net, "log", plus(net, decay, 1.0)))


@lowers("LeakyRelu")
def _leaky(c: Call) -> list[Value]:
    x = c.x()
    low = times(c.net, b.binary(c.net, "min", x, c.net.scalar(0.0, x)), c.number("alpha", 0.01))
    return [b.binary(c.net, "add", b.unary(c.net, "relu", x), low)]


@lowers("Conv")
def _conv(c: Call) -> list[Value]:
    x, w = c.x(0), c.x(1)
    spatial = x.rank - 2
    if c.text("auto_pad", "NOTSET") != "NOTSET":
        raise c.refuse("automatic padding is not supported")
    pads = c.integers("pads") or [0] * (2 * spatial)
    attrs = {
        "strides": tuple(c.integers("strides") or [1] * spatial),
        "dilations": tuple(c.integers("dilations") or [1] * spatial),
        "before": tuple(pads[:spatial]),
        "after": tuple(pads[spatial:]),
        "group": c.integer("group", 1),
    }
    out = c.net.make("conv", [x, w], attrs)
    if c.has(2):
        bias = b.reshape(c.net, c.x(2), [w.dims[0], *[ONE] * spatial])
        out = b.binary(c.net, "add", out, bias)
    return [out]


def split_heads(net: Net, x: Value, heads: int) -> Value:
    """[B, S, H*D] -> [B, H, S, D]."""
    batch, length, width = x.dims
    return b.transpose(net, b.reshape(net, x, [batch, length, Dim.of(heads), width // heads]), (0, 2, 1, 3))


def merge_heads(net: Net, x: Value) -> Value:
    """[B, H, S, D] -> [B, S, H*D]."""
    batch, heads, length, width = x.dims
    return b.reshape(net, b.transpose(net, x, (0, 2, 1, 3)), [batch, length, heads * width])


def repeat_heads(net: Net, x: Value, heads: Dim) -> Value:
    """[B, Hkv, T, D] -> [B, H, T, D]: each key-value head serves H/Hkv consecutive query heads."""
    batch, own, length, width = x.dims
    if own == heads:
        return x
    wide = b.reshape(net, x, [batch, own, ONE, length, width])
    wide = b.expand(net, wide, [batch, own, heads // own, length, width])
    return b.reshape(net, wide, [batch, heads, length, width])


def causal(net: Net, queries: Dim, keys: Dim, offset: Dim) -> Value:
    """[S, T] bool: key t is visible to query s where t <= s + offset."""
    row = b.reshape(net, b.iota(net, offset, offset + queries, 1), [queries, ONE])
    return b.binary(net, "le", b.iota(net, Dim.of(0), keys, 1), row)


def attend(
    net: Net,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    scale: float,
    softcap: float,
    offset: Dim | None,
) -> Value:
    """softmax(scale q k^T + mask) v over [B, H, S, D] operands; `offset` asks for a causal mask."""
    masks = [mask, None if offset is None else causal(net, q.dims[2], k.dims[2], offset)]
    stages = scored(net, q, k, [m for m in masks if m is not None], scale, softcap)
    return weighted(net, net.make("softmax", [stages[-1]], {"axis": 3}), v)


def scored(
    net: Net, q: Value, k: Value, masks: Sequence[Value], scale: float, softcap: float
) -> tuple[Value, Value, Value]:
    """scale q k^T; the same after the soft cap; the same after the masks."""
    k = repeat_heads(net, k, q.dims[1])
    raw = capped = times(net, b.matmul(net, q, b.transpose(net, k, (0, 1, 3, 2))), scale)
    if softcap > 0.0:
        capped = times(net, b.unary(net, "tanh", times(net, raw, 1.0 / softcap)), softcap)
    scores = capped
    for visible in masks:
        scores = b.binary(net, "add", scores, additive(net, visible, scores))
    return raw, capped, scores


def weighted(net: Net, shares: Value, v: Value) -> Value:
    """The sum of the values [B, Hkv, T, D] by their shares [B, H, S, T]."""
    return b.matmul(net, shares, repeat_heads(net, v, shares.dims[1]))


def additive(net: Net, mask: Value, like: Value) -> Value:
    """A boolean mask as something to add to scores."""
    if mask.dtype != "bool":
        return b.cast(net, mask, like.dtype)
    low = LOWEST if like.dtype == "f32" else -math.inf
    return b.select(net, mask, net.scalar(0.0, like), net.scalar(low, like))


@lowers("RotaryEmbedding")
def _rotary(c: Call) -> list[Value]:
    """Opset 23: x [B, H, S, D] or [B, S, H*D]; caches [L, R/2] with position ids, [B, S, R/2] without."""
    net, x, cos, sin = c.net, c.x(0), c.x(1), c.x(2)
    flat = x.rank == 3
    if flat:
        heads = c.integer("num_heads")
        if heads < 1:
            raise ModelError(f"{net.origin}: three-dimensional operand without a head count")
        x = split_heads(net, x, heads)
    if c.has(3):
        cos, sin = b.gather(net, cos, c.x(3), 0), b.gather(net, sin, c.x(3), 0)
    shape = [cos.dims[0], ONE, *cos.dims[1:]]
    cos, sin = b.reshape(net, cos, shape), b.reshape(net, sin, shape)
    width = c.integer("rotary_embedding_dim") or x.dims[3].value
    out = rotate(net, x, cos, sin, width, bool(c.integer("interleaved")))
    return [merge_heads(net, out) if flat else out]


def part(net: Net, x: Value, start: int, end: int, step: int = 1) -> Value:
    """x[..., start:end:step]."""
    return b.slice_(net, x, [Dim.of(start)], [Dim.of(end)], [x.rank - 1], [step])


def rotate(net: Net, x: Value, cos: Value, sin: Value, width: int, interleaved: bool) -> Value:
    """Rotary embedding of the first `width` entries of the last axis; cos and sin have width/2 columns."""
    whole, half = x.dims[-1].value, width // 2
    turned = part(net, x, 0, width)
    if interleaved:
        left, right = part(net, turned, 0, width, 2), part(net, turned, 1, width, 2)
    else:
        left, right = part(net, turned, 0, half), part(net, turned, half, width)

    def mul(p: Value, q: Value) -> Value:
        return b.binary(net, "mul", p, q)

    real = b.binary(net, "sub", mul(left, cos), mul(right, sin))
    imaginary = b.binary(net, "add", mul(left, sin), mul(right, cos))
    if interleaved:
        pair = [*real.dims, ONE]
        both = b.concat(net, [b.reshape(net, real, pair), b.reshape(net, imaginary, pair)], real.rank)
        out = b.reshape(net, both, turned.dims)
    else:
        out = b.concat(net, [real, imaginary], x.rank - 1)
    return out if width == whole else b.concat(net, [out, part(net, x, width, whole)], x.rank - 1)
