"""Cutting sub-graphs: from a result back to the one value that everything in between is computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from mapper.frontend.net import Net, Node, Value, users, walk
from mapper.frontend.rewrite import data_values, topological

ELEMENTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "abs",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "tanh",
        "erf",
        "sigmoid",
        "relu",
        "pow",
        "cast",
        "min",
        "max",
    ]
)
VIEWS = frozenset(["reshape", "transpose", "slice", "concat", "expand", "gather"])


@dataclass(eq=False)
class View:
    """A net with what recognisers ask of it: order, readers, which values are data, which are outputs."""

    net: Net
    nodes: list[Node]
    order: dict[int, int]
    readers: dict[int, list[tuple[Node, int]]]
    data: set[int]
    outputs: set[int]

    @staticmethod
    def of(net: Net) -> View:
        """The view of a net as it is now."""
        nodes = topological(net)
        order = {id(o): i for i, n in enumerate(nodes) for o in n.outputs}
        outputs = {id(v) for _, v in net.outputs}
        return View(net, nodes, order, users(nodes), data_values(nodes), outputs)

    def is_data(self, value: Value) -> bool:
        """Whether the value is on the hidden path."""
        return id(value) in self.data

    def sole_reader(self, value: Value) -> Node | None:
        """The one node that reads the value, None where there are more, or it is an output."""
        found = self.readers.get(id(value), [])
        nodes = {id(n): n for n, _ in found}
        return found[0][0] if len(nodes) == 1 and id(value) not in self.outputs else None

    def next_nodes(self, value: Value) -> list[Node]:
        """The nodes that read the value, each once."""
        return list({id(n): n for n, _ in self.readers.get(id(value), [])}.values())

    def sources(
        self, out: Value, allowed: Collection[str], limit: int = 40
    ) -> Iterator[tuple[Value, list[Value]]]:
        """(a single data value that `out` is computed from through `allowed` ops, other values read on the
        way), nearest first, within `limit` nodes."""
        frontier: dict[int, Value] = {id(out): out}
        free: dict[int, Value] = {}
        for step in range(limit):
            if step and len(frontier) == 1:
                yield next(iter(frontier.values())), list(free.values())
            last = max(frontier.values(), key=lambda v: self.order.get(id(v), -1))
            node = last.node
            if node is None or node.op not in allowed or len(node.outputs) != 1:
                return
            del frontier[id(last)]
            for value in node.inputs:
                if self.is_data(value):
                    frontier[id(value)] = value
                elif value.const is None:
                    free[id(value)] = value
            if not frontier:
                return


def forward(view: View, start: Value, accept: Callable[[Node], bool], steps: int) -> list[Value]:
    """Results reachable from `start` through accepted nodes in at most `steps` steps, farthest first."""
    level, found = [start], [start]
    seen = {id(start)}
    for _ in range(steps):
        following = []
        for value in level:
            for node in view.next_nodes(value):
                out = node.outputs[0]
                if id(out) not in seen and accept(node):
                    seen.add(id(out))
                    following.append(out)
        level = following
        found += level
    return sorted(found, key=lambda v: -view.order.get(id(v), -1))


def region_of(results: Sequence[Value], stop: Sequence[Value]) -> list[Node]:
    """The nodes that some results are computed with, not looking behind the values of `stop`."""
    known, found = {id(v) for v in stop}, dict[int, Node]()
    for result in results:
        for value in walk(result, lambda v: id(v) in known or v.node is None):
            if value.node is not None and id(value) not in known:
                found[id(value.node)] = value.node
    return list(found.values())


def numbers_in(region: Sequence[Node], *ops: str) -> list[float]:
    """The finite constants that operators of some kinds take, each once."""
    found = {v.scalar: None for n in region if n.op in ops for v in n.inputs if v.scalar is not None}
    return [float(v) for v in found if v is not None and math.isfinite(v)]
