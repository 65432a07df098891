"""Recognises attention, anchored on softmax, and the cache append before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mapper.frontend import build
from mapper.frontend.agree import Checker
from mapper.frontend.cut import View
from mapper.frontend.net import Net, Node, Value
from mapper.frontend.rewrite import Match
from mapper.ir.dims import ONE


@dataclass
class Scores:
    """What lies between the product of queries and keys and the softmax."""

    scale: float = 1.0
    softcap: float = 0.0
    mask: Value | None = None
    product: Node | None = None
    extra: list[Value] = field(default_factory=list)


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
    scores = read_scores(view, softmax.inputs[0])
    final = _weighted_sum(view, softmax.outputs[0])
    if scores is None or scores.product is None or final is None:
        return None
    out, values = final
    net = view.net
    q, first = strip_scale(scores.product.inputs[0])
    keys, second = strip_scale(scores.product.inputs[1])
    heads = as_heads(q)
    if heads is None:
        return None
    swapped = transposed_keys(net, keys)
    k, third = strip_scale(swapped) if swapped is not None else (None, 1.0)
    k = as_heads(k) if k is not None else None
    v = as_heads(values)
    if k is None or v is None or out.rank not in (3, 4):
        return None
    out4 = out if out.rank == 4 else _split_result(view, out, heads)
    if out4 is None:
        return None
    k, v = shared(k), shared(v)
    attrs = {"scale": scores.scale * first * second * third, "softcap": scores.softcap}
    operands = {"q": heads, "k": k, "v": v}
    if scores.mask is not None:
        operands["mask"] = scores.mask
    bounds = grounded(view, operands.values())
    return Match(out4, "attention", tuple(operands), tuple(operands.values()), attrs, bounds)


def grounded(view: View, values: Iterable[Value]) -> tuple[Value, ...]:
    """The values of the original graph that some values are made of: recognition itself puts views on top."""
    found: dict[int, Value] = {}
    stack = list(values)
    while stack:
        value = stack.pop()
        if value.node is None or id(value) in view.order:
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
        out.mask = other[0] if out.mask is None else build.binary(view.net, "add", out.mask, other[0])
        return data[0]
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


def _selected(view: View, node: Node, out: Scores) -> Value | None:
    condition, a, b = node.inputs
    data = [v for v in (a, b) if view.is_data(v)]
    low = b if data and data[0] is a else a
    if len(data) != 1 or low.scalar is None or low.scalar > -1e4 or out.scale != 1.0 or out.softcap:
        return None
    zero = view.net.scalar(0.0, low)
    branches = (zero, low) if data[0] is a else (low, zero)
    mask = build.select(view.net, condition, *branches)
    out.mask = mask if out.mask is None else build.binary(view.net, "add", out.mask, mask)
    return data[0]


def strip_scale(value: Value) -> tuple[Value, float]:
    """(the value before multiplications by numbers, their product)."""
    scale = 1.0
    while value.op in ("mul", "div", "cast"):
        if value.op == "cast":
            value = value.args[0]
            continue
        a, b = value.args
        if value.op == "mul" and a.scalar is not None:
            a, b = b, a
        if b.scalar is None:
            break
        scale, value = scale * (b.scalar if value.op == "mul" else 1.0 / b.scalar), a
    return value, scale


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


def _weighted_sum(view: View, weights: Value) -> tuple[Value, Value] | None:
    """(result, values operand) of the product of the softmax with the values."""
    value = weights
    for _ in range(6):
        nodes = [n for n in view.next_nodes(value) if n.op not in ("isnan",)]
        if len(nodes) != 1 or id(value) in view.outputs:
            return None
        node = nodes[0]
        if node.op == "matmul" and node.inputs[0] is value:
            return node.outputs[0], node.inputs[1]
        if node.op in ("cast", "reshape") or (node.op == "select" and node.inputs[0].op == "isnan"):
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


def appends(view: View, checker: Checker) -> list[Match]:
    """Concatenations of a cache input with new rows along the token axis that are an output."""
    found = []
    for node in view.nodes:
        if (
            node.op != "concat"
            or node.attrs["axis"] != 2
            or len(node.inputs) != 2
            or node.outputs[0].rank != 4
        ):
            continue
        past, new = node.inputs
        if past.source and id(node.outputs[0]) in view.outputs:
            match = Match(node.outputs[0], "kv_append", ("past", "new"), (past, new))
            if checker.holds(match):
                found.append(match)
    return found
