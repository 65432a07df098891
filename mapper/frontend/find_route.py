"""Recognises how a router chooses experts: from its logits to the chosen indices and their shares."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as combinations
from typing import Any

from mapper.frontend.agree import Checker
from mapper.frontend.cut import View, numbers_in, region_of
from mapper.frontend.find_linear import bias_of
from mapper.frontend.net import Node, Value, walk
from mapper.frontend.rewrite import Match


def routes(view: View, checker: Checker, found: list[Match]) -> list[Match]:
    """The routing of every match of experts whose routing is of a known kind."""
    return [m for m in (_route(view, checker, match) for match in found) if m is not None]


def _route(view: View, checker: Checker, moe: Match) -> Match | None:
    index, share = moe.inputs[1], moe.inputs[2]
    if index.op != "topk" or index.node is None or not index.node.attrs["largest"]:
        return None
    logits = _logits(view, [index, share])
    if logits is None or logits.rank != index.rank or not logits.dims[-1].is_const:
        return None
    region = region_of([index, share], [logits])
    for attrs, correction in _forms(region, index.node, logits.dims[-1].value):
        slots = {"logits": logits} | ({} if correction is None else {"correction": correction})
        match = Match(index, "route", tuple(slots), tuple(slots.values()), attrs, more=(share,))
        if checker.holds(match):
            return match
    return None


def _logits(view: View, results: list[Value]) -> Value | None:
    """The value that scores and shares are made of: the router's product, in the shape that is used."""
    roots: dict[int, Value] = {}

    def ends(value: Value) -> bool:
        product = value.op in ("linear", "matmul") or (value.op == "reshape" and value.args[0].op == "linear")
        if product or (value.source and view.is_data(value)):
            roots[id(value)] = value
        return product or value.node is None

    for result in results:
        for _ in walk(result, ends):
            pass
    return next(iter(roots.values())) if len(roots) == 1 else None


def _forms(region: list[Node], top: Node, experts: int) -> Iterator[tuple[dict[str, Any], Value | None]]:
    """(attributes, correction) of every form that the operators of a region could have."""
    ops = {n.op for n in region}
    scorings = [s for s, op in _SCORINGS if op in ops] or ["none"]
    vectors = [v for n in region if n.op == "add" for a in n.inputs if (v := bias_of(a)) is not None]
    corrections: list[Value | None] = [v for v in vectors if v.dims[0].value == experts] or [None]
    scales = [1.0, *(v for v in numbers_in(region, "mul", "div"))]
    scales += [1.0 / v for v in scales if v]
    offsets = [0.0, *(v for v in numbers_in(region, "add", "max") if v > 0)]
    sums = any(n.op == "reduce" and n.attrs["kind"] == "sum" for n in region)
    normalise = [(False, 0.0), *((True, e) for e in offsets)] if sums else [(False, 0.0)]
    groups = list(_groupings(region, top, experts)) or [{}]
    for scoring, correction, (by_sum, eps), scale, group in combinations(
        scorings, corrections, normalise, dict.fromkeys(scales), groups
    ):
        attrs = {
            "top_k": top.attrs["k"],
            "scoring": scoring,
            "normalise": by_sum,
            "epsilon": eps,
            "scale": scale,
        }
        yield attrs | group, correction


_SCORINGS = (("softmax", "softmax"), ("topk_softmax", "softmax"), ("sigmoid", "sigmoid"))


def _groupings(region: list[Node], top: Node, experts: int) -> Iterator[dict[str, Any]]:
    """Ways in which experts may be chosen in groups: by a second choice, among runs of them."""
    others = [n for n in region if n.op == "topk" and n is not top]
    fills = [v.scalar for n in region if n.op == "select" for v in n.inputs[1:] if v.scalar is not None]
    fills += [0.0] if any(n.op == "mul" for n in region) else []
    for node in others:
        count = node.inputs[0].dims[-1]
        if not count.is_const or count.value < 2 or experts % count.value:
            continue
        for score, fill in combinations(("max", "top2"), dict.fromkeys(fills)):
            attrs = {"groups": count.value, "top_groups": node.attrs["k"]}
            yield {**attrs, "group_score": score, "group_fill": fill}
