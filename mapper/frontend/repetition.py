"""Identical layers of a model file, found on its decoded nodes before anything is built of them.

The hidden path (what the token ids reach) is cut wherever a single value is alive. Stretches between cuts
that have the same operators, attributes and constants are candidates; two are the same layer only where
walking from their results back to what they start from meets the same structure node by node. They may
differ in the names of weights of equal type, and in graph inputs and outputs of their own (caches).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mapper.errors import MapperError
from mapper.frontend import tensors
from mapper.frontend.guard import GuardedModel
from mapper.frontend.importer import is_held
from mapper.frontend.lower import MS
from mapper.frontend.proto import (
    Attribute,
    AttributeRecord,
    GraphRecord,
    NodeRecord,
    TensorRecord,
    ValueRecord,
)
from mapper.passes.layers import Run, best_runs

KEPT = 2
"""Iterations that stand for all: enough for a repeat to be found among them."""

MAX_STARTS = 16  # inputs that are tried as the start of the hidden path
SHAPES = ("Shape", "Size")
_PATH = -1


@dataclass(frozen=True)
class Body:
    """One layer, or one period of alternating layers: indices of the nodes on the hidden path, the value that
    comes in, the one that leaves, and the graph outputs made inside."""

    nodes: frozenset[int]
    entry: str
    exit: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class LayerRun:
    """Identical bodies in a row. `weights`, `inputs` and `outputs` map a name of the first body to the names
    that take its place in each body."""

    bodies: tuple[Body, ...]
    weights: dict[str, tuple[str, ...]]
    inputs: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]


@dataclass(eq=False)
class Records:
    """The main graph of a model by name: who makes what, and what stored values are."""

    model: GuardedModel
    nodes: Sequence[NodeRecord]
    producer: dict[str, int]
    inputs: dict[str, tuple[Any, ...]]
    tensors: dict[str, TensorRecord]
    inline: set[str]
    signatures: list[int] = field(default_factory=list)
    ids: dict[Any, int] = field(default_factory=dict)
    _contents: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(model: GuardedModel) -> Records | None:
        """The records of a model; None where it has sub-graphs, which are not looked into."""
        graph = model.record.graph
        nodes = [part for node in graph.nodes for part in parted(node)]
        stored = {t.name: t for t in graph.tensors}
        producer = {o: i for i, n in enumerate(nodes) for o in n.outputs if o}
        inputs = input_kinds([v for v in graph.inputs if v.name not in stored])
        constants = {n.outputs[0]: t for n in nodes if (t := _constant(n)) is not None}
        found = Records(model, nodes, producer, inputs, stored | constants, set(constants))
        try:
            found.signatures = [found.signature(n) for n in nodes]
        except _SubGraph:
            return None
        return found

    def number(self, key: Any) -> int:
        """A number that stands for a key."""
        return self.ids.setdefault(key, len(self.ids))

    def signature(self, node: NodeRecord) -> int:
        """A number that is equal for nodes with the same operator, attributes and count of values."""
        attributes = [(a.name, a.refers, self._plain(a.value)) for a in node.attributes.values()]
        counts = len(node.inputs), len(node.outputs)
        return self.number((node.domain, node.op, node.overload, counts, *sorted(attributes, key=_first)))

    def _plain(self, value: Attribute) -> Any:
        if isinstance(value, list):
            return tuple(map(self._plain, value))
        if isinstance(value, GraphRecord):
            raise _SubGraph
        if isinstance(value, TensorRecord):
            return value.dtype, tuple(value.dims), self._content(value, True)
        return type(value).__name__, value

    def content(self, name: str) -> Any:
        """The type and elements of a stored value that becomes a constant; None for what is none."""
        if name not in self._contents:
            tensor = self.tensors.get(name)
            self._contents[name] = None if tensor is None else self._content(tensor, name in self.inline)
        return self._contents[name]

    def _content(self, tensor: TensorRecord, inline: bool) -> Any:
        location = self.model.locations.get(id(tensor))
        if location is None or not is_held(tensor, location, inline):
            return None
        try:
            array = tensors.read(tensor, self.model.source, location, self.model.path.parent)
        except (MapperError, ValueError):
            return None
        return tensor.dtype, tuple(tensor.dims), array.tobytes()

    def is_weight(self, name: str) -> bool:
        """Whether the value is stored and stays a weight."""
        return name in self.tensors and self.content(name) is None

    def kind(self, name: str) -> tuple[Any, ...]:
        """The type of a stored value or of a graph input."""
        tensor = self.tensors.get(name)
        return self.inputs[name] if tensor is None else (tensor.dtype, *tensor.dims)


def input_kinds(inputs: Sequence[ValueRecord]) -> dict[str, tuple[Any, ...]]:
    """Input -> its type; a size named in it alone is written as None: exporters name the length of each cache
    anew."""
    words: Counter[Any] = Counter(w for v in inputs for d in v.dims or () for w in _WORD.findall(str(d)))
    return {v.name: (v.dtype, *(None if words[d] == 1 else d for d in v.dims or ())) for v in inputs}


_WORD = re.compile(r"[^\W\d]\w*")


class _SubGraph(Exception):
    """A node holds a graph."""


def _first(item: tuple[Any, ...]) -> Any:
    return item[0]


def _constant(node: NodeRecord) -> TensorRecord | None:
    value = node.attributes.get("value") if node.op == "Constant" and not node.domain else None
    return value.value if value and isinstance(value.value, TensorRecord) and node.outputs else None


def parted(node: NodeRecord) -> list[NodeRecord]:
    """A norm that adds the residual first, as the addition and the norm: layers are cut between them."""
    norm, at = _SKIPPING.get(node.op, ("", 0))
    if not norm or node.domain not in ("", MS) or len(node.inputs) < 3 or any(node.outputs[1:3]):
        return [node]
    out = node.outputs[0]
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else f"{out}:sum"
    x, made = node.inputs[0], []
    if len(node.inputs) > at and node.inputs[at]:
        x = f"{out}:biased"
        made.append(NodeRecord("Add", "", node.name, [node.inputs[0], node.inputs[at]], [x]))
    made.append(NodeRecord("Add", "", node.name, [x, node.inputs[1]], [total]))
    epsilon = {"epsilon": AttributeRecord("epsilon", 1e-12)} | node.attributes  # onnxruntime's default
    return [*made, NodeRecord(norm, MS, node.name, [total, *node.inputs[2:at]], [out], epsilon)]


_SKIPPING = {
    "SkipLayerNormalization": ("LayerNormalization", 4),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 3),
}


def layer_runs(records: Records) -> list[LayerRun]:
    """Runs of more than KEPT identical layers, along the first input from which there are any."""
    starts = [name for name, (_, *dims) in records.inputs.items() if len(dims) <= 3]
    for name in starts[:MAX_STARTS]:
        runs = list(_runs_from(records, name))
        if runs:
            return runs
    return []


def _runs_from(records: Records, start: str) -> Iterator[LayerRun]:
    path = hidden_path(records, start)
    bodies = segments(records, path)
    if len(bodies) <= KEPT:
        return
    classes, steered = classify(records, set(path))
    keys = [records.number(tuple(sorted(classes[i] for i in b.nodes))) for b in bodies]
    pairing = Pairing(records, set(path), steered)
    for run in best_runs(keys, [len(b.nodes) for b in bodies], KEPT + 1):
        found = pairing.run([_joined(bodies[i : i + run.period]) for i in _starts(run)])
        if found is not None:
            yield found


def _starts(run: Run) -> range:
    return range(run.start, run.stop, run.period)


def _joined(bodies: Sequence[Body]) -> Body:
    nodes = frozenset().union(*(b.nodes for b in bodies))
    outputs = tuple(o for b in bodies for o in b.outputs)
    return Body(nodes, bodies[0].entry, bodies[-1].exit, outputs)


def hidden_path(records: Records, start: str) -> list[int]:
    """The nodes that `start` reaches by more than its shape."""
    found, path = {start}, []
    for index, node in enumerate(records.nodes):
        if node.op not in SHAPES and not found.isdisjoint(node.inputs):
            found.update(o for o in node.outputs if o)
            path.append(index)
    return path


def segments(records: Records, path: Sequence[int]) -> list[Body]:
    """The path cut wherever a single value is alive; what follows the last cut is left out."""
    last = {name: i for i in path for name in records.nodes[i].inputs}
    given = {v.name for v in records.model.record.graph.outputs}
    live: set[str] = set()
    nodes: list[int] = []
    made: list[str] = []
    entry = ""
    found: list[Body] = []
    for index in path:
        node = records.nodes[index]
        nodes.append(index)
        made += [o for o in node.outputs if o in given]
        live.update(o for o in node.outputs if last.get(o, -1) > index)
        live.difference_update(n for n in node.inputs if last[n] == index)
        if len(live) == 1:
            (leaving,) = live
            if entry:
                found.append(Body(frozenset(nodes), entry, leaving, tuple(made)))
            nodes, made, entry = [], [], leaving
    return found


def classify(records: Records, path: set[int]) -> tuple[dict[int, int], set[str]]:
    """(a number for each node of the path that is equal where operator and operands are alike, the names off
    the path that depend on an input of the graph)."""
    steered = set(records.inputs)
    classes: dict[int, int] = {}
    values: dict[str, int] = {}

    def operand(name: str, named: bool) -> int:
        if name not in values:
            if records.is_weight(name):
                return records.number(("weight", name if named else records.kind(name)))
            known = records.content(name) if name in records.tensors else name and records.kind(name)
            values[name] = records.number(("leaf", known))
        return values[name]

    for index, node in enumerate(records.nodes):
        if index in path:
            operands = tuple(operand(n, False) for n in node.inputs)
            classes[index] = records.number((records.signatures[index], operands))
            values.update(dict.fromkeys(node.outputs, _PATH))
            steered.update(node.outputs)
        elif node.outputs and node.outputs[0] not in records.inline:
            named = not steered.isdisjoint(node.inputs)
            number = records.number((records.signatures[index], *(operand(n, named) for n in node.inputs)))
            values.update((o, records.number(("result", number, i))) for i, o in enumerate(node.outputs))
            steered.update(node.outputs if named else ())
    return classes, steered


@dataclass(eq=False)
class Pairing:
    """Walks two bodies at once, from their results back to what they start from."""

    records: Records
    path: set[int]
    steered: set[str]

    def run(self, bodies: Sequence[Body]) -> LayerRun | None:
        """The run of those bodies that are the same as the first; None where they are too few."""
        pairs: list[dict[str, str]] = []
        for body in bodies[1:]:
            found = self.pair(bodies[0], body)
            if found is None or (pairs and found.keys() != pairs[0].keys()):
                break
            pairs.append(found)
        same = tuple(bodies[: len(pairs) + 1])
        if len(same) <= KEPT:
            return None
        rows = {n: (n, *(p[n] for p in pairs)) for n in pairs[0]}
        rows = {n: row for n, row in rows.items() if len(set(row)) > 1}
        weights = {n: row for n, row in rows.items() if n in self.records.tensors}
        inputs = {n: row for n, row in rows.items() if n in self.records.inputs}
        if any(len(set(row[:KEPT])) == 1 for row in (*weights.values(), *inputs.values())):
            return None  # shared by those that are kept, but not by all
        return LayerRun(same, weights, inputs, {n: rows[n] for n in bodies[0].outputs})

    def pair(self, first: Body, other: Body) -> dict[str, str] | None:
        """Name in the first body -> name in the other; None where they differ."""
        pairs, back = {first.entry: other.entry}, {other.entry: first.entry}
        if not self._walk(first, other, [(first.exit, other.exit)], pairs, back):
            return None
        rest = [n for n in first.outputs if n not in pairs], [n for n in other.outputs if n not in back]
        if len(rest[0]) != len(rest[1]):
            return None
        if not self._walk(first, other, list(zip(*rest, strict=True)), pairs, back):
            return None
        return pairs if {pairs[n] for n in first.outputs} == set(other.outputs) else None

    def _walk(
        self,
        first: Body,
        other: Body,
        pending: list[tuple[str, str]],
        pairs: dict[str, str],
        back: dict[str, str],
    ) -> bool:
        """Pairs all that `pending` is computed from; whether it is the same."""
        while pending:
            a, b = pending.pop()
            content = self.records.content(a)
            if content is not None or not a:
                if a != b and (content is None or content != self.records.content(b)):
                    return False
            elif a in pairs or b in back:
                if pairs.get(a) != b:
                    return False
            else:
                pairs[a], back[b] = b, a
                operands = self._operands(first, other, a, b)
                if operands is None:
                    return False
                pending += operands
        return True

    def _operands(self, first: Body, other: Body, a: str, b: str) -> list[tuple[str, str]] | None:
        """The operands of what makes `a` and `b`, None where those differ. Leaves have none."""
        records = self.records
        if a == b:
            return []
        for leaves in (records.tensors, records.inputs):
            if a in leaves:
                same = b in leaves and records.kind(a) == records.kind(b)
                return [] if same and records.content(b) is None else None
        i, j = records.producer.get(a), records.producer.get(b)
        if i is None or j is None or records.signatures[i] != records.signatures[j]:
            return None
        on_path = i in self.path or j in self.path
        if on_path and not (i in first.nodes and j in other.nodes):
            return None
        left, right = records.nodes[i], records.nodes[j]
        if left.outputs.index(a) != right.outputs.index(b):
            return None
        operands = list(zip(left.inputs, right.inputs, strict=True))
        steering = not on_path and a in self.steered
        if steering and any(x != y and records.is_weight(x) for x, y in operands):
            return None  # layers with angles or masks of their own are looked at one by one
        return operands
