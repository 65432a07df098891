"""Grouping identical consecutive layers into a `repeat`, so that every later cost is O(distinct layers)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.ir import Block, SSAValue

from mapper.ir.builder import BlockBuilder, GraphBuilder
from mapper.ir.graph import Graph
from mapper.passes.dce import Dce
from mapper.passes.layers import (
    Run,
    Segment,
    Shape,
    best_runs,
    has_repeat,
    hidden_path,
    output_values,
    segments,
    slot_name,
    structure,
    tail_ops,
)
from mapper.passes.rewrite import Values, add_repeat, body_scope, builder_like


@dataclass(frozen=True)
class Repeat:
    """Finds runs of layers that differ only in weights and in per-layer values (caches), by structural
    hashing, and makes each run of at least `least` layers a `repeat`. A body may span several layers
    (alternating kinds)."""

    least: int = 2
    name = "repeat"

    def apply(self, graph: Graph) -> Graph:
        """The graph with its layers grouped; itself where there is nothing to group or it holds a repeat
        already."""
        if has_repeat(graph):
            return graph
        cut = segments(hidden_path(graph))
        runs = self._runs(graph, cut)
        if not runs:
            return graph
        return Dce(weights=False).apply(_Grouping(graph, cut, runs).run())

    def _runs(self, graph: Graph, cut: Sequence[Segment]) -> list[Run]:
        weights = {n: w.key for n, w in graph.weights.items()}
        outputs = output_values(graph)
        keys = [structure(s, weights, outputs).key for s in cut]
        numbers: dict[object, int] = {}
        hashes = [numbers.setdefault(k, len(numbers)) for k in keys]
        sizes = [len(s.ops) for s in cut]
        return best_runs(hashes, sizes, self.least)


@dataclass
class _Grouping:
    graph: Graph
    cut: Sequence[Segment]
    runs: Sequence[Run]

    def run(self) -> Graph:
        """The graph with each run as a repeat: first what the hidden path does not touch, then the path, then
        what only gives outputs their form."""
        graph = self.graph
        new: GraphBuilder = builder_like(graph)
        values: Values = {}
        for name, kind in graph.inputs:
            value = new.input(name, kind, graph.roles["inputs"].get(name, "other"))
            values[graph.input_values[name]] = value
        path = hidden_path(graph)
        on_path = set(path)
        grouped = {op: run for run in self.runs for s in self.cut[run.start : run.stop] for op in s.ops}
        rest = [op for op in graph.top() if op not in on_path]
        tail = tail_ops(graph)
        for op in [op for op in rest if op not in tail]:
            values.update(zip(op.results, new.copy(op, values).results, strict=True))
        done: set[Run] = set()
        for op in path:
            if op not in grouped:
                values.update(zip(op.results, new.copy(op, values).results, strict=True))
            elif grouped[op] not in done:
                done.add(grouped[op])
                self._place(new, grouped[op], values)
        for op in [op for op in rest if op in tail]:
            values.update(zip(op.results, new.copy(op, values).results, strict=True))
        outputs = {name: values[v] for name, v in graph.output_values.items()}
        facts = {k: v for k, v in graph.roles.items() if k not in ("inputs", "outputs")}
        return new.finish(outputs, graph.roles["outputs"], verify=False, **facts)

    def _bodies(self, run: Run) -> list[Segment]:
        bodies: list[Segment] = []
        for start in range(run.start, run.stop, run.period):
            body = self.cut[start]
            for segment in self.cut[start + 1 : start + run.period]:
                body = body + segment
            bodies.append(body)
        return bodies

    def _place(self, new: GraphBuilder, run: Run, values: Values) -> None:
        weights = {n: w.key for n, w in self.graph.weights.items()}
        bodies = self._bodies(run)
        outputs = output_values(self.graph)
        shapes = [structure(body, weights, outputs) for body in bodies]
        if len({s.key for s in shapes}) != 1:  # layers equal one by one, but not in what they share
            for body in bodies:
                for op in body.ops:
                    values.update(zip(op.results, new.copy(op, values).results, strict=True))
            return
        columns = list(zip(*(s.outer for s in shapes), strict=True))
        shared = [c for c in columns if len(set(c)) == 1]
        iterated = [c for c in columns if len(set(c)) > 1]
        arguments = [bodies[0].entry, *(c[0] for c in shared), *(c[0] for c in iterated)]
        block = Block(arg_types=[values[v].type for v in arguments])
        sources = [[values[v] for v in column] for column in (*shared, *iterated)]
        local: Values = {}
        local.update(zip(arguments, block.args, strict=True))
        scope = body_scope(new.scope, dict(new.scope.weights), block.args[1:], sources)
        builder = BlockBuilder(block, scope)
        table, yielded = self._body(builder, bodies[0], shapes, local)
        watched = any(body.exit in outputs for body in bodies[:-1])
        yielded += yielded[:1] if watched else []
        results = add_repeat(
            new,
            builder,
            carried=[values[bodies[0].entry]],
            shared=[values[c[0]] for c in shared],
            iterated=[[values[v] for v in c] for c in iterated],
            yielded=yielded,
            count=run.count,
            table=table,
        )
        values[bodies[-1].exit] = results[0]
        exported = [v for column in zip(*(s.exported for s in shapes), strict=True) for v in column]
        exported += [body.exit for body in bodies] if watched else []
        values.update(zip(exported, results[1:], strict=True))

    def _body(
        self, body: BlockBuilder, first: Segment, shapes: Sequence[Shape], local: Values
    ) -> tuple[dict[str, tuple[str, ...]], list[SSAValue]]:
        """Fills the body from the first iteration's ops; the slot table and the yielded values."""
        rows = list(zip(*(s.slots for s in shapes), strict=True))
        symbols = {row[0]: row for row in rows if len(set(row)) > 1}
        slots: dict[str, str] = {}
        table: dict[str, tuple[str, ...]] = {}
        numbers: Counter[str] = Counter()
        for op in shapes[0].ops:
            renamed: dict[str, str] = {}
            for attribute, symbol in op.weights().items():
                if symbol in symbols and symbol not in slots:
                    slot = slot_name(op, attribute, numbers[op.mnemonic], body.scope.weights)
                    slots[symbol], table[slot] = slot, symbols[symbol]
                    body.scope.weights[slot] = body.scope.weights[symbol]
                if symbol in slots:
                    renamed[attribute] = slots[symbol]
            numbers[op.mnemonic] += 1
            local.update(zip(op.results, body.copy(op, local, renamed).results, strict=True))
        yielded = [local[first.exit], *(local[v] for v in shapes[0].exported)]
        return table, yielded
