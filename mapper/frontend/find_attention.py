"""Recognises attention, anchored on softmax, and the cache append before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mapper.frontend import build
from mapper.frontend.agree import Checker
from mapper.frontend.cut import View
from mapper.frontend.net import Net, Node, Value, product
from mapper.frontend.rewrite import Match
from mapper.ir.dims import ONE

LOWEST = -65504.0  # the least number of half precision


@dataclass
class Scores:
    """What lies between the product of queries and keys and the softmax."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Value] = field(default_factory=list)
    product: Node | None = None


def attentions(view: View, checker: Checker) -> list[Match]:
    """softmax(scale q k^T + mask) v, with the scale wherever it is applied and shared key-value heads."""
    found = []
    for node in view.nodes:
        if node.op == "softmax" and view.is_data(node.outputs[0]):
            match = _attention(view, node)
            if match is not None and checker.holds(match):
                found.append(match)
    return found


def _attention(view: View, softmax: Node) -> Match | None:
    axis, rank = softmax.attrs["axis"], softmax.outputs[0].rank
    if axis % rank != rank - 1 or rank not in (3, 4):
        return None
    net, sinks = view.net, read_sinks(view.net, softmax)
    scores = read_scores(view, sinks[0] if sinks else softmax.inputs[0])
    final = _weighted_sum(view, softmax.outputs[0], sinks is not None)
    if scores is None or scores.product is None or final is None:
        return None
    out, values = final
    q, first = strip_scale(net, scores.product.inputs[0])
    keys, second = strip_scale(net, scores.product.inputs[1])
    q4, k4, v4 = as_heads(q), as_heads(transposed_keys(net, keys)), as_heads(values)
    if q4 is None or k4 is None or v4 is None or out.rank not in (3, 4):
        return None
    out4 = out if out.rank == 4 else _split_result(view, out, q4)
    mask = joined_mask(net, scores.masks, q4)
    if out4 is None or (scores.masks and mask is None):
        return None
    operands = {"q": q4, "k": shared(k4), "v": shared(v4)}
    operands |= {} if mask is None else {"mask": mask}
    operands |= {"sinks": sinks[1]} if sinks else {}
    attrs = {"scale": scores.scale * first * second, "softcap": scores.softcap}
    bounds = grounded(view, operands.values())
    return Match(out4, "attention", tuple(operands), tuple(operands.values()), attrs, bounds)


def joined_mask(net: Net, masks: list[Value], q: Value) -> Value | None:
    """The sum of the masks, each against [B, H, S, T]; those against [B*H, S, T] are viewed so."""
    total: Value | None = None
    for mask in masks:
        if mask.rank == 3 and mask.dims[0] not in (ONE, q.dims[1]):
            if mask.dims[0] != q.dims[0] * q.dims[1]:
                return None
            mask = build.reshape(net, mask, [*q.dims[:2], *mask.dims[1:]])
        total = mask if total is None else build.binary(net, "add", total, mask)
    return total


def read_sinks(net: Net, softmax: Node) -> tuple[Value, Value] | None:
    """(scores, stored vector of one more score per head) where the softmax runs over both."""
    value = softmax.inputs[0]
    if value.op == "sub" and value.args[1].op == "reduce" and value.args[1].args[0] is value.args[0]:
        value = value.args[0]
    if value.op != "concat" or len(value.args) != 2 or value.rank != 4:
        return None
    scores, extra = value.args
    while extra.op in ("expand", "reshape", "cast"):
        extra = extra.args[0]
    if extra.weight is None or product(extra.dims) != scores.dims[1]:
        return None
    return scores, build.reshape(net, extra, [scores.dims[1]])


def grounded(view: View, values: Iterable[Value]) -> tuple[Value, ...]:
    """The values of the original graph that some values are views of. Recognition puts views on top, and the
    graph may hold an equal view elsewhere (keys that are outputs): so the values behind all views."""
    found: dict[int, Value] = {}
    stack = list(values)
    while stack:
        value = stack.pop()
        known = id(value) in view.order and value.op not in ("reshape", "transpose")
        if value.node is None or known:
            found[id(value)] = value
        else:
            stack.extend(value.args)
    return tuple(found.values())


def read_scores(view: View, value: Value) -> Scores | None:
    """From the softmax's operand back to the product; None where something else lies between."""
    out = Scores()
    outer = 1.0  # scale applied after what was met so far
    for _ in range(16):
        node = value.node
        if node is None:
            return None
        if node.op == "matmul":
            out.product = node
            out.scale *= outer
            return out
        following = _peel(view, node, out)
        if following is None:
            return None
        value = following
    return None


def _peel(view: View, node: Node, out: Scores) -> Value | None:
    if node.op in ("cast", "reshape"):
        return node.inputs[0]
    if node.op in ("mul", "div"):
        a, b = node.inputs
        if node.op == "mul" and a.scalar is not None:
            a, b = b, a
        if b.scalar is None:
            return None
        return _scaled(a, b.scalar if node.op == "mul" else 1.0 / b.scalar, out)
    if node.op == "add":
        data = [v for v in node.inputs if view.is_data(v)]
        other = [v for v in node.inputs if not view.is_data(v)]
        if len(data) != 1 or out.scale != 1.0 or out.softcap:
            return None
        mask = other[0]
        if mask.rank == 3 and node.outputs[0].rank == 4:  # [H, 1, T], against heads and not against B*H
            mask = build.reshape(view.net, mask, [ONE, *mask.dims])
        out.masks.append(mask)
        return data[0]
    if node.op == "max":
        return _clamped(view, node, out)
    if node.op == "select" and not view.is_data(node.inputs[0]):
        return _selected(view, node, out)
    return None


def _scaled(inner: Value, factor: float, out: Scores) -> Value | None:
    if inner.op == "tanh" and not out.softcap and out.scale == 1.0:
        below = inner.args[0].node
        if below is None or below.op not in ("mul", "div"):
            return None
        a, b = below.inputs if below.inputs[1].scalar is not None else below.inputs[::-1]
        ratio = b.scalar if b.scalar is None or below.op == "mul" else 1.0 / b.scalar
        if ratio is None:
            return None
        out.softcap = factor
        out.scale = ratio * factor
        return a
    out.scale *= factor
    return inner


def _clamped(view: View, node: Node, out: Scores) -> Value | None:
    """The scores below max(scores + mask, lowest): only masks reach so low, and are clamped instead."""
    scores, low = node.inputs if node.inputs[1].scalar is not None else node.inputs[::-1]
    if (
        low.scalar is None
        or low.scalar > LOWEST
        or scores.node is None
        or scores.node.op not in ("add", "select")
    ):
        return None
    below = _peel(view, scores.node, out)
    if below is not None:
        out.masks[-1] = build.binary(view.net, "max", out.masks[-1], low)
    return below


def _selected(view: View, node: Node, out: Scores) -> Value | None:
    condition, a, b = node.inputs
    data = [v for v in (a, b) if view.is_data(v)]
    low = b if data and data[0] is a else a
    if len(data) != 1 or low.scalar is None or low.scalar > -1e4 or out.scale != 1.0 or out.softcap:
        return None
    zero = view.net.scalar(0.0, low)
    branches = (zero, low) if data[0] is a else (low, zero)
    out.masks.append(build.select(view.net, condition, *branches))
    return data[0]


def strip_scale(net: Net, value: Value) -> tuple[Value, float]:
    """(the value without multiplications by numbers, also those before views of it; their product)."""
    node = value.node
    if node is None:
        return value, 1.0
    if node.op == "cast" and node.inputs[0].dtype[0] == "f":
        return strip_scale(net, node.inputs[0])
    if node.op in ("mul", "div"):
        a, b = node.inputs
        if node.op == "mul" and a.scalar is not None:
            a, b = b, a
        if b.scalar is None or a.dims != value.dims:
            return value, 1.0
        inner, scale = strip_scale(net, a)
        return inner, scale * (b.scalar if node.op == "mul" else 1.0 / b.scalar)
    if node.op in ("reshape", "transpose"):
        inner, scale = strip_scale(net, node.inputs[0])
        if scale != 1.0:
            made = (
                build.reshape(net, inner, node.attrs["shape"])
                if node.op == "reshape"
                else build.transpose(net, inner, node.attrs["perm"])
            )
            return made, scale
    return value, 1.0


def as_heads(value: Value | None) -> Value | None:
    """A [B, H, S, D] value; a [B*H, S, D] one is looked at before its reshape."""
    if value is None or value.rank == 4:
        return value
    if value.rank == 3 and value.op == "reshape":
        inner = value.args[0]
        if (
            inner.rank == 4
            and inner.dims[2:] == value.dims[1:]
            and inner.dims[0] * inner.dims[1] == value.dims[0]
        ):
            return inner
    return None


def transposed_keys(net: Net, keys: Value) -> Value | None:
    """The [.., T, D] keys behind the [.., D, T] operand of the score product."""
    if keys.rank == 4:
        return build.transpose(net, keys, (0, 1, 3, 2))
    if keys.rank != 3:
        return None
    if keys.op == "reshape" and keys.args[0].rank == 4:  # [B*H, D, T] viewed from [B, H, D, T]
        inner = keys.args[0]
        if inner.dims[2:] == keys.dims[1:]:
            return build.transpose(net, inner, (0, 1, 3, 2))
    return build.transpose(net, keys, (0, 2, 1))


def shared(value: Value) -> Value:
    """The [B, Hkv, T, D] value behind a repetition to [B, H, T, D], each head H/Hkv times in a row."""
    if value.op != "reshape" or value.rank != 4:
        return value
    wide = value.args[0]
    if wide.op != "expand" or wide.rank != 5:
        return value
    inner = wide.args[0]
    if inner.op != "reshape" or inner.rank != 5 or inner.dims[2] != ONE:
        return value
    source = inner.args[0]
    fits = source.rank == 4 and inner.dims == (*source.dims[:2], ONE, *source.dims[2:])
    return source if fits and wide.dims[1] == source.dims[1] else value


def _weighted_sum(view: View, weights: Value, sinks: bool) -> tuple[Value, Value] | None:
    """(result, values operand) of the product of the softmax with the values; `sinks`: sliced before."""
    value = weights
    for _ in range(6):
        nodes = [n for n in view.next_nodes(value) if n.op not in ("isnan",)]
        if len(nodes) != 1 or id(value) in view.outputs:
            return None
        node = nodes[0]
        if node.op == "matmul" and node.inputs[0] is value:
            return node.outputs[0], node.inputs[1]
        passes = node.op in ("cast", "reshape") or (sinks and node.op == "slice")
        if passes or (node.op == "select" and node.inputs[0].op == "isnan"):
            value = node.outputs[0]
        else:
            return None
    return None


def _split_result(view: View, out: Value, q: Value) -> Value | None:
    """The [B, H, S, Dv] view of a [B*H, S, Dv] result."""
    for node in view.next_nodes(out):
        made = node.outputs[0]
        if node.op == "reshape" and made.rank == 4 and made.dims[:3] == q.dims[:3]:
            return made
    return None
