"""Smart constructors: every primitive of the frontend is made here, simplified while it is made.

What they remove: casts to the same type, reshapes of reshapes, adds of zero, integer arithmetic on shapes,
small constant sub-graphs, and differences of spelling (x / sqrt(y), x * (1 / sqrt(y)), x * pow(y, -0.5)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mapper.errors import ModelError
from mapper.frontend.contents import content_pair, dim_op, shape_arithmetic, with_content
from mapper.frontend.net import MAX_CONTENT, MAX_FOLDED, Array, Net, Value, numpy_of
from mapper.frontend.shapes import COMPARE, reshaped
from mapper.ir.dims import ONE, ZERO, Dim

_FOLD: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "pow": np.power, "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "eq": np.equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "neg": np.negative, "abs": np.abs, "exp": np.exp, "log": np.log,
    "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "not": np.logical_not, "isnan": np.isnan,
    "select": np.where, "sin": np.sin, "cos": np.cos, "reciprocal": np.reciprocal,
}  # fmt: skip
_HUGE = 1 << 31  # slice ends at or above this mean "to the end"


def is_float(value: Value) -> bool:
    """Whether the value's type is a floating-point one."""
    return value.dtype[0] == "f" or value.dtype == "bf16"


def _folded(net: Net, op: str, ins: Sequence[Value], dtype: str) -> Value | None:
    if op not in _FOLD or any(v.const is None or v.const.size > MAX_FOLDED for v in ins):
        return None
    shape = np.broadcast_shapes(*(v.const.shape for v in ins if v.const is not None))
    if math.prod(shape) > MAX_FOLDED:
        return None
    with np.errstate(all="ignore"):
        array = _FOLD[op](*(v.const for v in ins))
    return net.constant(np.asarray(array, numpy_of(dtype)), dtype)


def unary(net: Net, op: str, x: Value) -> Value:
    """An elementwise function of one operand."""
    folded = _folded(net, op, [x], "bool" if op == "isnan" else x.dtype)
    if folded is not None:
        return folded
    if op == "neg" and x.content is not None:
        return with_content(net, "neg", [x], tuple(-c for c in x.content), x.dims)
    if op == "reciprocal" and x.op == "sqrt":
        return net.make("rsqrt", [x.args[0]])
    if op in ("neg", "not", "reciprocal") and x.op == op:
        return x.args[0]
    return net.make(op, [x])


def cast(net: Net, x: Value, to: str) -> Value:
    """Conversion to another type; integer contents survive between integer types."""
    if x.dtype == to:
        return x
    if x.const is not None and x.const.size <= MAX_FOLDED:
        with np.errstate(all="ignore"):
            return net.constant(x.const.astype(numpy_of(to)), to)
    if x.op == "cast" and x.dtype in ("i64", "i32") and x.args[0].dtype in ("i64", "i32"):
        return cast(net, x.args[0], to)
    out = net.make("cast", [x], {"dtype": to})
    if x.content is not None and to in ("i64", "i32"):
        out.content = x.content
    return out


def binary(net: Net, op: str, a: Value, b: Value) -> Value:
    """An elementwise function of two operands with NumPy broadcasting."""
    found = shape_arithmetic(net, op, a, b)
    if found is None:
        found = _folded(net, op, [a, b], "bool" if op in COMPARE else a.dtype)
    if found is None and op == "div" and is_float(a) and a.const is not None and b.const is not None:
        with np.errstate(all="ignore"):
            found = net.constant(np.asarray(a.const / b.const, a.const.dtype), a.dtype)
    if found is None:
        found = _neutral(net, op, a, b)
    if found is None and is_float(a):
        found = _spelling(net, op, a, b)
    return found if found is not None else net.make(op, [a, b])


def _neutral(net: Net, op: str, a: Value, b: Value) -> Value | None:
    for x, y, commuted in ((a, b, False), (b, a, True)):
        if y.scalar is None or net.broadcast(x.dims, y.dims) != x.dims:
            continue
        right = op in ("add", "mul", "and", "or") or not commuted
        neutral = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "pow": 1.0, "and": 1.0, "or": 0.0}.get(op)
        if right and neutral is not None and y.scalar == neutral and (op != "and" or y.dtype == "bool"):
            return x
    return None


def _spelling(net: Net, op: str, a: Value, b: Value) -> Value | None:
    if op == "pow" and b.scalar is not None:
        if b.scalar == 2.0:
            return net.make("mul", [a, a])
        if b.scalar == 0.5:
            return unary(net, "sqrt", a)
        if b.scalar == -0.5:
            return net.make("rsqrt", [a])
        if b.scalar == -1.0:
            return unary(net, "reciprocal", a)
        if b.scalar == 3.0:
            return net.make("mul", [net.make("mul", [a, a]), a])
    if op == "div":
        if b.op == "sqrt":
            root = net.make("rsqrt", [b.args[0]])
            return root if a.scalar == 1.0 and a.rank <= root.rank else binary(net, "mul", a, root)
        if a.scalar == 1.0 and a.rank <= b.rank:
            return unary(net, "reciprocal", b)
    if op == "add" and b.rank == 1 and a.op == "reshape" and a.args[0].dims[-1:] == a.dims[-1:] != (ONE,):
        return reshape(net, binary(net, "add", a.args[0], b), a.dims)
    if op == "add" and a.rank == 1 and b.op == "reshape" and b.rank > 1:
        return binary(net, "add", b, a) if b.args[0].dims[-1:] == b.dims[-1:] != (ONE,) else None
    return None


def select(net: Net, condition: Value, a: Value, b: Value) -> Value:
    """Elementwise choice."""
    if condition.scalar is not None:
        chosen = a if condition.scalar else b
        if net.broadcast(condition.dims, a.dims, b.dims) == chosen.dims:
            return chosen
    pair = content_pair(a, b)
    if pair is not None and condition.const is not None and condition.const.size in (1, len(pair[0])):
        flags = np.broadcast_to(condition.const.reshape(-1), len(pair[0]))
        content = [x if f else y for f, x, y in zip(flags, pair[0], pair[1], strict=True)]
        return with_content(net, "select", [condition, a, b], content, pair[2])
    folded = _folded(net, "select", [condition, a, b], a.dtype)
    return folded if folded is not None else net.make("select", [condition, a, b])


def matmul(net: Net, a: Value, b: Value) -> Value:
    """Matrix product. A reshape of the rows of `a` moves behind a product with a stored matrix."""
    stored = b.weight is not None or (b.op == "transpose" and b.args[0].weight is not None)
    if stored and b.rank == 2 and a.op == "reshape" and a.rank >= 2 and a.args[0].rank >= 2:
        inner = a.args[0]
        if inner.dims[-1] == a.dims[-1]:
            return reshape(net, net.make("matmul", [inner, b]), (*a.dims[:-1], b.dims[-1]))
    return net.make("matmul", [a, b])


def reshape(net: Net, x: Value, target: Sequence[Dim | int]) -> Value:
    """Reshape to resolved dimensions (one may be -1); reshapes of reshapes are one."""
    dims = reshaped(x.dims, tuple(Dim.of(d) for d in target), net.origin)
    while x.op == "reshape":
        x = x.args[0]
    if dims == x.dims:
        return x
    if x.const is not None:
        return net.constant(x.const.reshape([d.value for d in dims]), x.dtype)
    if x.op == "transpose" and x.node and x.node.attrs["perm"] == (0, 2, 1) and dims[-2:] == x.dims[1:]:
        inner = reshape(net, x.args[0], [*dims[:-2], dims[-1], dims[-2]])  # leading axes are split first
        return transpose(net, inner, (*range(len(dims) - 2), len(dims) - 1, len(dims) - 2))
    if x.content is not None and len(dims) <= 1:
        return net.ints(x.content, len(dims))
    out = net.make("reshape", [x], {"shape": dims})
    out.content = x.content
    return out


def transpose(net: Net, x: Value, perm: Sequence[int]) -> Value:
    """Permutation of axes; permutations of permutations are one."""
    perm = tuple(perm)
    if x.op == "transpose" and x.node:
        inner = x.node.attrs["perm"]
        x, perm = x.args[0], tuple(inner[p] for p in perm)
    if perm == tuple(range(len(perm))):
        return x
    if x.const is not None:
        return net.constant(np.ascontiguousarray(x.const.transpose(perm)), x.dtype)
    return net.make("transpose", [x], {"perm": perm})


def expand(net: Net, x: Value, target: Sequence[Dim]) -> Value:
    """Broadcast to at least `target`."""
    dims = net.broadcast(x.dims, tuple(target))
    if dims == x.dims:
        return x
    if x.const is not None and all(d.is_const for d in dims):
        shape = [d.value for d in dims]
        if int(np.prod(shape, dtype=object)) <= MAX_CONTENT:
            return net.constant(np.broadcast_to(x.const, shape).copy(), x.dtype)
    if x.op == "expand" and x.node:
        x = x.args[0]
    out = net.make("expand", [x], {"shape": dims})
    short = len(dims) == 1 and dims[0].is_const and dims[0].value <= MAX_CONTENT
    if x.content is not None and len(x.content) == 1 and short:
        return net.ints(list(x.content) * dims[0].value)
    return out


def concat(net: Net, parts: Sequence[Value], axis: int) -> Value:
    """Concatenation; of shape vectors, it is a shape vector."""
    axis %= max(parts[0].rank, 1)
    if len(parts) == 1:
        return parts[0]
    entries = sum(len(p.content or ()) for p in parts)
    if all(p.content is not None and p.rank == 1 for p in parts) and entries <= MAX_CONTENT:
        return net.ints([c for p in parts for c in (p.content or ())])
    if all(p.const is not None for p in parts) and sum(_const(p).size for p in parts) <= MAX_FOLDED:
        return net.constant(np.concatenate([_const(p) for p in parts], axis), parts[0].dtype)
    perms = {p.node.attrs["perm"] if p.op == "transpose" and p.node else None for p in parts}
    if len(perms) == 1 and (perm := perms.pop()) is not None:  # joined as they lie, then turned once
        inner = concat(net, [p.args[0] for p in parts], perm[axis])
        return transpose(net, inner, perm)
    return net.make("concat", parts, {"axis": axis})


def _const(value: Value) -> Array:
    if value.const is None:
        raise ModelError("no constant")
    return value.const


def _bound(bound: Dim, size: Dim, step: int) -> Dim:
    if bound.is_const:
        value = bound.value
        if value >= _HUGE:
            return size
        if value < -_HUGE:
            return ZERO if step > 0 else Dim.of(-1)
        if value < 0:
            bound = size + value
            if bound.is_const and bound.value < 0:
                return ZERO if step > 0 else Dim.of(-1)
        elif size.is_const and value > size.value:
            return size
    elif (delta := bound - size).is_const and delta.value > 0:
        return size
    elif all(c < 0 for _, c in bound.terms):  # minus a size: counted from the end
        return size + bound
    return bound


def slice_(
    net: Net, x: Value, starts: Sequence[Dim], ends: Sequence[Dim], axes: Sequence[int], steps: Sequence[int]
) -> Value:
    """Slice with ONNX clamping; whole-axis slices vanish."""
    kept: list[tuple[Dim, Dim, int, int]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.rank
        size = x.dims[axis]
        low, high = _bound(start, size, step), _bound(end, size, step)
        if step < 0 and low == size:
            low = size - 1
        if step != 1 or low != ZERO or high != size:
            kept.append((low, high, axis, step))
    if not kept:
        return x
    kept.sort(key=lambda k: k[2])
    if x.content is not None and x.rank == 1 and all(k[0].is_const and k[1].is_const for k in kept):
        low, high, _, step = kept[0]
        stop: int | None = high.value if high.value >= 0 else None
        return net.ints(x.content[low.value : stop : step])
    if x.const is not None and all(k[0].is_const and k[1].is_const and k[1].value >= 0 for k in kept):
        index: list[slice] = [slice(None)] * x.rank
        for low, high, axis, step in kept:
            index[axis] = slice(low.value, high.value, step)
        return net.constant(x.const[tuple(index)].copy(), x.dtype)
    parts = _whole_parts(x, *kept[0]) if len(kept) == 1 else None
    if parts:
        return concat(net, parts, kept[0][2])
    attrs = {
        k: tuple(c) for k, c in zip(("starts", "ends", "axes", "steps"), zip(*kept, strict=True), strict=True)
    }
    return net.make("slice", [x], attrs)


def _whole_parts(x: Value, low: Dim, high: Dim, axis: int, step: int) -> list[Value]:
    """The parts of a concatenation that a slice takes, where it takes whole ones; else none."""
    if x.node is None or x.op != "concat" or x.node.attrs["axis"] != axis or step != 1:
        return []
    taken: list[Value] = []
    at = covered = ZERO
    for part in x.args:
        end = at + part.dims[axis]
        if all(d.is_const and d.value >= 0 for d in (at - low, high - end)):
            taken.append(part)
            covered = covered + part.dims[axis]
        at = end
    return taken if covered == high - low else []


def gather(net: Net, x: Value, index: Value, axis: int) -> Value:
    """Rows of `x` along `axis`; from a shape vector, its entries."""
    axis %= max(x.rank, 1)
    if x.content is not None and x.rank == 1 and index.const is not None and index.rank <= 1:
        picked = [x.content[int(i)] for i in index.const.reshape(-1)]
        return net.ints(picked, index.rank)
    rows = x.const is not None and index.const is not None and x.const.size * index.const.size <= MAX_FOLDED
    if rows and x.const is not None and index.const is not None:
        return net.constant(np.take(x.const, index.const, axis), x.dtype)
    if index.const is not None and index.rank == 0 and x.weight is None:
        at = int(index.const)
        end = at + 1 if at != -1 else _HUGE
        row = slice_(net, x, [Dim.of(at)], [Dim.of(end)], [axis], [1])
        return reshape(net, row, [d for i, d in enumerate(x.dims) if i != axis])
    run = _counting(index) if x.weight is None and x.dims[axis].is_const else None
    if run is not None and -x.dims[axis].value <= run[0] and run[1] <= x.dims[axis].value:
        start, end = (v + x.dims[axis].value if run[0] < 0 else v for v in run)
        return slice_(net, x, [Dim.of(start)], [Dim.of(end)], [axis], [1])
    return net.make("gather", [x, index], {"axis": axis})


def _counting(index: Value) -> tuple[int, int] | None:
    """(first, last + 1) of constant indices [n] that count up by one, of one sign."""
    if index.const is None or index.rank != 1 or not index.const.size:
        return None
    numbers = [int(v) for v in index.const]
    counts = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return (numbers[0], numbers[-1] + 1) if counts and (numbers[0] >= 0) == (numbers[-1] >= 0) else None


def reduce(net: Net, kind: str, x: Value, axes: Sequence[int], keepdims: bool) -> Value:
    """Reduction over `axes`; `kind` is sum, mean, max, min or prod."""
    chosen = tuple(sorted(a % max(x.rank, 1) for a in axes))
    if not chosen:
        return x
    if x.content is not None and x.rank == 1 and kind in ("sum", "prod", "max", "min"):
        total = x.content[0]
        for c in x.content[1:]:
            found = dim_op({"sum": "add", "prod": "mul"}.get(kind, kind), total, c)
            total = found if found is not None else total
        return net.ints([total], int(keepdims))
    return net.make("reduce", [x], {"kind": kind, "axes": chosen, "keepdims": keepdims})


def iota(net: Net, start: Dim, limit: Dim, step: int, dtype: str = "i64") -> Value:
    """start, start + step, ... below limit. Short ones of known length carry their contents."""
    length = (limit - start) if step == 1 else None
    if length is not None and length.is_const and 0 <= length.value <= MAX_CONTENT and dtype == "i64":
        return net.ints([start + i for i in range(length.value)])
    return net.make("iota", (), {"start": start, "limit": limit, "step": step, "dtype": dtype})


def shape_of(net: Net, x: Value, start: int = 0, end: int | None = None) -> Value:
    """The dimensions of `x` as a shape vector."""
    return net.ints(x.dims[start:end])
