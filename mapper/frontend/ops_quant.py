"""Lowerings of quantised operators: integers are read, multiplied as integers, scaled, and rounded again.

Semantics: the ONNX operator specification, and for com.microsoft onnxruntime's contrib operator documentation.
"""

from __future__ import annotations

import numpy as np

from mapper.frontend import build as b
from mapper.frontend.lower import Call, lowers, type_name
from mapper.frontend.net import Net, Value
from mapper.frontend.ops_nn import times
from mapper.ir.dims import ONE, Dim

MS = "com.microsoft"
RANGES = {
    "u8": (0, 255), "i8": (-128, 127), "u16": (0, 65535), "i16": (-32768, 32767), "u4": (0, 15), "i4": (-8, 7),
}  # fmt: skip
_FLOATS = {"f8e4m3": 448.0, "f8e5m2": 57344.0}  # the largest finite numbers. Source: ONNX float 8 formats


def spread(net: Net, part: Value, like: Value, axis: int, block: int = 0) -> Value:
    """Scales or zero points in a form that broadcasts to `like`: one for all, one per index of `axis`, or one
    per `block` elements along it."""
    if part.rank == 0 or part.dims == (ONE,):
        return b.reshape(net, part, [])
    if block < 1:
        return b.reshape(net, part, [part.dims[0], *[ONE] * (like.rank - axis - 1)])
    head, tail = part.dims[: axis + 1], part.dims[axis + 1 :]
    wide = b.expand(net, b.reshape(net, part, [*head, ONE, *tail]), [*head, Dim.of(block), *tail])
    whole = b.reshape(net, wide, [*head[:-1], head[-1] * block, *tail])
    return b.slice_(net, whole, [Dim.of(0)], [like.dims[axis]], [axis], [1])


def quantise(net: Net, x: Value, scale: Value, zero: Value | None, dtype: str) -> Value:
    """round(x / scale) + zero, to the nearest even, saturated. Scale and zero broadcast to x."""
    out = b.binary(net, "div", b.cast(net, x, "f32"), b.cast(net, scale, "f32"))
    if dtype in RANGES:
        low, high = RANGES[dtype]
        out = b.unary(net, "round", out)
        out = out if zero is None else b.binary(net, "add", out, b.cast(net, zero, "f32"))
    else:
        low, high = -_FLOATS[dtype], _FLOATS[dtype]
    out = b.binary(net, "max", out, net.scalar(low, out))
    return b.cast(net, b.binary(net, "min", out, net.scalar(high, out)), dtype)


def dequantise(net: Net, x: Value, scale: Value, zero: Value | None) -> Value:
    """(x - zero) scale, of scale's type."""
    wide = b.cast(net, x, "f32")
    if zero is not None and zero.scalar != 0:
        wide = b.binary(net, "sub", wide, b.cast(net, zero, "f32"))
    return b.cast(net, b.binary(net, "mul", wide, b.cast(net, scale, "f32")), scale.dtype)


@lowers("QuantizeLinear")
@lowers("QuantizeLinear", domain=MS)
def _quantize(c: Call) -> list[Value]:
    net, x = c.net, c.x()
    axis, block = c.axis(1) if x.rank > 1 else 0, c.integer("block_size")
    dtype = (
        c.x(2).dtype if c.has(2) else type_name(c, "output_dtype", 2) if c.integer("output_dtype") else "u8"
    )
    if dtype not in RANGES and (dtype not in _FLOATS or not c.integer("saturate", 1)):
        raise c.refuse(f"quantisation to {dtype} is not supported")
    zero = spread(net, c.x(2), x, axis, block) if c.has(2) else None
    return [quantise(net, x, spread(net, c.x(1), x, axis, block), zero, dtype)]


@lowers("DequantizeLinear")
@lowers("DequantizeLinear", domain=MS)
def _dequantize(c: Call) -> list[Value]:
    net, x = c.net, c.x()
    axis, block = c.axis(1) if x.rank > 1 else 0, c.integer("block_size")
    zero = spread(net, c.x(2), x, axis, block) if c.has(2) else None
    out = dequantise(net, x, spread(net, c.x(1), x, axis, block), zero)
    dtype = type_name(c, "output_dtype") if c.integer("output_dtype") else out.dtype
    return [b.cast(net, out, dtype)]


def dynamic(net: Net, x: Value) -> tuple[Value, Value, Value]:
    """x as u8 with the scale and zero point of its own range, which is widened to hold 0."""
    every = list(range(x.rank))
    zero = net.scalar(0.0, x)
    high = b.binary(net, "max", b.reduce(net, "max", x, every, False), zero)
    low = b.binary(net, "min", b.reduce(net, "min", x, every, False), zero)
    span = b.binary(net, "sub", high, low)
    flat = b.binary(net, "eq", span, zero)
    scale = b.select(net, flat, net.scalar(1.0, x), times(net, span, 1.0 / 255.0))
    point = quantise(net, b.unary(net, "neg", low), scale, None, "u8")
    return quantise(net, x, scale, point, "u8"), scale, point


@lowers("DynamicQuantizeLinear")
def _dynamic(c: Call) -> list[Value]:
    return list(dynamic(c.net, c.x()))


def integer_product(net: Net, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None) -> Value:
    """(x - x_zero) (w - w_zero) in 32-bit integers; zero points are one for all, per row of x, per column of w."""
    left, right = b.cast(net, x, "i32"), b.cast(net, w, "i32")
    if x_zero is not None and x_zero.scalar != 0:
        shape = [*x_zero.dims, ONE] if x_zero.rank == 1 and x_zero.dims != (ONE,) else x_zero.dims
        point = b.reshape(net, b.cast(net, x_zero, "i32"), [] if x_zero.dims == (ONE,) else shape)
        left = b.binary(net, "sub", left, point)
    if w_zero is not None and w_zero.scalar != 0:
        point = b.cast(net, w_zero, "i32")
        point = b.reshape(net, point, []) if point.dims == (ONE,) else point
        right = b.binary(net, "sub", right, point)
    return b.matmul(net, left, right)


def _given(c: Call, index: int) -> Value | None:
    return c.x(index) if c.has(index) else None


@lowers("MatMulInteger")
def _matmul_integer(c: Call) -> list[Value]:
    return [integer_product(c.net, c.x(0), c.x(1), _given(c, 2), _given(c, 3))]


def _row_scale(net: Net, scale: Value) -> Value:
    """A scale per row [M] as a column; others as they are."""
    return b.reshape(net, scale, [scale.dims[0], ONE]) if scale.rank == 1 and scale.dims != (ONE,) else scale


@lowers("QLinearMatMul")
def _qlinear_matmul(c: Call) -> list[Value]:
    """Operands: a, its scale and zero point, b, its scale and zero point, the result's scale and zero point."""
    net = c.net
    whole = integer_product(net, c.x(0), c.x(3), c.x(2), c.x(5))
    scale = b.binary(net, "mul", _row_scale(net, c.x(1)), c.x(4))
    out = b.binary(net, "mul", b.cast(net, whole, "f32"), b.cast(net, scale, "f32"))
    scale, zero = (_row_scale(net, c.x(i)) for i in (6, 7))
    return [quantise(net, out, scale, zero, zero.dtype)]


@lowers("MatMulIntegerToFloat", domain=MS)
def _integer_to_float(c: Call) -> list[Value]:
    """Operands: a, b, their scales, their zero points, bias."""
    net = c.net
    whole = integer_product(net, c.x(0), c.x(1), _given(c, 4), _given(c, 5))
    out = b.cast(net, whole, c.x(2).dtype)
    out = b.binary(net, "mul", out, b.binary(net, "mul", _row_scale(net, c.x(2)), c.x(3)))
    return [b.binary(net, "add", out, c.x(6)) if c.has(6) else out]


@lowers("DynamicQuantizeMatMul", domain=MS)
def _dynamic_matmul(c: Call) -> list[Value]:
    """Operands: a (floats), b (integers), b's scale and zero point, bias."""
    net = c.net
    x, scale, zero = dynamic(net, c.x(0))
    whole = b.cast(net, integer_product(net, x, c.x(1), zero, _given(c, 3)), "f32")
    out = b.binary(net, "mul", whole, b.binary(net, "mul", c.x(2), scale))
    return [b.binary(net, "add", out, c.x(4)) if c.has(4) else out]


@lowers("QLinearAdd", "QLinearMul", domain=MS)
def _qlinear_binary(c: Call) -> list[Value]:
    """Operands: a, its scale and zero point, b, its scale and zero point, the result's scale and zero point."""
    net = c.net
    left, right = (dequantise(net, c.x(i), _one(c, i + 1), _optional(c, i + 2)) for i in (0, 3))
    out = b.binary(net, "add" if c.node.op == "QLinearAdd" else "mul", left, right)
    return [quantise(net, out, _one(c, 6), _optional(c, 7), c.x(0).dtype)]


@lowers("QLinearSigmoid", "QLinearLeakyRelu", domain=MS)
def _qlinear_unary(c: Call) -> list[Value]:
    net = c.net
    x = dequantise(net, c.x(0), _one(c, 1), _optional(c, 2))
    if c.node.op == "QLinearSigmoid":
        out = b.unary(net, "sigmoid", x)
    else:
        low = times(net, b.binary(net, "min", x, net.scalar(0.0, x)), c.number("alpha", 0.01))
        out = b.binary(net, "add", b.unary(net, "relu", x), low)
    return [quantise(net, out, _one(c, 3), _optional(c, 4), c.x(0).dtype)]


def _one(c: Call, index: int) -> Value:
    return b.reshape(c.net, c.x(index), [])


def _optional(c: Call, index: int) -> Value | None:
    return _one(c, index) if c.has(index) else None


@lowers("GatherBlockQuantized", domain=MS)
def _gather_blocks(c: Call) -> list[Value]:
    """Rows of a table of low-bit integers. Operands: data, indices, scales, zero points."""
    net, data, scales = c.net, c.x(0), c.x(2)
    axis, along = c.integer("gather_axis") % data.rank, c.integer("quantize_axis", 1) % data.rank
    bits, block = c.integer("bits", 4), c.integer("block_size", 128)
    if axis == along or axis != 0 or along != data.rank - 1:
        raise c.refuse("blocks are only supported along the last axis, of rows")
    picked = [b.gather(net, v, c.x(1), 0) for v in (data, scales, *([c.x(3)] if c.has(3) else []))]
    rows = picked[0]
    packed = data.dtype == "u8" and bits < 8
    rows = _unpacked(net, rows, bits) if packed else rows
    zero: Value | None = None
    if c.has(3):
        zero = _unpacked(net, picked[2], bits) if packed else picked[2]
        if packed:
            zero = b.slice_(net, zero, [Dim.of(0)], [scales.dims[-1]], [zero.rank - 1], [1])
    elif data.dtype == "u8":
        zero = net.scalar(1 << (bits - 1), net.constant(np.array(0, np.uint8), "u8"))
    last = rows.rank - 1
    if zero is not None and zero.rank:
        zero = spread(net, zero, rows, last, block)
    return [dequantise(net, rows, spread(net, picked[1], rows, last, block), zero)]


def _unpacked(net: Net, x: Value, bits: int) -> Value:
    """u8 [..., n] as [..., n * 8 / bits], low bits first."""
    parts = []
    for start in range(0, 8, bits):
        wide = b.cast(net, x, "i32")
        part = b.binary(net, "div", wide, net.scalar(1 << start, wide))
        part = b.binary(net, "and", part, net.scalar((1 << bits) - 1, wide))
        parts.append(b.reshape(net, part, [*x.dims, ONE]))
    return b.reshape(net, b.concat(net, parts, x.rank), [*x.dims[:-1], x.dims[-1] * (8 // bits)])
