"""Inference rules of the primitives."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.ir.dims import ONE, Dim
from mapper.ir.infer import Call, broadcast, rule
from mapper.ir.primitives_compute import (
    ArgmaxOp,
    ConvOp,
    CumsumOp,
    MatmulOp,
    ReduceOp,
    RoundBlocksOp,
    SoftmaxOp,
    TopkOp,
)
from mapper.ir.primitives_elementwise import (
    BinaryOp,
    CastOp,
    CompareOp,
    IsInfOp,
    IsNaNOp,
    NotOp,
    PowOp,
    SelectOp,
    UnaryOp,
)
from mapper.ir.types import TensorType

Types = Sequence[TensorType]


@rule(UnaryOp)
def _unary(call: Call) -> Types:
    return [call.type("x")]


@rule(SoftmaxOp, CumsumOp)
def _along_axis(call: Call) -> Types:
    x = call.type("x")
    call.axis(call.attrs["axis"], x.rank)
    return [x]


@rule(RoundBlocksOp)
def _round_blocks(call: Call) -> Types:
    call.need(call.attrs["block"] > 0 and call.type("x").rank > 0, f"blocks of {call.attrs['block']}")
    return [call.type("x")]


@rule(NotOp, IsNaNOp, IsInfOp)
def _predicate(call: Call) -> Types:
    return [TensorType.of(call.type("x").shape, "bool")]


@rule(CastOp)
def _cast(call: Call) -> Types:
    return [TensorType.of(call.type("x").shape, call.attrs["dtype"])]


@rule(BinaryOp)
def _binary(call: Call) -> Types:
    a, b = call.type("a"), call.type("b")
    call.need(a.dtype == b.dtype or call.cls is PowOp, f"operand types differ: {a.dtype} and {b.dtype}")
    return [TensorType.of(broadcast(call, a.shape, b.shape), a.dtype)]


@rule(CompareOp)
def _compare(call: Call) -> Types:
    return [TensorType.of(_binary(call)[0].shape, "bool")]


@rule(SelectOp)
def _select(call: Call) -> Types:
    condition, a, b = call.type("condition"), call.type("a"), call.type("b")
    call.need(condition.dtype == "bool", f"the condition is {condition.dtype}, not bool")
    call.need(a.dtype == b.dtype, f"operand types differ: {a.dtype} and {b.dtype}")
    return [TensorType.of(broadcast(call, condition.shape, a.shape, b.shape), a.dtype)]


def same(call: Call, a: Dim, b: Dim, what: str) -> None:
    """Raises where two dimensions are different numbers."""
    call.need(a == b or not (a.is_const and b.is_const), f"{what}: {a} against {b}")


@rule(MatmulOp)
def _matmul(call: Call) -> Types:
    a, b = call.type("a"), call.type("b")
    call.need(a.rank > 0 and b.rank > 0, "a scalar operand")
    call.need(a.dtype == b.dtype, f"operand types differ: {a.dtype} and {b.dtype}")
    same(call, a.shape[-1], b.shape[-2] if b.rank > 1 else b.shape[0], "inner dimensions differ")
    rows = a.shape[-2:-1] if a.rank > 1 else ()
    columns = b.shape[-1:] if b.rank > 1 else ()
    leading = broadcast(call, a.shape[:-2], b.shape[:-2]) if max(a.rank, b.rank) > 2 else ()
    return [TensorType.of([*leading, *rows, *columns], a.dtype)]


@rule(ConvOp)
def _conv(call: Call) -> Types:
    x, w = call.type("x"), call.type("w")
    spatial = x.rank - 2
    call.need(spatial in (1, 2) and w.rank == x.rank, f"ranks {x.rank} and {w.rank}")
    strides, pads, dilations = call.attrs["strides"], call.attrs["pads"], call.attrs["dilations"]
    call.need(
        len(strides) == len(dilations) == spatial and len(pads) == 2 * spatial, "strides, pads or dilations"
    )
    same(call, x.shape[1], w.shape[1] * call.attrs["group"], "channels differ")
    dims = [x.shape[0], w.shape[0]]
    for i in range(spatial):
        reach = (w.shape[2 + i] - 1) * dilations[i] + 1
        dims.append((x.shape[2 + i] + pads[i] + pads[spatial + i] - reach) // strides[i] + 1)
    return [TensorType.of(dims, x.dtype)]


@rule(ReduceOp)
def _reduce(call: Call) -> Types:
    x = call.type("x")
    axes = call.attrs.get("axes")
    chosen = set(range(x.rank)) if axes is None else {call.axis(a, x.rank) for a in axes}
    return [TensorType.of(_reduced(x, chosen, call.attrs["keepdims"]), x.dtype)]


def _reduced(x: TensorType, axes: set[int], keepdims: bool) -> list[Dim]:
    return [ONE if i in axes else d for i, d in enumerate(x.shape) if keepdims or i not in axes]


@rule(ArgmaxOp)
def _argmax(call: Call) -> Types:
    x = call.type("x")
    axes = {call.axis(call.attrs["axis"], x.rank)}
    return [TensorType.of(_reduced(x, axes, call.attrs["keepdims"]), "i64")]


@rule(TopkOp)
def _topk(call: Call) -> Types:
    x = call.type("x")
    axis = call.axis(call.attrs["axis"], x.rank)
    dims = [Dim.of(call.attrs["k"]) if i == axis else d for i, d in enumerate(x.shape)]
    return [TensorType.of(dims, x.dtype), TensorType.of(dims, "i64")]
