"""Recognises MLPs made of linear layers and an activation."""

from __future__ import annotations

from dataclasses import replace

from mapper.frontend.agree import Checker
from mapper.frontend.cut import View
from mapper.frontend.net import Node, Value
from mapper.frontend.resize import small_widths
from mapper.frontend.rewrite import Match


def mlps(view: View, checker: Checker) -> list[Match]:
    """down(act(gate x) * up x) and down(act(up x)), where nothing else reads what is inside."""
    found = []
    for node in view.nodes:
        if node.op == "linear":
            match = _mlp(view, node)
            if match is None:
                found += _packed(view, checker, node)
            elif checker.holds(match, _shrunk(match)):
                found.append(match)
    return found


def _packed(view: View, checker: Checker, down: Node) -> list[Match]:
    """down(act(gate) * up) where gate and up are parts of one product."""
    product = _inner(view, down.inputs[0], "mul")
    if product is None:
        return []
    for left, right in (product.inputs, product.inputs[::-1]):
        act, part = _inner(view, left, "activation"), _inner(view, right, "slice")
        gate = _inner(view, act.inputs[0], "slice") if act else None
        if act is None or part is None or gate is None or gate.inputs[0] is not part.inputs[0]:
            continue
        both = gate.inputs[0].node
        if both is None or both.op != "linear" or len(view.next_nodes(gate.inputs[0])) != 2:
            continue
        match = _assemble(down, {"gate_up": both}, act, "packed_mlp")
        inner = down.inputs[0].dims[-1].value
        x = match.inputs[0]
        widths = small_widths(inner, x.dims[-1].value) if x.dims[-1].is_const else {}
        packing = "halves" if gate.attrs["steps"] == (1,) else "interleaved"
        match = replace(match, attrs={**match.attrs, "packing": packing})
        if checker.holds(match, None, None, widths):
            return [match]
    return []


def _inner(view: View, value: Value, op: str) -> Node | None:
    node = value.node
    return node if node is not None and node.op == op and view.sole_reader(value) is not None else None


def _mlp(view: View, down: Node) -> Match | None:
    hidden = down.inputs[0]
    act = _inner(view, hidden, "activation")
    if act is not None:
        up = _inner(view, act.inputs[0], "linear")
        return _assemble(down, {"up": up}, act, "mlp") if up else None
    product = _inner(view, hidden, "mul")
    if product is None:
        return None
    for left, right in (product.inputs, product.inputs[::-1]):
        act, other = _inner(view, left, "activation"), _inner(view, right, "linear")
        gate = _inner(view, act.inputs[0], "linear") if act else None
        if act and other and gate and gate.inputs[0] is other.inputs[0]:
            return _assemble(down, {"gate": gate, "up": other}, act, "gated_mlp")
    return None


def _assemble(down: Node, inner: dict[str, Node], act: Node, op: str) -> Match:
    x = next(iter(inner.values())).inputs[0]
    slots, inputs, attrs = ["x"], [x], {"act": act.attrs["kind"]}
    if "round_block" in down.attrs:
        attrs["round_block"] = down.attrs["round_block"]
    for name, node in {**inner, "down": down}.items():
        slots.append(name)
        inputs.append(node.inputs[1])
        attrs[f"{name}_transposed"] = node.attrs["transposed"]
        if len(node.inputs) > 2:
            slots.append(f"{name}_bias")
            inputs.append(node.inputs[2])
    return Match(down.outputs[0], op, tuple(slots), tuple(inputs), attrs)


def _shrunk(match: Match) -> dict[int, tuple[int, ...]]:
    width, inner = 6, 8
    shapes: dict[int, tuple[int, ...]] = {}
    for slot, value in zip(match.slots, match.inputs, strict=True):
        if slot == "x":
            shapes[id(value)] = (2, 3, width)[-value.rank :]
            continue
        rows, columns = (inner, width) if slot.startswith("down") else (width, inner)
        if slot.endswith("_bias"):
            shapes[id(value)] = (columns,)
        else:
            shapes[id(value)] = (columns, rows) if match.attrs[f"{slot}_transposed"] else (rows, columns)
    return shapes
