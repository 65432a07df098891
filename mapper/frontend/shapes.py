"""Shape and type rules of the canonical primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mapper.errors import ModelError
from mapper.frontend.net import Dims, Net, Value, check_dims, product, rule
from mapper.ir.dims import ONE, ZERO, Dim

UNARY = [
    "neg",
    "abs",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sin",
    "cos",
    "tan",
    "tanh",
    "erf",
    "sigmoid",
    "relu",
    "floor",
    "ceil",
    "round",
    "sign",
    "not",
    "atan",
]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "mod",
    "min",
    "max",
    "and",
    "or",
    "xor",
    "bitwise_and",
    "bitwise_or",
]
COMPARE = ["eq", "lt", "le", "gt", "ge"]
Types = list[tuple[Dims, str]]


@rule(*UNARY, "softmax", "cumsum", "trilu", "round_blocks")
def _same(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(ins[0].dims, ins[0].dtype)]


@rule("cast")
def _cast(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(ins[0].dims, attrs["dtype"])]


@rule("isnan", "isinf")
def _test(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(ins[0].dims, "bool")]


@rule(*BINARY)
def _binary(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    if ins[0].dtype != ins[1].dtype:
        raise ModelError(f"{net.origin}: operands of types {ins[0].dtype} and {ins[1].dtype}")
    return [(net.broadcast(ins[0].dims, ins[1].dims), ins[0].dtype)]


@rule(*COMPARE)
def _compare(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(net.broadcast(ins[0].dims, ins[1].dims), "bool")]


@rule("select")
def _select(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(net.broadcast(*(v.dims for v in ins)), ins[1].dtype)]


@rule("matmul")
def _matmul(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    a, b = ins[0].dims, ins[1].dims
    if not a or not b:
        raise ModelError(f"{net.origin}: matrix product of a scalar")
    left = a if len(a) > 1 else (ONE, *a)
    right = b if len(b) > 1 else (*b, ONE)
    net.same(left[-1], right[-2])
    out = net.broadcast(left[:-2], right[:-2])
    if len(a) > 1:
        out = (*out, left[-2])
    if len(b) > 1:
        out = (*out, right[-1])
    return [(out, ins[0].dtype)]


def reduced(dims: Dims, axes: Sequence[int], keepdims: bool) -> Dims:
    """A shape after reduction over `axes` (non-negative)."""
    if keepdims:
        return tuple(ONE if i in axes else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in axes)


@rule("reduce")
def _reduce(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(reduced(ins[0].dims, attrs["axes"], attrs["keepdims"]), ins[0].dtype)]


@rule("argmax")
def _argmax(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(reduced(ins[0].dims, [attrs["axis"]], attrs["keepdims"]), "i64")]


@rule("topk")
def _topk(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    dims = tuple(Dim.of(attrs["k"]) if i == attrs["axis"] else d for i, d in enumerate(ins[0].dims))
    return [(dims, ins[0].dtype), (dims, "i64")]


@rule("reshape", "expand")
def _reshape(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(attrs["shape"], ins[0].dtype)]


@rule("transpose")
def _transpose(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(tuple(ins[0].dims[i] for i in attrs["perm"]), ins[0].dtype)]


@rule("concat")
def _concat(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    axis = attrs["axis"]
    dims = list(ins[0].dims)
    for other in ins[1:]:
        if other.rank != len(dims):
            raise ModelError(f"{net.origin}: concatenation of ranks {len(dims)} and {other.rank}")
        for i, d in enumerate(other.dims):
            if i == axis:
                dims[i] = dims[i] + d
                check_dims((dims[i],), net.origin)
            else:
                net.same(dims[i], d)
    return [(tuple(dims), ins[0].dtype)]


@rule("slice")
def _slice(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    dims = list(ins[0].dims)
    for start, end, axis, step in zip(
        attrs["starts"], attrs["ends"], attrs["axes"], attrs["steps"], strict=True
    ):
        length = end - start if step > 0 else start - end
        dims[axis] = length if abs(step) == 1 else (length + (abs(step) - 1)) // abs(step)
        if dims[axis].is_const and dims[axis].value < 0:
            dims[axis] = ZERO
    return [(tuple(dims), ins[0].dtype)]


@rule("gather")
def _gather(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    axis = attrs["axis"]
    return [(ins[0].dims[:axis] + ins[1].dims + ins[0].dims[axis + 1 :], ins[0].dtype)]


@rule("gather_elements")
def _gather_elements(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(ins[1].dims, ins[0].dtype)]


@rule("gather_nd")
def _gather_nd(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    batch, last = attrs["batch_dims"], ins[1].dims[-1].value
    return [(ins[1].dims[:-1] + ins[0].dims[batch + last :], ins[0].dtype)]


@rule("scatter_nd", "scatter_elements")
def _scatter(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(ins[0].dims, ins[0].dtype)]


@rule("pad")
def _pad(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    dims = tuple(d + b + a for d, b, a in zip(ins[0].dims, attrs["before"], attrs["after"], strict=True))
    return [(dims, ins[0].dtype)]


@rule("tile")
def _tile(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [(tuple(d * r for d, r in zip(ins[0].dims, attrs["repeats"], strict=True)), ins[0].dtype)]


@rule("iota")
def _iota(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    length, step = attrs["limit"] - attrs["start"], attrs["step"]
    if step < 0:
        length = -length
    return [((length if abs(step) == 1 else (length + (abs(step) - 1)) // abs(step),), attrs["dtype"])]


@rule("dims")
def _dims(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    return [((Dim.of(len(attrs["values"])),) if attrs["rank"] else (), "i64")]


@rule("conv")
def _conv(net: Net, ins: Sequence[Value], attrs: dict[str, Any]) -> Types:
    spatial = []
    for i, d in enumerate(ins[0].dims[2:]):
        reach = (ins[1].dims[i + 2] - 1) * attrs["dilations"][i] + 1
        spatial.append((d + attrs["before"][i] + attrs["after"][i] - reach) // attrs["strides"][i] + 1)
    return [((ins[0].dims[0], ins[1].dims[0], *spatial), ins[0].dtype)]


def reshaped(dims: Dims, target: Sequence[Dim], where: str) -> Dims:
    """`target` with its -1 resolved. Cancels equal dimensions first, so that sums divide exactly."""
    unknown = [i for i, d in enumerate(target) if d.is_const and d.value == -1]
    if len(unknown) > 1:
        raise ModelError(f"{where}: reshape to a shape with two unknown dimensions")
    have = list(dims)
    rest = []
    for i, d in enumerate(target):
        if i in unknown:
            continue
        if d in have:
            have.remove(d)
        else:
            rest.append(d)
    if not unknown:
        return tuple(target)
    total, known = product(have), product(rest)
    if known == ZERO:
        raise ModelError(f"{where}: reshape with an unknown dimension beside an empty one")
    found = total // known
    return tuple(found if i in unknown else d for i, d in enumerate(target))
