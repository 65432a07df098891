"""Merged decoders: one file whose top-level If holds the graph without and the graph with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.guard import GuardedModel, label
from mapper.frontend.net import Array
from mapper.frontend.proto import NodeRecord
from mapper.ir.graph import Graph
from mapper.ir.switch import Switch

_PASSED = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten")
_DEPTH = 8


@dataclass(frozen=True)
class Split:
    """An If that makes all outputs of the model. The input `name`, negated where `negated`, is its
    condition."""

    node: NodeRecord
    name: str
    negated: bool

    def holds(self, inputs: Mapping[str, Array]) -> bool:
        """The condition's value. Raises ModelError where the input is absent or has more than one element."""
        array = np.asarray(inputs.get(self.name, ()))
        if array.size != 1:
            raise ModelError(f"input {self.name!r} chooses a branch, and must have one element")
        return bool(array.reshape(-1)[0]) != self.negated


def find_split(model: GuardedModel) -> Split | None:
    """The If whose condition is an input and whose results are all the outputs of the model (but inputs that
    are handed through)."""
    graph = model.record.graph
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    stored = {t.name for t in graph.tensors}
    inputs = {v.name for v in graph.inputs} - stored
    chosen: dict[int, NodeRecord] = {}
    for output in graph.outputs:
        name = _behind(output.name, makers)[0]
        if name in inputs:
            continue  # handed through, in either branch
        node = makers.get(name)
        if node is None or node.op != "If" or node.domain or not node.inputs:
            return None
        chosen[id(node)] = node
    if len(chosen) != 1:
        return None
    (node,) = chosen.values()
    name, negated = _behind(node.inputs[0], makers, negations=True)
    return Split(node, name, negated) if name in inputs else None


def _behind(name: str, makers: Mapping[str, NodeRecord], negations: bool = False) -> tuple[str, bool]:
    """(the value behind copies and casts, whether it is negated on the way)."""
    negated = False
    for _ in range(_DEPTH):
        node = makers.get(name)
        passed = node is not None and not node.domain and node.inputs
        if node is None or not passed or not (node.op in _PASSED or (negations and node.op == "Not")):
            break
        negated ^= node.op == "Not"
        name = node.inputs[0]
    return name, negated


def phases(split: Split, load: Callable[[bool], Graph]) -> Graph:
    """The decode graph of a merged decoder, with the switch between it and the prefill graph. Raises
    UnsupportedModelError where the branches are not these two."""
    graphs = [load(taken) for taken in (False, True)]
    cached = [bool(graph.inputs_with_role("past")) for graph in graphs]
    if cached[0] == cached[1]:
        reason = (
            "the condition depends on the data, and its branches are not one with and one without a cache"
        )
        raise UnsupportedModelError(f"{label(split.node)}: {reason}")
    names = ["decode" if c else "prefill" for c in cached]
    found = dict(zip(names, graphs, strict=True))
    switch = Switch(lambda given: names[split.holds(given)], found.__getitem__, ("prefill", "decode"))
    return replace(found["decode"], switch=switch)
