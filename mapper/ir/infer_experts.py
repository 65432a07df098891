"""Inference rules of routing and experts."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.ir.dims import Dim
from mapper.ir.experts import MoeOp, RouteOp
from mapper.ir.infer import Call, rule
from mapper.ir.infer_primitives import same
from mapper.ir.types import TensorType

Types = Sequence[TensorType]


@rule(RouteOp)
def _route(call: Call) -> Types:
    logits, k = call.type("logits"), call.attrs["top_k"]
    call.need(logits.rank > 0 and k > 0, f"top_k {k} of logits {logits}")
    experts = logits.shape[-1]
    call.need(not experts.is_const or k <= experts.value, f"top_k {k} of {experts} experts")
    groups = call.attrs.get("groups") or 0
    if groups and experts.is_const:
        call.need(experts.value % groups == 0, f"{experts} experts in {groups} groups")
        call.need(0 < call.attrs.get("top_groups", 0) <= groups, "top_groups does not fit groups")
    if call.attrs.get("correction") is not None:
        same(call, call.weight("correction").shape[0], experts, "correction has another length")
    shape = [*logits.shape[:-1], Dim.of(k)]
    return [TensorType.of(shape, "i64"), TensorType.of(shape, logits.dtype)]


def expert_matrix(call: Call, name: str) -> tuple[Dim, Dim, Dim]:
    """(experts, inputs, outputs) of the stack of matrices that weight attribute `name` points to."""
    weight = call.weight(name)
    call.need(weight.rank == 3, f"{name} is {weight}, not a stack of matrices")
    experts, first, second = weight.shape
    return (experts, second, first) if call.attrs.get(f"{name}_transposed") else (experts, first, second)


def _bias(call: Call, name: str, experts: Dim, width: Dim) -> None:
    if call.attrs.get(name) is not None:
        kind = call.weight(name)
        call.need(kind.rank == 2, f"{name} is {kind}")
        same(call, kind.shape[0], experts, f"{name} has another number of experts")
        same(call, kind.shape[1], width, f"{name} has another width")


@rule(MoeOp)
def _moe(call: Call) -> Types:
    x, index, share = call.type("x"), call.type("index"), call.type("share")
    call.need(index.rank == share.rank == x.rank, f"x {x}, index {index}, share {share}")
    for a, b in zip(index.shape, share.shape, strict=True):
        same(call, a, b, "index and share differ")
    for a, b in zip(x.shape[:-1], index.shape[:-1], strict=True):
        same(call, a, b, "x and index differ in tokens")
    experts, inputs, inner = expert_matrix(call, "up")
    same(call, inputs, x.shape[-1], "inner dimensions of up differ")
    _bias(call, "up_bias", experts, inner)
    packed = call.attrs.get("packing", "none") != "none"
    gated = call.attrs.get("gate") is not None
    call.need(not (packed and gated), "packed experts have no gate of their own")
    if gated:
        count, inputs, width = expert_matrix(call, "gate")
        for a, b in ((count, experts), (inputs, x.shape[-1]), (width, inner)):
            same(call, a, b, "gate and up differ")
        _bias(call, "gate_bias", experts, inner)
    count, hidden, outputs = expert_matrix(call, "down")
    same(call, count, experts, "down has another number of experts")
    same(call, hidden * 2 if packed else hidden, inner, "inner dimensions of down differ")
    _bias(call, "down_bias", experts, outputs)
    return [TensorType.of([*x.shape[:-1], outputs], x.dtype)]
