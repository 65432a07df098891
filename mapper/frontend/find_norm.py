"""Recognises normalisation over the last axis, anchored on the reciprocal root of a mean of squares."""

from __future__ import annotations

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
            match = _norm(view, checker, node)
            if match is not None:
                found.append(match)
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


def _norm(view: View, checker: Checker, root: Node) -> Match | None:
    eps_part = _scalar_part(root.inputs[0].node, "add")
    spread, eps = eps_part if eps_part else (root.inputs[0], 0.0)
    square = mean_of(spread)
    if square is None or square.op != "mul" or square.args[0] is not square.args[1]:
        return None
    centred = square.args[0]
    x, kind = centred, "rms"
    if centred.op == "sub" and mean_of(centred.args[1]) is centred.args[0]:
        x, kind = centred.args[0], "layer"
    best: Match | None = None
    for match in _growing(view, root.outputs[0], x, centred, {"kind": kind, "eps": eps}):
        if checker.holds(match):
            best = match
    return best


def _growing(view: View, value: Value, x: Value, centred: Value, attrs: dict[str, object]) -> list[Match]:
    """Matches from the anchor forward: the quotient, then with weight, then with bias."""
    slots: dict[str, Value] = {"x": x}
    out: list[Match] = []
    multiplied = False
    for _ in range(6):
        nodes = view.next_nodes(value)
        if multiplied and (len(nodes) != 1 or id(value) in view.outputs):
            break
        step = next((s for n in nodes if (s := _step(n, value, centred, slots, multiplied))), None)
        if step is None:
            break
        value, slots, offset = step
        multiplied = multiplied or "done" in slots
        slots.pop("done", None)
        if offset:
            attrs = {**attrs, "weight_offset": offset}
        if multiplied:
            given = {**slots, "x": _of_type(x, value.dtype)}
            out.append(Match(value, "norm", tuple(given), tuple(given.values()), attrs))
    return out


def _step(
    node: Node, value: Value, centred: Value, slots: dict[str, Value], multiplied: bool
) -> tuple[Value, dict[str, Value], float] | None:
    """One node further: (its result, operands so far, offset of the weight); `done` marks the quotient."""
    if node.op == "cast":
        return node.outputs[0], slots, 0.0
    if node.op not in ("mul", "add") or len(node.inputs) != 2:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    if node.op == "mul" and (other is centred or _uncast(other) is centred):
        return (node.outputs[0], {**slots, "done": centred}, 0.0) if not multiplied else None
    vector, offset = bias_of(other), 0.0
    if vector is None and other.op == "add":
        part = _scalar_part(other.node, "add")
        vector, offset = (bias_of(part[0]), part[1]) if part else (None, 0.0)
    if vector is None or vector.dims[-1] != node.outputs[0].dims[-1]:
        return None
    if node.op == "mul" and "weight" not in slots and "bias" not in slots:
        return node.outputs[0], {**slots, "weight": vector}, offset
    if node.op == "add" and multiplied and "bias" not in slots and not offset:
        return node.outputs[0], {**slots, "bias": vector}, 0.0
    return None


def _of_type(x: Value, dtype: str) -> Value:
    """`x`, or what it was widened from where the result is as narrow as that."""
    return x.args[0] if x.op == "cast" and x.args[0].dtype == dtype != x.dtype else x


def _uncast(value: Value) -> Value:
    return value.args[0] if value.op == "cast" else value
