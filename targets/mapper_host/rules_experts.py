"""Lowering of routing and experts."""

from __future__ import annotations

from mapper.ir.op import DataflowOp
from mapper_host.context import Context, Matrix, rule
from mapper_host.opcodes import EXPERTS_DOWN, EXPERTS_UP, MOE, ROUTE, bits
from mapper_host.program import Value
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
    if c.serving and not op.attr("round_block"):
        _stacks(c, op)
    else:
        _dequantised(c, op)


def _stacks(c: Context, op: DataflowOp) -> None:
    """Experts in their stored format, in two steps."""
    x, index, share = c.f32(op.operands[0]), c.value(op.operands[1]), c.f32(op.operands[2])
    entering = [m for m in ("gate", "up") if op.attr(m) is not None]
    stacks = [(c.product(m, op.attr(f"{m}_transposed")), c.weight(f"{m}_bias")) for m in entering]
    down = (c.product("down", op.attr("down_transposed")), c.weight("down_bias"))
    (d, inner, out), k = (x.shape[-1], down[0].k, down[0].n), index.shape[-1]
    symbol = c.graph.weight(op, "down")
    assert symbol is not None
    rows, experts, shared = x.items // d, symbol.shape[0], int(op.attr("share_input"))
    head = [rows, k, experts]
    h, y = c.temporary((rows, k, inner), "f32"), c.f32_out()
    chosen = min(rows * k, experts)
    args = [
        *head, d, inner, shared, PACKINGS.index(op.attr("packing")), len(stacks) - 1,
        ACTIVATIONS[op.attr("act")], bits(op.attr("limit")), bits(op.attr("up_offset")),
    ]  # fmt: skip
    first = [x, index, *([share] if shared else [])]
    _emit(c, EXPERTS_UP, args, first, stacks, h, chosen, rows * k * 6 * inner)
    second = [h, index, *([] if shared else [share])]
    args = [*head, inner, out, int(not shared)]
    _emit(c, EXPERTS_DOWN, args, second, [down], y, chosen, rows * k * 2 * out)


def _emit(
    c: Context, opcode: int, args: list[int], entering: list[Value],
    stacks: list[tuple[Matrix, Value | None]], y: Value, chosen: int, flops: int,
) -> None:  # fmt: skip
    """Emit a step of `chosen` experts; flops: operations beside the products'."""
    pairs, experts = args[0] * args[1], args[2]
    weights: list[Value] = []
    for stack, bias in stacks:
        args = [*args, stack.format.code, int(stack.zeros is not None), int(bias is not None)]
        weights += [*stack.operands, *([] if bias is None else [bias])]
        flops += pairs * stack.n * (2 * stack.k + int(bias is not None))
    moved = chosen * (sum(v.bytes for v in weights) // experts) + sum(v.bytes for v in (*entering, y))
    c.emit(opcode, args, [*entering, *weights, y], flops, bytes=moved)


def _dequantised(c: Context, op: DataflowOp) -> None:
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
