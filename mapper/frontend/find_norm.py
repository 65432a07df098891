"""Recognises normalisation over the last axis, anchored on the reciprocal root of a mean of squares."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mapper.frontend.agree import Checker
from mapper.frontend.cut import View
from mapper.frontend.find_linear import bias_of
from mapper.frontend.net import Node, Value
from mapper.frontend.rewrite import Match


def norms(view: View, checker: Checker) -> list[Match]:
    """rms and layer norms, with weight, 1 + weight, and bias where they follow."""
    found = []
    for node in view.nodes:
        if node.op == "rsqrt":
            found += _norm(view, checker, node)
    return found


def _scalar_part(node: Node | None, op: str) -> tuple[Value, float] | None:
    if node is None or node.op != op:
        return None
    a, b = node.inputs
    if b.scalar is not None:
        return a, b.scalar
    return (b, a.scalar) if a.scalar is not None else None


def mean_of(value: Value) -> Value | None:
    """The operand of a mean over the last axis, spelled as a mean or as a sum times 1/n."""
    node = value.node
    factor = _scalar_part(node, "mul") or _scalar_part(node, "div")
    scale = None
    if factor is not None and factor[1]:
        scale = factor[1] if value.op == "mul" else 1.0 / factor[1]
        node = factor[0].node
    if node is None or node.op != "reduce" or not node.attrs["keepdims"]:
        return None
    x = node.inputs[0]
    if node.attrs["axes"] != (x.rank - 1,) or not x.dims[-1].is_const:
        return None
    if scale is None:
        return x if node.attrs["kind"] == "mean" else None
    right = node.attrs["kind"] == "sum" and abs(scale * x.dims[-1].value - 1) < 1e-6
    return x if right else None


def _norm(view: View, checker: Checker, root: Node) -> list[Match]:
    eps_part = _scalar_part(root.inputs[0].node, "add")
    spread, eps = eps_part if eps_part else (root.inputs[0], 0.0)
    square = mean_of(spread)
    if square is None or square.op != "mul" or square.args[0] is not square.args[1]:
        return []
    centred = square.args[0]
    x, kind = centred, "rms"
    if centred.op == "sub" and mean_of(centred.args[1]) is centred.args[0]:
        x, kind = centred.args[0], "layer"
    return _grown(view, checker, _Growth(root.outputs[0], {"x": x}, {"kind": kind, "eps": eps}), x, centred)


@dataclass(frozen=True)
class _Growth:
    """How far a match has grown: its result, operands and attributes; `whole` once the quotient is in it."""

    value: Value
    slots: dict[str, Value]
    attrs: dict[str, object]
    whole: bool = False


def _grown(view: View, checker: Checker, growth: _Growth, x: Value, centred: Value) -> list[Match]:
    """The largest matches that hold, from the anchor forward: quotient, then weight, then bias. Where several
    norms share one quotient, each has its own match."""
    found: list[Match] = []
    ends = id(growth.value) in view.outputs
    for node in view.next_nodes(growth.value):
        step = None if ends and growth.whole else _step(node, growth, centred)
        further = _grown(view, checker, step, x, centred) if step else []
        found += further
        ends = ends or not further
    if growth.whole and ends:
        given = {**growth.slots, "x": _of_type(x, growth.value.dtype)}
        match = Match(growth.value, "norm", tuple(given), tuple(given.values()), growth.attrs)
        if checker.holds(match):
            found.append(match)
    return found


def _step(node: Node, growth: _Growth, centred: Value) -> _Growth | None:
    """One node further, None where the norm ends before it."""
    value, slots, out = growth.value, growth.slots, node.outputs[0]
    if node.op == "cast":
        return replace(growth, value=out)
    if node.op not in ("mul", "add") or len(node.inputs) != 2:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if node.op == "mul" and (other is centred or _uncast(other) is centred):
        return None if growth.whole else replace(growth, value=out, whole=True)
    vector, offset = bias_of(other), 0.0
    if vector is None and other.op == "add":
        part = _scalar_part(other.node, "add")
        vector, offset = (bias_of(part[0]), part[1]) if part else (None, 0.0)
    if vector is None or vector.dims[-1] != out.dims[-1]:
        return None
    if node.op == "mul" and "weight" not in slots and "bias" not in slots:
        attrs = {**growth.attrs, "weight_offset": offset} if offset else growth.attrs
        return replace(growth, value=out, slots={**slots, "weight": vector}, attrs=attrs)
    if node.op == "add" and growth.whole and "bias" not in slots and not offset:
        return replace(growth, value=out, slots={**slots, "bias": vector})
    return None


def _of_type(x: Value, dtype: str) -> Value:
    """`x`, or what it was widened from where the result is as narrow as that."""
    return x.args[0] if x.op == "cast" and x.args[0].dtype == dtype != x.dtype else x


def _uncast(value: Value) -> Value:
    return value.args[0] if value.op == "cast" else value
