"""Lowerings of activation, hyperbolic and inverse trigonometric functions, and of bit operators."""

from __future__ import annotations

import math

import numpy as np

from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers
from mapper.frontend.net import Net, Value, numpy_of
from mapper.frontend.ops_nn import gelu_erf, gelu_tanh, plus, silu, softplus, times
from mapper.ir.dims import ONE


def _positive(net: Net, x: Value) -> Value:
    return b.binary(net, "gt", x, net.scalar(0, x))


def _expm1(net: Net, x: Value) -> Value:
    return plus(net, b.unary(net, "exp", x), -1.0)


@lowers("Elu", "Selu", "Celu")
def _elu(c: Call) -> list[Value]:
    """gamma (x where x > 0, else alpha (exp(x) - 1)); Celu divides x by alpha inside the exponential."""
    net, x, op = c.net, c.x(), c.node.op
    alpha = c.number("alpha", 1.67326319217681884765625 if op == "Selu" else 1.0)
    inner = b.binary(net, "min", x, net.scalar(0.0, x))  # keeps the branch that is not taken finite
    inner = times(net, inner, 1.0 / alpha) if op == "Celu" else inner
    out = b.select(net, _positive(net, x), x, times(net, _expm1(net, inner), alpha))
    return [times(net, out, c.number("gamma", 1.05070102214813232421875)) if op == "Selu" else out]


@lowers("PRelu")
def _prelu(c: Call) -> list[Value]:
    x = c.x()
    return [b.select(c.net, _positive(c.net, x), x, b.binary(c.net, "mul", x, c.x(1)))]


@lowers("Mish")
def _mish(c: Call) -> list[Value]:
    x = c.x()
    return [b.binary(c.net, "mul", x, b.unary(c.net, "tanh", softplus(c.net, x)))]


def _clamped(net: Net, x: Value, low: float, high: float) -> Value:
    return b.binary(net, "min", b.binary(net, "max", x, net.scalar(low, x)), net.scalar(high, x))


@lowers("HardSigmoid", "HardSwish")
def _hard(c: Call) -> list[Value]:
    net, x, swish = c.net, c.x(), c.node.op == "HardSwish"
    alpha = 1.0 / 6.0 if swish else c.number("alpha", 0.2)
    gate = plus(net, times(net, x, alpha), 0.5 if swish else c.number("beta", 0.5))
    gate = _clamped(net, gate, 0.0, 1.0)
    return [b.binary(net, "mul", x, gate) if swish else gate]


@lowers("ThresholdedRelu")
def _thresholded(c: Call) -> list[Value]:
    net, x = c.net, c.x()
    above = b.binary(net, "gt", x, net.scalar(c.number("alpha", 1.0), x))
    return [b.select(net, above, x, net.scalar(0.0, x))]


@lowers("Shrink")
def _shrink(c: Call) -> list[Value]:
    net, x = c.net, c.x()
    edge, bias = net.scalar(c.number("lambd", 0.5), x), net.scalar(c.number("bias", 0.0), x)
    lifted = b.select(
        net,
        b.binary(net, "lt", x, b.unary(net, "neg", edge)),
        b.binary(net, "add", x, bias),
        net.scalar(0, x),
    )
    return [b.select(net, b.binary(net, "gt", x, edge), b.binary(net, "sub", x, bias), lifted)]


@lowers("Softsign")
def _softsign(c: Call) -> list[Value]:
    return [b.binary(c.net, "div", c.x(), plus(c.net, b.unary(c.net, "abs", c.x()), 1.0))]


@lowers("SwiGLU")
def _swiglu(c: Call) -> list[Value]:
    return [b.binary(c.net, "mul", silu(c.net, c.x(0), c.number("alpha", 1.0)), c.x(1))]


@lowers("Sinh", "Cosh")
def _hyperbolic(c: Call) -> list[Value]:
    net, x = c.net, c.x()
    up, down = b.unary(net, "exp", x), b.unary(net, "exp", b.unary(net, "neg", x))
    return [times(net, b.binary(net, "sub" if c.node.op == "Sinh" else "add", up, down), 0.5)]


def _asinh(net: Net, x: Value) -> Value:
    """sign(x) log(|x| + sqrt(x^2 + 1))."""
    size = b.unary(net, "abs", x)
    root = b.unary(net, "sqrt", plus(net, b.binary(net, "mul", x, x), 1.0))
    return b.binary(
        net, "mul", b.unary(net, "sign", x), b.unary(net, "log", b.binary(net, "add", size, root))
    )


def _acosh(net: Net, x: Value) -> Value:
    root = b.unary(net, "sqrt", plus(net, b.binary(net, "mul", x, x), -1.0))
    return b.unary(net, "log", b.binary(net, "add", x, root))


def _atanh(net: Net, x: Value) -> Value:
    ratio = b.binary(net, "div", plus(net, x, 1.0), plus(net, b.unary(net, "neg", x), 1.0))
    return times(net, b.unary(net, "log", ratio), 0.5)


def _asin(net: Net, x: Value) -> Value:
    """atan(x / sqrt((1 - x)(1 + x)))."""
    rest = b.binary(net, "mul", plus(net, b.unary(net, "neg", x), 1.0), plus(net, x, 1.0))
    return b.unary(net, "atan", b.binary(net, "div", x, b.unary(net, "sqrt", rest)))


def _acos(net: Net, x: Value) -> Value:
    return plus(net, b.unary(net, "neg", _asin(net, x)), math.pi / 2)


_INVERSE = {"Asinh": _asinh, "Acosh": _acosh, "Atanh": _atanh, "Asin": _asin, "Acos": _acos}


@lowers(*_INVERSE)
def _inverse(c: Call) -> list[Value]:
    return [_INVERSE[c.node.op](c.net, c.x())]


@lowers("BitwiseNot")
def _bitwise_not(c: Call) -> list[Value]:
    x = c.x()
    ones = np.array(-1 if x.dtype[0] == "i" else np.iinfo(numpy_of(x.dtype)).max, numpy_of(x.dtype))
    return [b.binary(c.net, "xor", x, c.net.constant(ones, x.dtype))]


@lowers("BitShift")
def _bit_shift(c: Call) -> list[Value]:
    """Left: times a power of two, which wraps. Right: divided by it, where it fits the type."""
    net, x = c.net, c.x()
    if x.dtype not in ("u8", "u16", "u32", "i8", "i16", "i32"):
        raise c.refuse(f"shifts of {x.dtype} are not supported")
    bits = int(x.dtype[1:])
    amount = b.cast(net, c.x(1), "i64")
    power = b.cast(net, b.binary(net, "pow", net.constant(np.array(2, np.int64), "i64"), amount), "i64")
    wide = b.cast(net, x, "i64")
    if c.text("direction", "") == "LEFT":
        out = b.binary(net, "mul", wide, power)
        mask = net.constant(np.array((1 << bits) - 1, np.int64), "i64")
        return [b.cast(net, b.binary(net, "and", out, mask), x.dtype)]
    rest = b.binary(net, "sub", wide, net.make("mod", [wide, power]))  # rounds down, also below zero
    return [b.cast(net, b.binary(net, "div", rest, power), x.dtype)]


@lowers("CumProd")
def _cumprod(c: Call) -> list[Value]:
    """Products of ever longer runs: each round multiplies by the value `shift` places before."""
    net, x = c.net, c.x()
    axis = c.content(1, "the axis")[0].value % max(x.rank, 1)
    if not x.dims[axis].is_const:
        raise c.refuse("a running product over a symbolic dimension is not supported")
    length, back = x.dims[axis].value, bool(c.integer("reverse"))
    out = _shifted(net, x, axis, 1, back) if c.integer("exclusive") else x
    shift = 1
    while shift < length:
        out = b.binary(net, "mul", out, _shifted(net, out, axis, shift, back))
        shift *= 2
    return [out]


def _shifted(net: Net, x: Value, axis: int, shift: int, back: bool) -> Value:
    """`x` moved by `shift` places along `axis`, ones moving in."""
    ones = b.expand(net, net.scalar(1, x), [ONE * shift if i == axis else d for i, d in enumerate(x.dims)])
    size = x.dims[axis]
    start, end = (ONE * shift, size) if back else (ONE * 0, size - shift)
    kept = b.slice_(net, x, [start], [end], [axis], [1])
    return b.concat(net, [kept, ones] if back else [ones, kept], axis)


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
