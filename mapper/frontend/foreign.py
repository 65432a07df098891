"""Graphs that are no transformers: convolutional nets, state-space models with an unrolled recurrence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mapper.errors import UnsupportedModelError
from mapper.frontend.net import Net, Node, Value
from mapper.frontend.rewrite import data_values, topological
from mapper.frontend.symbols import strip_views
from mapper.ir.dims import ONE, Dim


def refuse_foreign(net: Net) -> None:
    """Raises UnsupportedModelError for a state-space model, and for a convolution in a graph without
    attention."""
    nodes = topological(net)
    data = data_values(nodes)
    scan = state_space(nodes, data)
    if scan is not None:
        reason = "its result sets how fast a state decays: state-space recurrence is not supported"
        raise UnsupportedModelError(f"node {scan.origin[:80]!r} (Conv): {reason}")
    if any(n.op == "softmax" and id(n.outputs[0]) in data for n in nodes):
        return
    for node in nodes:
        if node.op == "conv":
            reason = "a convolution in a graph without attention: not a transformer"
            raise UnsupportedModelError(f"node {node.origin[:80]!r} (Conv): {reason}")


def state_space(nodes: Sequence[Node], data: Iterable[int]) -> Node | None:
    """The convolution of a selective state-space layer: one filter per channel along the sequence, from which
    follows exp(step * rate), step computed from the data and rate stored (Gu and Dao, "Mamba", section 3.2).
    None where there is no such layer."""
    data, origin = set(data), dict[int, Node]()
    for node in nodes:
        if node.op == "conv" and _per_channel(node):
            origin.update((id(o), node) for o in node.outputs)
            continue
        source = next((origin[id(v)] for v in node.inputs if id(v) in origin), None)
        if source is None:
            continue
        if node.op == "exp" and _decays(strip_views(node.inputs[0]), data):
            return source
        origin.update((id(o), source) for o in node.outputs)
    return None


def _per_channel(conv: Node) -> bool:
    x, w = conv.inputs[:2]
    return x.rank == 3 and conv.attrs["group"] > 1 and w.dims[:2] == (Dim.of(conv.attrs["group"]), ONE)


def _decays(product: Value, data: set[int]) -> bool:
    """Whether a value is a product of a part that depends on the data and one that does not."""
    if product.op != "mul":
        return False
    return len({id(v) in data or bool(v.source) for v in product.args}) == 2
