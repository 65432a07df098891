"""Routing and experts as nodes.

top_k          logits -> the chosen experts' numbers and their shares, [tokens, 2 chosen]
align          -> blocks of rows by expert: expert (-1: none), then (token, choice) pairs (-1: padding)
places         -> where each pair's row is among the blocks' rows, [tokens, chosen]
expert_up      gathers tokens' rows, products with the block's expert, activation
expert_down    the product back
weighted_sum   the sum of each token's rows, weighted by its shares
share_bias     the shares' sum of the experts' biases, behind the sum over chips"""

from __future__ import annotations

import math
from typing import Any

from mapper.ir.op import DataflowOp
from mapper_gpu.extractor import Extractor, View, rule
from mapper_gpu.hardware import element_bytes
from mapper_gpu.nodes import Matrix, Pick, Value
from mapper_gpu.packed import packed_of
from mapper_gpu.routing import Routing, routing_of


@rule("route")
def _route(c: Extractor, op: DataflowOp) -> None:
    logits = c.view(op.operands[0], "rows")
    chosen, count = op.attr("top_k"), c.values[logits.name].width
    attrs = {
        k: op.attr(k)
        for k in (
            "scoring",
            "groups",
            "top_groups",
            "group_score",
            "group_fill",
            "normalise",
            "epsilon",
            "scale",
        )
    }
    if attrs["group_fill"] == -math.inf:
        attrs["group_fill"] = None  # a plan is JSON, which has no infinity
    made = c.add(
        "top_k", [logits.name], c.fresh(2 * chosen), chosen=chosen, experts=count,
        correction=c.vector(op.attr("correction")), **attrs,
    )  # fmt: skip
    for result in op.results:
        c.views[result] = View(made, "routing", count)


def _blocks(c: Extractor, routing: View, chosen: int) -> tuple[Routing, str, str]:
    """(shape of the blocks, value of the blocks, value of the places) of a routing."""
    how = routing_of(c.height, routing.data, chosen)
    attrs: dict[str, Any] = {"experts": how.count, "chosen": chosen, "tile": how.tile, "blocks": how.most}
    names = []
    for kind, rows, width in (("align", how.most, 1 + how.tile), ("places", c.height, chosen)):
        name = c.fresh(width)
        c.values[name] = Value(rows, width, "f32")
        names.append(c.add(kind, [routing.name], name, **attrs))
    return how, names[0], names[1]


@rule("moe")
def _moe(c: Extractor, op: DataflowOp) -> None:
    if op.attr("round_block"):
        c.fail("activations rounded in blocks")
    x, index, share = (
        c.view(v, form) for v, form in zip(op.operands, ("rows", "routing", "routing"), strict=True)
    )
    if index.name != share.name:
        c.fail("shares that are not those of the routing")
    chosen = c.values[index.name].width // 2
    how, blocks, places = _blocks(c, index, chosen)
    c.rows[c.row]["flops"] = c.rows[c.row]["weight_bytes"] = 0
    inner = _up(c, op, how, x.name, blocks, index.name)
    down = _stack(c, how, op.attr("down"), not op.attr("down_transposed"))
    made = c.fresh(down.n)
    c.values[made] = Value(how.most * how.tile, down.n, "f32")
    c.add("expert_down", [inner, blocks], made, [down], name="expert_down", routing=how)
    total = c.add(
        "weighted_sum", [made, index.name, places], c.fresh(down.n), weighted=not op.attr("share_input"),
        pairs=how.pairs, experts=how.count,
    )  # fmt: skip
    bias = op.attr("down_bias")
    if bias is not None:
        weighted = not op.attr("share_input")
        table = _table(c, bias, down.n, "", 0, None)
        total = c.add("share_bias", [total, index.name], c.fresh(down.n), biases=table, weighted=weighted)
    c.views[op.results[0]] = View(total, "rows")


def _up(c: Extractor, op: DataflowOp, how: Routing, x: str, blocks: str, routing: str) -> str:
    packing, names = op.attr("packing"), ["up"]
    turned, bias = not op.attr("up_transposed"), op.attr("up_bias")
    whole = c.known(op.attr("up"))
    width = whole.shape[2 if turned else 1]
    parts: list[tuple[Matrix, Any]] = []
    if packing == "none":
        names = ["gate", "up"] if op.attr("gate") is not None else ["up"]
        for name in names:
            w = _stack(c, how, op.attr(name), not op.attr(f"{name}_transposed"))
            b = op.attr(f"{name}_bias")
            parts.append((w, None if b is None else _table(c, b, w.n, "n", 0, None)))
    else:
        half = width // 2
        for i in range(2):
            first, pick = (i * half, None) if packing == "halves" else (0, Pick(2, (i,)))
            w = _stack(c, how, op.attr("up"), turned, first, half, pick)
            parts.append((w, None if bias is None else _table(c, bias, half, "n", first, pick)))
    made = c.fresh(parts[-1][0].n)
    c.values[made] = Value(how.most * how.tile, parts[-1][0].n, "f32")
    attrs = {f"bias{i}": b for i, (_, b) in enumerate(parts) if b is not None}
    inputs = [x, blocks, *([routing] if op.attr("share_input") else [])]
    return c.add(
        "expert_up", inputs, made, [w for w, _ in parts], name="expert_up", routing=how, act=op.attr("act"),
        limit=op.attr("limit"), offset=op.attr("up_offset"), **attrs,
    )  # fmt: skip


def _stack(
    c: Extractor, how: Routing, symbol: str, turned: bool, first: int = 0, count: int = 0,
    pick: Pick | None = None,
) -> Matrix:  # fmt: skip
    """The weights [n, k] of all experts; `turned` where each is stored as [k, n]."""
    weight = c.known(symbol)
    low = packed_of(weight, turned)
    if weight.packing is not None and low is None:
        c.fail(f"experts in low bits of a kind that tiles do not decode ({weight.packing.scheme.name})")
    n, k = weight.shape[1:][::-1] if turned else weight.shape[1:]
    rows = count or n
    # at least one token's experts are read, whatever the routing
    each = k * element_bytes(c.form) if low is None else low.row_bytes(k)
    c.rows[c.row]["weight_bytes"] += int(how.chosen * rows * each)
    c.rows[c.row]["flops"] += 2 * how.pairs * rows * k
    of = 0 if rows == n or pick is not None else n
    used = min(how.count, how.most, max(how.chosen, round(how.distinct)))
    return Matrix(
        symbol, rows, k, c.form, used, how.count, first=first, of=of, turned=turned, pick=pick, low=low
    )


def _table(
    c: Extractor, symbol: str, width: int, split: str, first: int, pick: Pick | None
) -> dict[str, Any]:
    """A vector per expert, in f32."""
    weight = c.known(symbol)
    return {
        "symbol": symbol, "length": width, "split": split, "first": first, "pick": pick,
        "experts": weight.shape[0],
    }  # fmt: skip
