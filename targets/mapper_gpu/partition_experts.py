"""Whole experts per chip: groups of chips that own experts, and what passes between replicas.

A group of the chips of one replica has count / owners experts, and its chips share the inner columns of each.
Where the groups are all inside a replica every chip has all tokens: it does what its own experts are chosen
for, and the all-reduce that follows adds up the groups. Where they are spread over replicas, which have
tokens of their own, all replicas' routing is exchanged first; a chip then fetches the rows of its experts'
tokens from the chips of the same rank in all replicas, and these fetch what was made of their own tokens
back. Ranks hold parts of sums as before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.degrees import Degrees
from mapper_gpu.extractor import Extracted
from mapper_gpu.nodes import EXPERTS, Matrix, Node, Section, Value
from mapper_gpu.routing import Routing

_KINDS = ("top_k", "align", "places", "weighted_sum", *EXPERTS)


def own_experts(e: Extracted, degrees: Degrees) -> Extracted:
    """The section with experts shared out among groups of chips. Their results are parts of sums over the
    chips of a replica. Raises LoweringError where experts or their columns do not divide."""
    nodes = e.section.nodes
    if degrees.expert == 1 or not any(n.kind in EXPERTS for n in nodes):
        return e
    made = _Owned(degrees, dict(e.section.values))
    found = [new for node in nodes for new in (made.add(node) if node.kind in _KINDS else [node])]
    section = Section(
        e.section.name, e.section.count, tuple(found), made.values, e.section.outputs, e.section.carried
    )
    return replace(e, section=section)


@dataclass
class _Owned:
    degrees: Degrees
    values: dict[str, Value]

    def add(self, node: Node) -> list[Node]:
        """The nodes in a node's place."""
        if node.kind == "top_k":
            return [node, *self._exchange(node)]
        if node.kind in ("align", "places"):
            return [self._sorted(node)]
        if node.kind == "expert_up":
            return self._up(node)
        if node.kind == "expert_down":
            return [self._down(node)]
        return [self._sum(node)]

    @property
    def slices(self) -> int:
        """Chips that share the columns of a group's experts."""
        return self.degrees.tensor // self.degrees.inside

    def _all(self, name: str) -> str:
        """A routing of the tokens of all replicas that share experts."""
        return f"{name}.all" if self.degrees.spread > 1 else name

    def _between(self) -> dict[str, int]:
        return {"replicas": self.degrees.spread, "stride": self.degrees.tensor}

    def _exchange(self, node: Node) -> list[Node]:
        if self.degrees.spread == 1:
            return []
        value, name = self.values[node.output], self._all(node.output)
        self.values[name] = replace(value, rows=value.rows * self.degrees.spread)
        attrs = {"name": "exchange", **self._between()}
        return [Node("exchange", (node.output,), name, (), attrs, node.op)]

    def _routing(self, rows: int, count: int, chosen: int) -> Routing:
        return Routing(rows, count, chosen, 1).shared(rows, self.degrees.expert)

    def _sorted(self, node: Node) -> Node:
        routing = self._all(node.inputs[0])
        rows = self.values[routing].rows
        how = self._routing(rows, node.attr("experts"), node.attr("chosen"))
        shape = (how.most, 1 + how.tile) if node.kind == "align" else (rows, how.chosen)
        self.values[node.output] = replace(self.values[node.output], rows=shape[0], width=shape[1])
        attrs = {**node.attrs, "tile": how.tile, "blocks": how.most, "owned": how.owned}
        return replace(node, inputs=(routing,), attrs=attrs)

    def _moved(self, node: Node) -> Routing:
        """The routing of a product of experts over all replicas' tokens."""
        old = node.attr("routing")
        return self._routing(old.rows * self.degrees.spread, old.count, old.chosen)

    def _up(self, node: Node) -> list[Node]:
        how = self._moved(node)
        before: list[Node] = []
        x, blocks, *routing = node.inputs
        if self.degrees.spread > 1:
            rows = f"{node.output}.in"
            self.values[rows] = replace(self.values[x], rows=how.most * how.tile)
            inputs = (x, blocks, *(self._all(r) for r in routing))
            attrs = {"name": "dispatch", "routing": how, **self._between()}
            before, x, routing = [Node("dispatch", inputs, rows, (), attrs, node.op)], rows, []
        weights = tuple(self._matrix(w, how, "n", node) for w in node.weights)
        attrs = {**node.attrs, "routing": how, "dispatched": bool(before)}
        for name in ("bias0", "bias1"):
            if isinstance(node.attr(name), Mapping):
                attrs[name] = self._table(node.attr(name), how)
        value = self.values[node.output]
        width = value.width // self.slices
        self.values[node.output] = replace(value, rows=how.most * how.tile, width=width)
        return [*before, replace(node, inputs=(x, blocks, *routing), weights=weights, attrs=attrs)]

    def _down(self, node: Node) -> Node:
        how = self._moved(node)
        self.values[node.output] = replace(self.values[node.output], rows=how.most * how.tile)
        weights = (self._matrix(node.weights[0], how, "k", node),)
        return replace(node, weights=weights, attrs={**node.attrs, "routing": how})

    def _sum(self, node: Node) -> Node:
        """Of the rows that a chip's own experts made; the sum over chips makes the rest."""
        rows = self.values[node.output].rows * self.degrees.spread
        how = self._routing(rows, node.attr("experts"), self.values[node.inputs[2]].width)
        attrs = {**node.attrs, "parts": True, "pairs": round(how.fullest)}
        if self.degrees.spread == 1:
            return replace(node, attrs=attrs)
        attrs |= {"name": "collect", "routing": how, **self._between()}
        return replace(node, kind="collect", attrs=attrs)

    def _matrix(self, w: Matrix, how: Routing, split: str, node: Node) -> Matrix:
        size = w.n if split == "n" else w.k
        if size % self.slices:
            raise LoweringError(
                f"gpu: {node.attr('name')}: {size} columns do not divide among {self.slices} chips"
            )
        cut = split == "k" and self.slices > 1
        if cut and w.low is not None and (size // self.slices) % w.low.whole:
            raise LoweringError(f"gpu: {node.attr('name')}: {self.slices} chips would cut blocks of low bits")
        n, k = (w.n // self.slices, w.k) if split == "n" else (w.n, w.k // self.slices)
        used = min(how.owned, how.most, max(1, round(how.distinct)))
        return replace(
            w, n=n, k=k, split=split if self.slices > 1 else "", count=used, total=how.owned,
            owners=self.degrees.expert, inside=self.degrees.inside,
        )  # fmt: skip

    def _table(self, vector: Mapping[str, Any], how: Routing) -> dict[str, Any]:
        """A vector per expert: a group's experts, a chip's columns."""
        return {
            **vector, "length": vector["length"] // self.slices, "experts": how.owned,
            "chips": self.slices, "owners": self.degrees.expert, "inside": self.degrees.inside,
        }  # fmt: skip
