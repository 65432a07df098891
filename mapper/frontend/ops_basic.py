"""Lowerings of elementwise, shape and indexing operators."""

from __future__ import annotations

import numpy as np

from mapper.errors import ModelError
from mapper.frontend import build as b
from mapper.frontend import build_index
from mapper.frontend.cache_views import joined, scattered_elements, scattered_rows
from mapper.frontend.counters import counted, rows_from, stretch
from mapper.frontend.lower import Call, array_constant, lowers, type_name
from mapper.frontend.net import Value
from mapper.frontend.ops_vision import padded_by_index
from mapper.frontend.proto import TensorRecord
from mapper.ir.dims import ONE, ZERO, Dim

_UNARY = {
    "Neg": "neg", "Abs": "abs", "Exp": "exp", "Log": "log", "Sqrt": "sqrt",
    "Reciprocal": "reciprocal", "Sin": "sin", "Cos": "cos", "Tan": "tan", "Tanh": "tanh", "Erf": "erf",
    "Sigmoid": "sigmoid", "Relu": "relu", "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign",
    "Not": "not", "IsNaN": "isnan", "Atan": "atan",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "And": "and", "Or": "or",
    "Xor": "xor",
    "Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge",
    "BitwiseAnd": "and", "BitwiseOr": "or", "BitwiseXor": "xor",
}  # fmt: skip


@lowers(*_UNARY)
def _unary(c: Call) -> list[Value]:
    return [b.unary(c.net, _UNARY[c.node.op], c.x())]


@lowers("IsInf")
def _is_inf(c: Call) -> list[Value]:
    net, x = c.net, c.x()
    out = b.unary(net, "isinf", x)
    for name, sign in (("detect_positive", "lt"), ("detect_negative", "gt")):
        if not c.integer(name, 1):
            out = b.binary(net, "and", out, b.binary(net, sign, x, net.scalar(0.0, x)))
    return [out]


@lowers(*_BINARY)
def _binary(c: Call) -> list[Value]:
    return [b.binary(c.net, _BINARY[c.node.op], c.x(0), c.x(1))]


@lowers("Mod")
def _mod(c: Call) -> list[Value]:
    if c.integer("fmod"):
        return [c.net.make("mod", [c.x(0), c.x(1)], {"fmod": True})]
    return [b.binary(c.net, "mod", c.x(0), c.x(1))]


@lowers("Pow")
def _pow(c: Call) -> list[Value]:
    return [b.binary(c.net, "pow", c.x(0), b.cast(c.net, c.x(1), c.x(0).dtype))]


@lowers("Min", "Max")
def _extreme(c: Call) -> list[Value]:
    out = c.x(0)
    for index in range(1, len(c.ins)):
        out = b.binary(c.net, c.node.op.lower(), out, c.x(index))
    return [out]


@lowers("Sum", "Mean")
def _sum(c: Call) -> list[Value]:
    out = c.x(0)
    for index in range(1, len(c.ins)):
        out = b.binary(c.net, "add", out, c.x(index))
    if c.node.op == "Mean":
        out = b.binary(c.net, "mul", out, c.net.scalar(1.0 / len(c.ins), out))
    return [out]


@lowers("Clip")
def _clip(c: Call) -> list[Value]:
    out = c.x()
    if c.has(1):
        out = b.binary(c.net, "max", out, c.x(1))
    return [b.binary(c.net, "min", out, c.x(2)) if c.has(2) else out]


@lowers("Where")
def _where(c: Call) -> list[Value]:
    return [b.select(c.net, c.x(0), c.x(1), c.x(2))]


@lowers("Cast")
def _cast(c: Call) -> list[Value]:
    return [b.cast(c.net, c.x(), type_name(c, "to"))]


@lowers("CastLike")
def _cast_like(c: Call) -> list[Value]:
    return [b.cast(c.net, c.x(), c.x(1).dtype)]


@lowers("Identity", "Dropout")
def _identity(c: Call) -> list[Value]:
    if len([o for o in c.node.outputs if o]) > 1:
        raise c.refuse("the dropout mask is used")
    return [c.x()]


@lowers("Constant")
def _constant(c: Call) -> list[Value]:
    for name, kind in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
        if c.value(name) is not None:
            return [array_constant(c.net, np.array(c.value(name), kind))]
    if c.value("value_floats") is not None:
        return [array_constant(c.net, np.array(c.value("value_floats"), np.float32))]
    value = c.value("value")
    if not isinstance(value, TensorRecord):
        raise c.refuse("only numeric constants are supported")
    return [array_constant(c.net, c.tensor(value))]


@lowers("ConstantOfShape")
def _constant_of_shape(c: Call) -> list[Value]:
    value = c.value("value")
    fill = c.tensor(value) if isinstance(value, TensorRecord) else np.zeros(1, np.float32)
    scalar = array_constant(c.net, fill.reshape(()))
    return [b.expand(c.net, scalar, c.content(0, "the shape"))]


@lowers("Shape")
def _shape(c: Call) -> list[Value]:
    end = c.integer("end") if c.value("end") is not None else None
    return [b.shape_of(c.net, c.x(), c.integer("start"), end)]


@lowers("Size")
def _size(c: Call) -> list[Value]:
    total = ONE
    for d in c.x().dims:
        total = total * d
    return [c.net.ints([total], 0)]


@lowers("Reshape")
def _reshape(c: Call) -> list[Value]:
    x = c.x()
    target = list(c.content(1, "the target shape"))
    if not c.integer("allowzero"):
        target = [x.dims[i] if d.is_const and d.value == 0 else d for i, d in enumerate(target)]
    return [b.reshape(c.net, x, target)]


@lowers("Flatten")
def _flatten(c: Call) -> list[Value]:
    x, axis = c.x(), c.integer("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    head, tail = ONE, ONE
    for i, d in enumerate(x.dims):
        head, tail = (head * d, tail) if i < axis else (head, tail * d)
    return [b.reshape(c.net, x, [head, tail])]


@lowers("Unsqueeze")
def _unsqueeze(c: Call) -> list[Value]:
    x, axes = c.x(), c.axes(1, 13)
    if axes is None:
        raise ModelError(f"{c.net.origin}: no axes")
    rank = x.rank + len(axes)
    places = {a % rank for a in axes}
    if len(places) != len(axes):
        raise ModelError(f"{c.net.origin}: axes {axes} name one place twice")
    rest = iter(x.dims)
    return [b.reshape(c.net, x, [ONE if i in places else next(rest) for i in range(rank)])]


@lowers("Squeeze")
def _squeeze(c: Call) -> list[Value]:
    x, axes = c.x(), c.axes(1, 13)
    drop = {a % x.rank for a in axes} if axes is not None else {i for i, d in enumerate(x.dims) if d == ONE}
    return [b.reshape(c.net, x, [d for i, d in enumerate(x.dims) if i not in drop])]


@lowers("Transpose")
def _transpose(c: Call) -> list[Value]:
    perm = c.integers("perm") or list(range(c.x().rank))[::-1]
    if sorted(perm) != list(range(c.x().rank)):
        raise ModelError(f"{c.net.origin}: perm {perm} of a tensor of rank {c.x().rank}")
    return [b.transpose(c.net, c.x(), perm)]


@lowers("Expand")
def _expand(c: Call) -> list[Value]:
    return [b.expand(c.net, c.x(), c.content(1, "the target shape"))]


@lowers("Tile")
def _tile(c: Call) -> list[Value]:
    x, repeats = c.x(), c.content(1, "the repeats")
    if all(d == ONE or r == ONE for d, r in zip(x.dims, repeats, strict=True)):
        target = [r if d == ONE else d for d, r in zip(x.dims, repeats, strict=True)]
        return [b.expand(c.net, x, target)]
    return [c.net.make("tile", [x], {"repeats": repeats})]


@lowers("Concat")
def _concat(c: Call) -> list[Value]:
    parts = [c.x(i) for i in range(len(c.ins))]
    return [joined(c.net, parts, c.axis(0))]


@lowers("Split")
def _split(c: Call) -> list[Value]:
    x, axis = c.x(), c.axis(0)
    sizes: list[Dim]
    given = c.integers("split")
    if given is not None:
        sizes = [Dim.of(s) for s in given]
    elif c.has(1):
        sizes = list(c.content(1, "the sizes"))
    else:
        n = len(c.node.outputs)
        whole = (x.dims[axis] + (n - 1)) // n
        sizes = [whole] * (n - 1) + [x.dims[axis] - whole * (n - 1)]
    return split(c, x, sizes, axis)


def split(c: Call, x: Value, sizes: list[Dim], axis: int) -> list[Value]:
    """Consecutive slices of the given sizes."""
    at, out = Dim.of(0), []
    for size in sizes:
        out.append(b.slice_(c.net, x, [at], [at + size], [axis], [1]))
        at = at + size
    return out


@lowers("Slice")
def _slice(c: Call) -> list[Value]:
    count = len(c.x(1).content or (1,))
    axes = [d.value for d in c.content(3, "the axes")] if c.has(3) else list(range(count))
    steps = [d.value for d in c.content(4, "the steps")] if c.has(4) else [1] * count
    if c.x(1).content is None and len(axes) == 1 and steps == [1]:
        found = rows_from(c.net, c.x(), c.x(1), c.x(2), axes[0] % c.x().rank)
        if found is not None:
            return [found]
    starts, ends = c.content(1, "the starts"), c.content(2, "the ends")
    return [b.slice_(c.net, c.x(), starts, ends, axes, steps)]


@lowers("Gather")
def _gather(c: Call) -> list[Value]:
    return [b.gather(c.net, c.x(), c.x(1), c.axis(0))]


@lowers("GatherElements")
def _gather_elements(c: Call) -> list[Value]:
    return [c.net.make("gather_elements", [c.x(), c.x(1)], {"axis": c.axis(0)})]


@lowers("GatherND")
def _gather_nd(c: Call) -> list[Value]:
    return [build_index.gather_nd(c.net, c.x(), c.x(1), c.integer("batch_dims"))]


@lowers("ScatterND")
def _scatter_nd(c: Call) -> list[Value]:
    reduction, (x, indices, updates) = c.text("reduction", "none"), (c.x(i) for i in range(3))
    rows = scattered_rows(c.net, x, indices, updates) if reduction == "none" else None
    return [build_index.scatter_nd(c.net, x, indices, updates, reduction) if rows is None else rows]


@lowers("ScatterElements", "Scatter")
def _scatter_elements(c: Call) -> list[Value]:
    axis, reduction, (x, indices, updates) = (
        c.axis(0),
        c.text("reduction", "none"),
        (c.x(i) for i in range(3)),
    )
    if reduction == "none":
        return [scattered_elements(c.net, x, indices, updates, axis)]
    return [c.net.make("scatter_elements", [x, indices, updates], {"axis": axis, "reduction": reduction})]


@lowers("Range")
def _range(c: Call) -> list[Value]:
    start, limit, step = (c.x(i) for i in range(3))
    length = stretch(start, limit)
    if start.content is None and step.scalar == 1.0 and length is not None:
        return [counted(c.net, start, length)]
    if step.content is None or not step.content[0].is_const or start.content is None or limit.content is None:
        raise c.refuse("the length of the range depends on the data")
    return [b.iota(c.net, start.content[0], limit.content[0], step.content[0].value, start.dtype)]


@lowers("CumSum")
def _cumsum(c: Call) -> list[Value]:
    axis = c.content(1, "the axis")[0].value % max(c.x().rank, 1)
    attrs = {"axis": axis, "exclusive": bool(c.integer("exclusive")), "reverse": bool(c.integer("reverse"))}
    return [c.net.make("cumsum", [c.x()], attrs)]


@lowers("Trilu")
def _trilu(c: Call) -> list[Value]:
    k = c.content(1, "the diagonal")[0].value if c.has(1) else 0
    return [c.net.make("trilu", [c.x()], {"k": k, "upper": bool(c.integer("upper", 1))})]


@lowers("Pad")
def _pad(c: Call) -> list[Value]:
    x, mode = c.x(), c.text("mode", "constant")
    pads = c.content(1, "the padding")
    axes = [d.value % x.rank for d in c.content(3, "the axes")] if c.has(3) else list(range(x.rank))
    before, after = [Dim.of(0)] * x.rank, [Dim.of(0)] * x.rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    if mode != "constant":
        for axis in range(x.rank):
            if before[axis] != ZERO or after[axis] != ZERO:
                x = padded_by_index(c, x, axis, before[axis].value, after[axis].value, mode)
        return [x]
    fill = c.x(2) if c.has(2) else c.net.scalar(0.0, x)
    return [
        c.net.make("pad", [x, b.reshape(c.net, fill, [])], {"before": tuple(before), "after": tuple(after)})
    ]


@lowers("TopK")
def _topk(c: Call) -> list[Value]:
    k = c.content(1, "the number of results")[0]
    if c.x().dtype == "u64":
        raise c.refuse("sorting of u64 is not supported")
    attrs = {"k": k.value if k.is_const else k, "axis": c.axis(-1), "largest": bool(c.integer("largest", 1))}
    return c.net.many("topk", [c.x()], attrs)


@lowers("OneHot")
def _one_hot(c: Call) -> list[Value]:
    x, given = c.x(), c.x(1)
    whole = given.const is not None and given.content is None  # a depth may be a float
    depth = (
        Dim.of(int(given.const.reshape(-1)[0]))
        if whole and given.const is not None
        else c.content(1, "the depth")[0]
    )
    axis = c.integer("axis", -1) % (x.rank + 1)
    classes = b.cast(c.net, b.iota(c.net, Dim.of(0), depth, 1), x.dtype)
    classes = b.reshape(c.net, classes, [depth, *[ONE] * (x.rank - axis)])
    size = b.cast(c.net, c.net.ints([depth], 0), x.dtype)  # indices below zero count from the end
    x = b.select(c.net, b.binary(c.net, "lt", x, c.net.scalar(0, x)), b.binary(c.net, "add", x, size), x)
    hit = b.binary(c.net, "eq", b.reshape(c.net, x, [*x.dims[:axis], ONE, *x.dims[axis:]]), classes)
    off, on = (b.reshape(c.net, b.gather(c.net, c.x(2), c.net.ints([i], 0), 0), []) for i in (0, 1))
    return [b.select(c.net, hit, on, off)]


_REDUCE = {
    "ReduceSum": ("sum", 13),
    "ReduceMean": ("mean", 18),
    "ReduceMax": ("max", 18),
    "ReduceMin": ("min", 18),
}
_REDUCE |= {"ReduceProd": ("prod", 18), "ReduceSumSquare": ("sum", 18), "ReduceL2": ("sum", 18)}


@lowers(*_REDUCE)
def _reduce(c: Call) -> list[Value]:
    kind, moved = _REDUCE[c.node.op]
    x, axes, truth = c.x(), reduce_axes(c, moved), c.x().dtype == "bool"
    if c.node.op in ("ReduceSumSquare", "ReduceL2"):
        x = b.binary(c.net, "mul", x, x)
    x = b.cast(c.net, x, "u8") if truth else x
    out = b.reduce(c.net, kind, x, axes, bool(c.integer("keepdims", 1)))
    out = b.cast(c.net, out, "bool") if truth else out
    return [b.unary(c.net, "sqrt", out) if c.node.op == "ReduceL2" else out]


def reduce_axes(c: Call, moved_at: int) -> list[int]:
    """The axes of a reduction: given, all of them, or none where an empty list asks for that."""
    axes = c.axes(1, moved_at)
    if axes:
        return axes
    return [] if c.integer("noop_with_empty_axes") else list(range(c.x().rank))


@lowers("EyeLike")
def _eye_like(c: Call) -> list[Value]:
    rows, cols = c.x().dims
    dtype = type_name(c, "dtype") if c.value("dtype") is not None else c.x().dtype
    row = b.reshape(c.net, b.iota(c.net, Dim.of(0), rows, 1), [rows, ONE])
    column = b.binary(
        c.net, "sub", b.iota(c.net, Dim.of(0), cols, 1), c.net.constant(np.array(c.integer("k")), "i64")
    )
    return [b.cast(c.net, b.binary(c.net, "eq", row, column), dtype)]
