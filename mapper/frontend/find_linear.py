"""Recognises products with stored matrices, table look-ups, activations, and the layer that makes logits."""

from __future__ import annotations

from typing import Any

from mapper.frontend.agree import Checker
from mapper.frontend.cut import ELEMENTWISE, View, forward
from mapper.frontend.net import Node, Value, walk
from mapper.frontend.rewrite import Match
from mapper.frontend.symbols import lookups, strip_views, token_inputs

_SMALL = (5, 7)  # stand-in sizes of a matrix product: no attribute holds them
KINDS = {
    "sigmoid": ("silu", "gelu_quick"),
    "erf": ("gelu",),
    "tanh": ("gelu_tanh",),
    "relu": ("relu_squared", "relu"),
    "exp": ("silu",),
}


def matrix(value: Value) -> tuple[Value, bool] | None:
    """(stored matrix, whether it is read transposed)."""
    if value.rank != 2:
        return None
    if value.weight is not None:
        return value, False
    if value.op == "transpose" and value.args[0].weight is not None:
        return value.args[0], True
    return None


def bias_of(value: Value) -> Value | None:
    """The stored vector behind a value of rank 1, or of shape [1, ..., 1, n]."""
    inner = value.args[0] if value.op == "reshape" and value.dims[-1:] == value.args[0].dims[-1:] else value
    return inner if inner.weight is not None and inner.rank == 1 else None


def linears(view: View, checker: Checker) -> list[Match]:
    """Products with a stored matrix, each with its bias where one is added, and embeddings."""
    found = []
    for node in view.nodes:
        if node.op == "matmul" and node.inputs[0].rank >= 2:
            stored = matrix(node.inputs[1])
            if stored is not None and node.inputs[0].weight is None:
                found.append(_linear(view, checker, node, *stored))
    return [m for m in found if m is not None] + embeds(view, checker)


def _linear(view: View, checker: Checker, node: Node, weight: Value, transposed: bool) -> Match | None:
    x, out = node.inputs[0], node.outputs[0]
    attrs: dict[str, Any] = {"transposed": transposed}
    if x.node is not None and x.op == "round_blocks":
        attrs["round_block"] = x.node.attrs["block"]
        x = x.args[0]
    k, n = _SMALL
    shapes = {
        id(x): (2, 3, k)[-x.rank :] if x.rank < 4 else (2, 2, 3, k),
        id(weight): (n, k) if transposed else (k, n),
    }
    bound = (x, weight)
    reader = view.sole_reader(out)
    if reader is not None and reader.op == "add":
        other = reader.inputs[1] if reader.inputs[0] is out else reader.inputs[0]
        bias = bias_of(other)
        if bias is not None and bias.dims[-1] == out.dims[-1] and reader.outputs[0].dims == out.dims:
            stop = (*bound, bias)
            biased = Match(reader.outputs[0], "linear", ("x", "weight", "bias"), stop, attrs)
            direct = bias if other is bias else None
            if checker.holds(biased, {**shapes, id(bias): (n,)} if direct is not None else None):
                return biased
    plain = Match(out, "linear", ("x", "weight"), bound, attrs)
    return plain if checker.holds(plain, shapes) else None


def embeds(view: View, checker: Checker) -> list[Match]:
    """Rows of a stored table: at the token ids, or added to the hidden state (positions, segments)."""
    tokens = {id(v) for v in token_inputs(view.net, view.nodes)}
    found = []
    for node in view.nodes:
        if (
            node.op != "gather"
            or node.attrs["axis"]
            or node.inputs[0].weight is None
            or node.inputs[0].rank != 2
        ):
            continue
        table, ids = node.inputs
        if (ids.const is not None and ids.rank == 0) or view.is_data(ids) or _chosen(ids):
            continue  # a row picked once, or picked by what was computed: routing
        added = any(n.op == "add" for v in _same(view, node.outputs[0]) for n in view.next_nodes(v))
        if id(strip_views(ids)) in tokens or added:
            match = Match(node.outputs[0], "embed", ("ids", "table"), (ids, table))
            if checker.holds(match, {id(table): (4, 6)}):
                found.append(match)
    return found


def _chosen(ids: Value) -> bool:
    return any(v.op in ("topk", "argmax") for v in walk(ids, lambda v: v.node is None))


def _same(view: View, value: Value) -> list[Value]:
    through = forward(view, value, lambda n: n.op in ("reshape", "cast") or _scaled(n), 2)
    return [v for v in through if v is value or v.op != "add"]


def _scaled(node: Node) -> bool:
    return node.op == "mul" and any(v.scalar is not None for v in node.inputs)


def activations(view: View, checker: Checker) -> list[Match]:
    """Activation functions, whatever their spelling, anchored on their transcendental."""
    found: dict[int, Match] = {}
    covered: set[int] = set()
    for node in view.nodes:
        if node.op not in KINDS or not view.is_data(node.outputs[0]):
            continue
        for out in forward(view, node.outputs[0], lambda n: n.op in ELEMENTWISE, 4):
            match = None if id(out) in covered else _activation(view, checker, out, node)
            if match is not None:
                found[id(out)] = match
                covered.add(id(out))
                break
    return list(found.values())


def _activation(view: View, checker: Checker, out: Value, anchor: Node) -> Match | None:
    before = view.order[id(anchor.outputs[0])]
    for x, free in view.sources(out, ELEMENTWISE, 16):
        if free:
            return None
        if view.order.get(id(x), -1) >= before or x.dims != out.dims:
            continue
        shapes = {id(x): (2, 3, 8)[-x.rank :]} if x.rank < 4 else None
        for kind in KINDS[anchor.op]:
            match = Match(out, "activation", ("x",), (x,), {"kind": kind})
            if checker.holds(match, shapes):
                return match
    return None


def heads(view: View, checker: Checker) -> list[Match]:
    """The linear layer that makes the logits."""
    tokens = token_inputs(view.net, view.nodes)
    tables = {table.dims[0] for table, ids in lookups(view.nodes) if strip_views(ids) in tokens}
    found = []
    for _, value in view.net.outputs:
        for _ in range(12):
            if value.node is None or value.op in ("linear", "lm_head"):
                break
            data = [v for v in value.args if view.is_data(v)]
            if len(data) != 1 or value.op not in ELEMENTWISE | {"reshape", "slice", "cast"}:
                break
            value = data[0]
        if value.op == "linear" and value.node and value.dims[-1] in tables:
            node = value.node
            attrs = {k: v for k, v in node.attrs.items() if k != "slots"}
            found.append(Match(value, "lm_head", node.attrs["slots"], node.inputs, attrs))
    return found
