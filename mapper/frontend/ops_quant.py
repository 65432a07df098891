"""Lowerings of quantisation operators: integers become numbers by primitives.

Products are of 32-bit integers.

Sources: the ONNX operator specification and onnxruntime's contrib operator documentation.
"""

from __future__ import annotations

import numpy as np

from mapper.errors import ModelError
from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers, type_name
from mapper.frontend.net import Net, Value, product
from mapper.frontend.packed import packed_weight
from mapper.ir.dims import ONE, ZERO, Dim
from mapper.lowbit import Scheme

LIMITS: dict[str, tuple[float, float]] = {
    "u8": (0, 255), "i8": (-128, 127), "u16": (0, 65535), "i16": (-32768, 32767),
    "u4": (0, 15), "i4": (-8, 7),
    "f8e4m3": (-448, 448), "f8e5m2": (-57344, 57344),
}  # fmt: skip


def _spread(c: Call, x: Value, parameter: Value, axis: int) -> Value:
    """A scale or zero point that meets `x`: one number, one per index of the axis, or one per block of it."""
    net, block = c.net, c.integer("block_size")
    if all(d == ONE for d in parameter.dims) and parameter.rank <= 1:
        return b.reshape(net, parameter, [])
    if parameter.rank == 1 and not block:
        return b.reshape(net, parameter, [parameter.dims[0], *[ONE] * (x.rank - axis - 1)])
    if parameter.rank != x.rank or block < 1:
        raise c.refuse("scales that fit neither the tensor, an axis, nor blocks of it")
    dims = parameter.dims
    wide = b.reshape(net, parameter, [*dims[: axis + 1], ONE, *dims[axis + 1 :]])
    wide = b.expand(net, wide, [*dims[: axis + 1], Dim.of(block), *dims[axis + 1 :]])
    wide = b.reshape(net, wide, [*dims[:axis], dims[axis] * block, *dims[axis + 1 :]])
    return b.slice_(net, wide, [ZERO], [x.dims[axis]], [axis], [1])


def _number(net: Net, x: Value) -> Value:
    return b.cast(net, x, "f32")


def dequantised(c: Call, x: Value, scale: Value, zero: Value | None, axis: int) -> Value:
    """(x - zero) scale in f32."""
    net = c.net
    whole = x.dtype[0] in "iu"
    if zero is not None and whole:
        zero = b.cast(net, _spread(c, x, zero, axis), "i32")
        x = b.binary(net, "sub", b.cast(net, x, "i32"), zero)
    return b.binary(net, "mul", _number(net, x), _number(net, _spread(c, x, scale, axis)))


def quantised(net: Net, x: Value, scale: Value, zero: Value | None, dtype: str) -> Value:
    """round(x / scale) + zero, kept inside the range of `dtype`."""
    x = b.binary(net, "div", x, scale)
    x = x if dtype[0] == "f" else b.unary(net, "round", x)
    if zero is not None:
        x = b.binary(net, "add", x, _number(net, zero))
    low, high = LIMITS[dtype]
    x = b.binary(net, "min", b.binary(net, "max", x, net.scalar(low, x)), net.scalar(high, x))
    return b.cast(net, x, dtype)


@lowers("DequantizeLinear")
@lowers("DequantizeLinear", domain=MS)
def _dequantize(c: Call) -> list[Value]:
    x, zero = c.x(0), c.x(2) if c.has(2) else None
    dtype = type_name(c, "output_dtype") if c.integer("output_dtype") else c.x(1).dtype
    whole = _stored(c, x, zero, dtype)
    if whole is not None:
        return [whole]
    return [b.cast(c.net, dequantised(c, x, c.x(1), zero, _axis(c, x)), dtype)]


_BITS = {"u8": 8, "i8": 8, "u4": 4, "i4": 4}


def _stored(c: Call, x: Value, zero: Value | None, dtype: str) -> Value | None:
    """A stored tensor of low-bit integers with its scales as one weight; None where it is something else."""
    scales = c.x(1)
    if x.weight is None or x.dtype not in _BITS or dtype not in ("f32", "f16", "bf16"):
        return None
    axis, block = _axis(c, x), c.integer("block_size")
    if scales.rank == x.rank and scales.rank > 1:
        block = block or -(-x.dims[axis].value // scales.dims[axis].value)
    elif block or (scales.rank == 1 and scales.dims[0] not in (ONE, x.dims[axis])) or scales.rank > 1:
        return None
    scheme = Scheme(_BITS[x.dtype], block, axis, "plain")
    return packed_weight(scheme, [d.value for d in x.dims], dtype, x, scales, zero)


def _axis(c: Call, x: Value) -> int:
    """The axis; one scale for the whole tensor needs none, whatever the default."""
    return c.axis(1) if any(d != ONE for d in c.x(1).dims) or c.x(1).rank > 1 else x.rank - 1


@lowers("QuantizeLinear")
@lowers("QuantizeLinear", domain=MS)
def _quantize(c: Call) -> list[Value]:
    net, x = c.net, c.x(0)
    axis = _axis(c, x)
    dtype = (
        c.x(2).dtype if c.has(2) else type_name(c, "output_dtype", 2) if c.integer("output_dtype") else "u8"
    )
    if dtype not in LIMITS:
        raise c.refuse(f"quantisation to {dtype} is not supported")
    if dtype[0] == "f" and not c.integer("saturate", 1):
        raise c.refuse("quantisation without saturation is not supported")
    scale = _number(net, _spread(c, x, c.x(1), axis))
    zero = _spread(c, x, c.x(2), axis) if c.has(2) else None
    return [quantised(net, _number(net, x), scale, zero, dtype)]


def dynamic(net: Net, x: Value) -> tuple[Value, Value, Value]:
    """`x` as u8 over its own range, which includes zero; the scale and the zero point."""
    axes = list(range(x.rank))
    none = net.scalar(0.0, x)
    low = b.binary(net, "min", b.reduce(net, "min", x, axes, False), none)
    high = b.binary(net, "max", b.reduce(net, "max", x, axes, False), none)
    scale = b.binary(net, "div", b.binary(net, "sub", high, low), net.scalar(255.0, x))
    scale = b.select(net, b.binary(net, "eq", scale, none), net.scalar(1.0, x), scale)
    zero = quantised(net, b.unary(net, "neg", low), scale, None, "u8")
    return quantised(net, x, scale, zero, "u8"), scale, zero


@lowers("DynamicQuantizeLinear")
def _dynamic(c: Call) -> list[Value]:
    return list(dynamic(c.net, c.x()))


def _centred(net: Net, x: Value, zero: Value | None, column: bool) -> Value:
    """`x` minus its zero point in i32; a vector of them is one per row, or one per column."""
    x = b.cast(net, x, "i32")
    if zero is None:
        return x
    if zero.rank == 1 and not column and zero.dims[0] != ONE:
        zero = b.reshape(net, zero, [zero.dims[0], ONE])
    return b.binary(net, "sub", x, b.cast(net, zero, "i32"))


def integer_product(net: Net, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None) -> Value:
    """(x - x_zero)(w - w_zero) in i32."""
    return b.matmul(net, _centred(net, x, x_zero, False), _centred(net, w, w_zero, True))


def _optional(c: Call, index: int) -> Value | None:
    return c.x(index) if c.has(index) else None


@lowers("MatMulInteger")
def _matmul_integer(c: Call) -> list[Value]:
    return [integer_product(c.net, c.x(0), c.x(1), _optional(c, 2), _optional(c, 3))]


@lowers("QLinearMatMul")
def _qlinear_matmul(c: Call) -> list[Value]:
    net = c.net
    total = _number(net, integer_product(net, c.x(0), c.x(3), c.x(2), c.x(5)))
    left = c.x(1)
    if left.rank == 1 and left.dims[0] != ONE:
        left = b.reshape(net, left, [left.dims[0], ONE])
    scale = b.binary(net, "mul", _number(net, left), _number(net, c.x(4)))
    scaled = b.binary(net, "mul", total, b.binary(net, "div", scale, _number(net, c.x(6))))
    return [quantised(net, scaled, net.scalar(1.0, scaled), c.x(7), c.x(7).dtype)]


@lowers("MatMulIntegerToFloat", domain=MS)
def _matmul_to_float(c: Call) -> list[Value]:
    """Operands: A, B, scales of A and B, zero points of A and B, bias."""
    out = _number(c.net, integer_product(c.net, c.x(0), c.x(1), _optional(c, 4), _optional(c, 5)))
    return [_rescaled(c, out, b.binary(c.net, "mul", c.x(2), c.x(3)), 6)]


@lowers("DynamicQuantizeMatMul", domain=MS)
def _dynamic_matmul(c: Call) -> list[Value]:
    """Operands: A (float), B, scale and zero point of B, bias."""
    x, scale, zero = dynamic(c.net, c.x(0))
    out = _number(c.net, integer_product(c.net, x, c.x(1), zero, _optional(c, 3)))
    return [_rescaled(c, out, b.binary(c.net, "mul", scale, c.x(2)), 4)]


def _rescaled(c: Call, out: Value, scale: Value, bias: int) -> Value:
    out = b.binary(c.net, "mul", out, scale)
    return b.binary(c.net, "add", out, c.x(bias)) if c.has(bias) else out


@lowers("QLinearAdd", "QLinearMul", domain=MS)
def _qlinear(c: Call) -> list[Value]:
    """Operands: A, its scale and zero point, B and its two, the result's two."""
    net = c.net
    one, two = (dequantised(c, c.x(i), c.x(i + 1), _optional(c, i + 2), c.x(i).rank - 1) for i in (0, 3))
    out = b.binary(net, "add" if c.node.op == "QLinearAdd" else "mul", one, two)
    return [quantised(net, out, c.x(6), _optional(c, 7), c.x(0).dtype)]


@lowers("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", domain=MS)
def _qlinear_one(c: Call) -> list[Value]:
    """Operands: x, its scale and zero point, the result's two."""
    net, op = c.net, c.node.op
    x = dequantised(c, c.x(0), c.x(1), _optional(c, 2), c.x(0).rank - 1)
    if op == "QLinearSigmoid":
        out = b.unary(net, "sigmoid", x)
    elif op == "QLinearLeakyRelu":
        sloped = b.binary(net, "mul", x, net.scalar(c.number("alpha", 0.01), x))
        out = b.select(net, b.binary(net, "lt", x, net.scalar(0.0, x)), sloped, x)
    else:
        axis = c.axis(-1)
        if c.integer("opset", 13) < 13 and axis != x.rank - 1:
            raise c.refuse("a softmax over several axes is not supported")
        out = net.make("softmax", [x], {"axis": axis})
    return [quantised(net, out, c.x(3), _optional(c, 4), c.x(0).dtype)]


@lowers("GatherBlockQuantized", domain=MS)
def _gather_blocks(c: Call) -> list[Value]:
    """Rows of a table of low-bit blocks. Operands: table, indices, scales, zero points."""
    net, table, scales = c.net, c.x(0), c.x(2)
    axis, along = c.integer("gather_axis"), c.integer("quantize_axis", 1) % table.rank
    block, bits = c.integer("block_size", 128), c.integer("bits", 4)
    if axis % table.rank or along != table.rank - 1 or (table.dtype, bits) not in (
        ("u8", 4), ("u8", 8), ("u4", 4), ("i4", 4),
    ):  # fmt: skip
        raise c.refuse(f"{bits}-bit blocks of {table.dtype} gathered along axis {axis} are not supported")
    packed = table.dtype == "u8"
    rows = (
        _unpacked(net, b.gather(net, table, c.x(1), 0), bits) if packed else b.gather(net, table, c.x(1), 0)
    )
    rows = b.cast(net, rows, "i32")
    scale = _repeated(net, b.gather(net, scales, c.x(1), 0), block, rows.dims[-1])
    if c.has(3):
        zero = b.gather(net, c.x(3), c.x(1), 0)
        zero = _unpacked(net, zero, bits) if packed else zero
        zero = b.slice_(net, zero, [ZERO], [scales.dims[-1]], [zero.rank - 1], [1])
        rows = b.binary(net, "sub", rows, b.cast(net, _repeated(net, zero, block, rows.dims[-1]), "i32"))
    elif packed:
        rows = b.binary(net, "sub", rows, net.scalar(1 << (bits - 1), rows))
    return [b.binary(net, "mul", b.cast(net, rows, scales.dtype), scale)]


def _unpacked(net: Net, x: Value, bits: int) -> Value:
    """Bytes as unsigned numbers of `bits` bits, the low ones first."""
    if bits == 8:
        return x
    x = b.cast(net, x, "i32")
    sixteen = net.constant(np.array(16, np.int32), "i32")
    pair = [b.reshape(net, net.make(op, [x, sixteen]), [*x.dims, ONE]) for op in ("mod", "div")]
    return b.reshape(net, b.concat(net, pair, x.rank), [*x.dims[:-1], x.dims[-1] * 2])


def _repeated(net: Net, x: Value, block: int, length: Dim) -> Value:
    wide = b.expand(net, b.reshape(net, x, [*x.dims, ONE]), [*x.dims, Dim.of(block)])
    wide = b.reshape(net, wide, [*x.dims[:-1], x.dims[-1] * block])
    return b.slice_(net, wide, [ZERO], [length], [x.rank - 1], [1])


@lowers("MatMulNBits", domain=MS)
def _matmul_bits(c: Call) -> list[Value]:
    """x times the transpose of a matrix of low-bit blocks: B [N, blocks, bytes], scales [N, blocks]."""
    net, x = c.net, c.x(0)
    bits, block = c.integer("bits", 4), c.integer("block_size")
    rows, columns = c.integer("N"), c.integer("K")
    if bits not in (2, 4, 8) or block < 1 or rows < 1 or columns < 1:
        raise c.refuse(f"{bits}-bit integers in blocks of {block}")
    blocks = -(-columns // block)
    counts = {1: rows * blocks * (block * bits // 8), 2: rows * blocks}
    for operand, count in counts.items():
        if product(c.x(operand).dims) != Dim.of(count):
            raise ModelError(
                f"{net.origin}: operand {operand} has not the {count} elements of {rows} x {columns}"
            )
    given = [c.x(i) if c.has(i) else None for i in range(1, 5)]
    values, scales, zeros, order = given
    assert values is not None and scales is not None
    matrix = packed_weight(Scheme(bits, block), (rows, columns), x.dtype, values, scales, zeros, order)
    if matrix is None:
        raise c.refuse("a matrix that is computed is not supported")
    # onnxruntime's kernels on 8-bit activations take neither float zero points nor a group index
    plain = order is None and (zeros is None or zeros.dtype == "u8")
    if c.integer("accuracy_level") == 4 and plain:
        x = net.make("round_blocks", [x], {"block": block})
    out = b.matmul(net, x, b.transpose(net, matrix, (1, 0)))
    return [b.binary(net, "add", out, c.x(5)) if c.has(5) else out]
