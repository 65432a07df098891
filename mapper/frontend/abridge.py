"""Many identical layers at the cost of two: a model file without the layers that repeat others.

What is recognised in one layer holds for all that are identical, so the middle of the pipeline sees KEPT of
them; `extend` puts the others back into the graph that comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mapper.frontend.guard import GuardedModel
from mapper.frontend.proto import NodeRecord, TensorRecord, ValueRecord
from mapper.frontend.repetition import KEPT, LayerRun, Records, layer_runs


@dataclass(frozen=True)
class Abridged:
    """`model` has KEPT bodies of each of `runs`; `inputs`, `outputs` and `stored` tensors are those of the
    whole model."""

    model: GuardedModel
    runs: tuple[LayerRun, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: Mapping[str, TensorRecord]


def abridge(model: GuardedModel) -> Abridged | None:
    """The model without the bodies after the first KEPT of each run of identical layers. None where there is
    no longer run, or where something else reads what would be left out."""
    records = Records.of(model)
    runs = layer_runs(records) if records is not None else []
    if records is None or not runs:
        return None
    graph = model.record.graph
    left_out = {o for r in runs for row in r.outputs.values() for o in row[KEPT:]}
    outputs = [v for v in graph.outputs if v.name not in left_out]
    nodes = _kept(records.nodes, runs, [v.name for v in graph.outputs], [v.name for v in outputs])
    if nodes is None:
        return None
    used = {n for node in nodes for n in node.inputs} | {v.name for v in outputs}
    spare = {n for r in runs for row in r.inputs.values() for n in row[KEPT:]} - used
    given = {v.name: v for v in graph.inputs}
    standing = {n: given[row[0]] for r in runs for row in r.inputs.values() for n in row[KEPT:]}
    short = replace(
        graph,
        nodes=nodes,
        outputs=outputs,
        inputs=[_like(v, standing.get(v.name)) for v in graph.inputs if v.name not in spare],
        tensors=[t for t in graph.tensors if t.name in used],
    )
    whole = tuple(records.inputs), tuple(v.name for v in graph.outputs)
    made = replace(model, record=replace(model.record, graph=short))
    return Abridged(made, tuple(runs), *whole, records.tensors)


def _kept(
    nodes: Sequence[NodeRecord], runs: Iterable[LayerRun], whole: Sequence[str], outputs: Sequence[str]
) -> list[NodeRecord] | None:
    """The nodes that stay: neither in a body that is left out nor needed by such bodies alone."""
    skipped = {r.bodies[-1].exit: r.bodies[KEPT - 1].exit for r in runs}
    removed = {i for r in runs for b in r.bodies[KEPT:] for i in b.nodes}
    gone = {o for i in removed for o in nodes[i].outputs} - skipped.keys()
    kept: list[NodeRecord] = []
    for index, node in enumerate(nodes):
        if index in removed:
            continue
        if gone.isdisjoint(node.inputs):
            kept.append(_renamed(node, skipped))
        else:
            gone.update(node.outputs)
    if not gone.isdisjoint(outputs) or not skipped.keys().isdisjoint(outputs):
        return None
    dead = _live(nodes, whole) - _live(kept, outputs)
    return [n for n in kept if not n.outputs or n.outputs[0] not in dead]


def _like(value: ValueRecord, standing: ValueRecord | None) -> ValueRecord:
    """An input of a body that was left out, where something else reads its shape: with the sizes of the input
    that stands for it."""
    return value if standing is None else replace(value, dims=standing.dims)


def _renamed(node: NodeRecord, names: Mapping[str, str]) -> NodeRecord:
    if names.keys().isdisjoint(node.inputs):
        return node
    return replace(node, inputs=[names.get(n, n) for n in node.inputs])


def _live(nodes: Sequence[NodeRecord], outputs: Iterable[str]) -> set[str]:
    """The first result of every node that `outputs` need."""
    needed, found = set(outputs), set()
    for node in reversed(nodes):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            found.add(node.outputs[0])
    return found
