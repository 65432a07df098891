"""Rewriting the working graph: recognised sub-graphs are replaced, everything else is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mapper.frontend.net import Net, Node, Value


@dataclass(frozen=True, eq=False)
class Match:
    """`out` can be computed by op `op` from `inputs` (named by `slots`) with `attrs`.

    `bounds` end the matched primitives; they are `inputs` unless an input is a view of something deeper.
    `more` are the op's further results.
    """

    out: Value
    op: str
    slots: tuple[str, ...]
    inputs: tuple[Value, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    bounds: tuple[Value, ...] = ()
    more: tuple[Value, ...] = ()

    @property
    def outs(self) -> tuple[Value, ...]:
        """All results of the op."""
        return (self.out, *self.more)

    def node_attrs(self) -> dict[str, Any]:
        """The attributes of the recognised node."""
        return {**self.attrs, "slots": self.slots}


def needs(value: Value, matches: Mapping[int, Match]) -> Sequence[Value]:
    """What `value` is computed from, once `matches` are applied."""
    match = matches.get(id(value))
    return match.inputs if match else value.args


def rebuild(net: Net, matches: Iterable[Match]) -> Net:
    """A copy of `net` in which each matched value is made by its recognised op. Leaves are shared."""
    chosen = {id(out): m for m in matches for out in m.outs}
    if not chosen:
        return net
    out = Net(list(net.inputs), equal=list(net.equal), caches=net.caches)
    done: dict[int, Value] = {}
    stack = [v for _, v in reversed(net.outputs)]
    while stack:
        value = stack[-1]
        if id(value) in done:
            stack.pop()
            continue
        wanted = [v for v in needs(value, chosen) if id(v) not in done]
        if wanted:
            stack.extend(reversed(wanted))
            continue
        stack.pop()
        _copy(out, value, chosen, done)
    out.outputs = [(name, done[id(v)]) for name, v in net.outputs]
    return out


def _copy(out: Net, value: Value, chosen: Mapping[int, Match], done: dict[int, Value]) -> None:
    match = chosen.get(id(value))
    if match is not None:
        ins = [done[id(v)] for v in match.inputs]
        origin = value.node.origin if value.node else ""
        made = out.put(match.op, ins, match.node_attrs(), match.outs, origin)
        done.update(zip(map(id, match.outs), made, strict=True))
    elif value.node is None:
        done[id(value)] = value
    else:
        node = value.node
        made = out.put(node.op, [done[id(v)] for v in node.inputs], node.attrs, node.outputs, node.origin)
        for old, new in zip(node.outputs, made, strict=True):
            done.setdefault(id(old), new)


def topological(net: Net) -> list[Node]:
    """The live nodes of a net in order."""
    return net.live(v for _, v in net.outputs)


def data_values(nodes: Sequence[Node]) -> set[int]:
    """`id` of every value on the hidden path: made by or from a stored-matrix product, a token embedding, a
    convolution or a float input of rank 3 or more. Masks, positions and rotary tables are not."""
    found: set[int] = set()
    for node in nodes:
        if node.op in ("linear", "embed", "conv") or any(
            id(v) in found or _is_source(v) for v in node.inputs
        ):
            found.update(id(o) for o in node.outputs)
            found.update(id(v) for v in node.inputs if _is_source(v))
    return found


def _is_source(value: Value) -> bool:
    return bool(value.source) and value.rank >= 3 and value.dtype in ("f32", "f16", "bf16", "f64")
