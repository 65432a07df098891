"""Finding identical consecutive layers: cuts of the hidden path, structural hashing, best repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from xdsl.ir import SSAValue

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, fields
from mapper.ir.structure import OutputOp, RepeatOp

MOST_RUNS = 64
MOST_STEPS = 2_000_000  # comparisons while the best repetition is searched
PRIVATE = ("load", "constant")
"""Ops that are copied into the layer that reads them."""
_VIEWS = frozenset({"transpose", "reshape", "squeeze", "unsqueeze", "cast", "concat", "select"})


@dataclass(frozen=True, eq=False)
class Segment:
    """Ops between two cuts. `entry` is the only value of the hidden path that comes in, `exit` the one that
    leaves."""

    ops: tuple[DataflowOp, ...]
    entry: SSAValue
    exit: SSAValue

    def __add__(self, other: Segment) -> Segment:
        return Segment((*self.ops, *other.ops), self.entry, other.exit)


@dataclass(frozen=True)
class Run:
    """`count` bodies of `period` segments each, from segment `start` on."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """The first segment after the run."""
        return self.start + self.period * self.count


def hidden_path(graph: Graph) -> list[DataflowOp]:
    """The ops that depend on token ids (without such an input: on any input) by more than an input's
    shape."""
    names = graph.inputs_with_role("token_ids") or [n for n, _ in graph.inputs]
    inputs = set(graph.input_values.values())
    found: set[SSAValue] = {graph.input_values[n] for n in names}
    path: list[DataflowOp] = []
    for op in graph.top():
        shape_only = op.mnemonic == "shape_of" and op.operands[0] in inputs
        if not shape_only and any(v in found for v in op.operands):
            found.update(op.results)
            path.append(op)
    tail = tail_ops(graph)
    return [op for op in path if op not in tail]


def tail_ops(graph: Graph) -> set[DataflowOp]:
    """The ops that only give outputs their form: views and stacks of caches. They belong to no layer."""
    found: set[DataflowOp] = set()
    for op in reversed(graph.top()):
        uses = (use.operation for result in op.results for use in result.uses)
        if op.mnemonic in _VIEWS and all(isinstance(u, OutputOp) or u in found for u in uses):
            found.add(op)
    return found


def output_values(graph: Graph) -> set[SSAValue]:
    """The values that are outputs of the graph, or only need their form to become some."""
    return {*graph.output_values.values(), *(v for op in tail_ops(graph) for v in op.operands)}


def segments(path: Sequence[DataflowOp]) -> list[Segment]:
    """The path cut wherever a single value is alive (uses as outputs of the graph do not count)."""
    index = {op: i for i, op in enumerate(path)}
    last: dict[SSAValue, int] = {}
    for value in (r for op in path for r in op.results):
        users = [u.operation for u in value.uses]
        last[value] = max((index[u] for u in users if isinstance(u, DataflowOp) and u in index), default=-1)
    found: list[Segment] = []
    start, entry = 0, None
    live: list[SSAValue] = []
    for i, op in enumerate(path):
        live = [v for v in (*live, *op.results) if last[v] > i]
        if len(live) == 1 or i == len(path) - 1:
            leaving = live[0] if live else op.results[0]
            if entry is not None:
                found.append(Segment(tuple(path[start : i + 1]), entry, leaving))
            start, entry = i + 1, leaving
    return found


def best_runs(keys: Sequence[Any], sizes: Sequence[int], least: int) -> list[Run]:
    """Repetitions of at least `least` bodies that do not overlap, in order: the best one, then the best of
    what is before and after it, and so on."""
    found: list[Run] = []
    stretches = [(0, len(keys))]
    while stretches and len(found) < MOST_RUNS:
        start, stop = stretches.pop()
        run = best_run(keys[start:stop], sizes[start:stop])
        if run is not None and run.count >= least:
            run = Run(run.start + start, run.period, run.count)
            found.append(run)
            stretches += [(start, run.start), (run.stop, stop)]
    return sorted(found, key=lambda r: r.start)


def best_run(keys: Sequence[Any], sizes: Sequence[int]) -> Run | None:
    """The repetition that covers most ops; of equal ones the one with the shortest period, then the first.
    Periods are bounded where there are very many keys."""
    before = [0, *accumulate(sizes)]
    best: tuple[int, int, int] | None = None
    chosen: Run | None = None
    for period in range(1, min(len(keys) // 2, MOST_STEPS // max(len(keys), 1)) + 1):
        if best is not None and best[0] == before[-1]:
            break  # all is covered
        length = 0
        for start in range(len(keys) - period - 1, -1, -1):
            length = length + 1 if keys[start] == keys[start + period] else 0
            count = length // period + 1
            if count < 2:
                continue
            score = (before[start + period * count] - before[start], -period, -start)
            if best is None or score > best:
                best, chosen = score, Run(start, period, count)
    return chosen


@dataclass
class Shape:
    """The structure of a segment: `key` is equal for segments that are the same but for weights and outer
    values.

    `slots` are the weight symbols and `outer` the values from outside, both in order of first use;
    `exported` the values that are outputs of the graph."""

    key: Any
    slots: list[str] = field(default_factory=list)
    outer: list[SSAValue] = field(default_factory=list)
    exported: list[SSAValue] = field(default_factory=list)
    ops: list[DataflowOp] = field(default_factory=list)


def structure(segment: Segment, weights: Mapping[str, Any], outputs: Set[SSAValue]) -> Shape:
    """The structure of a segment; its private loads and constants are taken in. `weights`: what of each
    weight has to be equal."""
    shape = Shape(None)
    local: dict[SSAValue, int] = {segment.entry: -1}
    keys: list[Any] = [segment.entry.type]
    for op in _with_private(segment):
        operands = [_reference(v, local, shape.outer) for v in op.operands]
        named = {a: _position(s, shape.slots) for a, s in op.weights().items()}
        kinds = [weights[s] for s in op.weights().values()]
        plain = frozenset((k, v) for k, v in op.attributes.items() if k not in named and k != "node")
        keys.append((op.name, tuple(operands), tuple(named.items()), tuple(kinds), plain))
        keys.append(tuple(r.type for r in op.results))
        for result in op.results:
            local[result] = len(local)
            if result is not segment.exit and result in outputs:
                shape.exported.append(result)
        shape.ops.append(op)
    exports = tuple(local[v] for v in shape.exported)
    shape.key = (tuple(keys), tuple(v.type for v in shape.outer), exports, local[segment.exit])
    return shape


def _with_private(segment: Segment) -> list[DataflowOp]:
    ops: dict[DataflowOp, None] = {}
    for op in segment.ops:
        for value in op.operands:
            if isinstance(value.owner, DataflowOp) and value.owner.mnemonic in PRIVATE:
                ops[value.owner] = None
        ops[op] = None
    return list(ops)


def _reference(value: SSAValue, local: Mapping[SSAValue, int], outer: list[SSAValue]) -> Any:
    return local[value] if value in local else ("outer", _position(value, outer))


def _position(item: Any, items: list[Any]) -> int:
    if item not in items:
        items.append(item)
    return items.index(item)


def has_repeat(graph: Graph) -> bool:
    """Whether the graph holds a repeat already."""
    return any(isinstance(op, RepeatOp) for op in graph.top())


def slot_name(op: DataflowOp, attribute: str, number: int, taken: Mapping[str, Any]) -> str:
    """A slot's name, as `linear3.weight`: the number counts ops of that kind in the body."""
    assert attribute in fields(type(op))
    name = f"{op.mnemonic}{number}.{attribute}"
    while name in taken:
        name += "_"
    return name
