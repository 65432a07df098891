"""Lowering of routing and experts."""

from __future__ import annotations

from mapper.ir.op import DataflowOp
from mapper_host.context import Context, rule
from mapper_host.opcodes import MOE, ROUTE, bits
from mapper_kernels.names import ACTIVATIONS, PACKINGS, SCORINGS

_MATRICES = ("gate", "up", "down")


@rule("route")
def _route(c: Context, op: DataflowOp) -> None:
    logits, correction = c.f32(op.operands[0]), c.weight("correction")
    index, share = c.out(0), c.f32_out(1)
    e = logits.shape[-1]
    rows = logits.items // e
    args = [
        rows, e, op.attr("top_k"), int(correction is not None), SCORINGS.index(op.attr("scoring")),
        op.attr("groups"), op.attr("top_groups"), int(op.attr("group_score") == "top2"),
        bits(op.attr("group_fill")), int(op.attr("normalise")), bits(op.attr("epsilon")),
        bits(op.attr("scale")),
    ]  # fmt: skip
    operands = [logits, *([] if correction is None else [correction]), index, share]
    c.emit(ROUTE, args, operands, 6 * logits.items, writes=2)


@rule("moe")
def _moe(c: Context, op: DataflowOp) -> None:
    x, index, share = c.f32(op.operands[0]), c.value(op.operands[1]), c.f32(op.operands[2])
    weights = {n: c.weight(n) for m in _MATRICES for n in (m, f"{m}_bias")}
    down, up = c.need("down"), c.need("up")
    inner, width = down.shape[1:][:: -1 if op.attr("down_transposed") else 1]
    d, experts, k = x.shape[-1], down.shape[0], index.shape[-1]
    rows, y = x.items // d, c.f32_out()
    gate = weights["gate"]
    args = [
        rows, experts, d, inner, width, k, PACKINGS.index(op.attr("packing")), int(gate is not None),
        ACTIVATIONS[op.attr("act")], *(int(op.attr(f"{m}_transposed")) for m in _MATRICES),
        *(int(weights[f"{m}_bias"] is not None) for m in _MATRICES), bits(op.attr("limit")),
        bits(op.attr("up_offset")), int(op.attr("share_input")), op.attr("round_block"),
    ]  # fmt: skip
    one = sum(v.items for v in (gate, up, down) if v is not None) // experts
    stored = sum(v.bytes for v in weights.values() if v is not None) // experts
    moved = min(rows * k, experts) * stored + x.bytes + index.bytes + share.bytes + y.bytes
    operands = [x, index, share, *(v for v in weights.values() if v is not None), y]
    c.emit(MOE, args, operands, rows * k * (2 * one + 6 * inner + 2 * width), bytes=moved)
