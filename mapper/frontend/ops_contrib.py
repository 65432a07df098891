"""Lowerings of onnxruntime's contrib operators, each expanded to canonical primitives."""

from __future__ import annotations

from mapper.frontend import build as b
from mapper.frontend.lower import Call, lowers
from mapper.frontend.net import Value
from mapper.frontend.ops_nn import gelu_erf, gelu_tanh, layer_norm, rms, silu

MS = "com.microsoft"


@lowers("Gelu", domain=MS)
def _gelu(c: Call) -> list[Value]:
    return [gelu_erf(c.net, c.x())]


@lowers("FastGelu", domain=MS)
def _fast_gelu(c: Call) -> list[Value]:
    x = b.binary(c.net, "add", c.x(0), c.x(1)) if c.has(1) else c.x(0)
    return [gelu_tanh(c.net, x)]


@lowers("BiasGelu", domain=MS)
def _bias_gelu(c: Call) -> list[Value]:
    return [gelu_erf(c.net, b.binary(c.net, "add", c.x(0), c.x(1)))]


@lowers("QuickGelu", domain=MS)
def _quick_gelu(c: Call) -> list[Value]:
    return [silu(c.net, c.x(), c.number("alpha", 1.702))]


@lowers("SkipSimplifiedLayerNormalization", "SkipLayerNormalization", domain=MS)
@lowers("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
def _skip_norm(c: Call) -> list[Value]:
    simplified = c.node.op.startswith("SkipSimplified")
    at = 3 if simplified else 4  # operands: x, skip, gamma, [beta], bias
    total = b.binary(c.net, "add", c.x(0), c.x(1))
    total = b.binary(c.net, "add", total, c.x(at)) if c.has(at) else total
    if any(c.node.outputs[1:3]):
        raise c.refuse("the mean or the inverse deviation is used")
    eps, axes = c.number("epsilon", 1e-12 if not simplified else 1e-6), [total.rank - 1]
    out = rms(c.net, total, axes, eps) if simplified else layer_norm(c.net, total, axes, eps)
    out = b.binary(c.net, "mul", out, c.x(2))
    out = b.binary(c.net, "add", out, c.x(3)) if not simplified and c.has(3) else out
    return [out, out, out, total]


@lowers("SimplifiedLayerNormalization", "LayerNormalization", domain=MS)
def _norm(c: Call) -> list[Value]:
    x, axes, eps = c.x(), [c.x().rank - 1], c.number("epsilon", 1e-5)
    simplified = c.node.op.startswith("Simplified")
    out = rms(c.net, x, axes, eps) if simplified else layer_norm(c.net, x, axes, eps)
    out = b.binary(c.net, "mul", out, c.x(1))
    return [b.binary(c.net, "add", out, c.x(2)) if not simplified and c.has(2) else out]
