"""Serving many identical layers at the cost of two: shorten a repeat, transform, extend the result again.

What a repeat does to one iteration it does to all, so a pass that looks at single layers may see two of
them only. `extend` puts the other iterations back: weights from the original's table, caches by their layer
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xdsl.ir import SSAValue

from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.structure import OutputOp, RepeatOp
from mapper.passes.rewrite import Values, builder_like, rewrite_repeat

KEPT = 2
"""Iterations that a shortened repeat has: enough for a repeat to be found again."""


def longest_repeat(graph: Graph) -> RepeatOp | None:
    """The graph's repeat with most iterations, the first of those as long."""
    found = [op for op in graph.top() if isinstance(op, RepeatOp)]
    return max(found, key=lambda op: int(op.attr("count")), default=None)


def shorten(graph: Graph) -> Graph | None:
    """The graph with KEPT iterations of its longest repeat. None where that has no more, or where iterations
    differ in anything but weights, caches (inputs with a `past` role) and outputs."""
    repeat = longest_repeat(graph)
    if repeat is None or repeat.attr("count") <= KEPT:
        return None
    names = {v: n for n, v in graph.input_values.items()}
    roles = graph.roles["inputs"]
    slots = repeat.iterated_operands()
    if not all(roles.get(names.get(v, ""), "").startswith("past.") for slot in slots for v in slot):
        return None
    if not all(_only_output(v) for slot in repeat.iterated_results() for v in slot):
        return None
    return _shortened(graph, repeat, slots)


def _only_output(value: SSAValue) -> bool:
    return all(isinstance(use.operation, OutputOp) for use in value.uses)


def _shortened(graph: Graph, repeat: RepeatOp, slots: Sequence[Sequence[SSAValue]]) -> Graph:
    new = builder_like(graph)
    stand_in = {v: slot[0] for slot in slots for v in slot[KEPT:]}
    values: Values = {}
    for name, value in graph.input_values.items():
        if value not in stand_in:
            values[value] = new.input(name, tensor_type(value), graph.roles["inputs"].get(name, "other"))
    values.update({v: values[first] for v, first in stand_in.items()})
    for op in graph.top():
        if op is repeat:
            table = {slot: symbols[:KEPT] for slot, symbols in repeat.attr("table").items()}
            iterated = [[values[v] for v in slot[:KEPT]] for slot in slots]
            made = rewrite_repeat(new, op, values, _copied, KEPT, table, iterated)
            values.update(_results(repeat, made, KEPT))
        else:
            values.update(zip(op.results, _whole(new, op, values), strict=True))
    outputs = {n: values[v] for n, v in graph.output_values.items() if v in values}
    facts = {k: v for k, v in graph.roles.items() if k not in ("inputs", "outputs")}
    return new.finish(outputs, graph.roles["outputs"], verify=False, **facts)


def _whole(new: GraphBuilder, op: DataflowOp, values: Values) -> Sequence[SSAValue]:
    """The results of an op that is copied as it is; of a repeat with all of its iterations."""
    if not isinstance(op, RepeatOp):
        return new.copy(op, values).results
    iterated = [[values[v] for v in slot] for slot in op.iterated_operands()]
    return rewrite_repeat(new, op, values, _copied, op.attr("count"), op.attr("table"), iterated)


def _copied(*_: object) -> None:
    """The rewriting visitor that leaves every op to be copied."""


def _results(repeat: RepeatOp, made: Sequence[SSAValue], count: int) -> Values:
    """Results of the original repeat -> those of one with `count` iterations, for the iterations that both
    have."""
    carried = repeat.attr("carried")
    found: Values = dict(zip(repeat.results[:carried], made[:carried], strict=True))
    for i, slot in enumerate(repeat.iterated_results()):
        start = carried + i * count
        found.update(zip(slot[:count], made[start : start + count], strict=False))
    return found


def extend(served: Graph, original: Graph) -> Graph | None:
    """The serving form of `original` from that of its shortened graph. None where the shortened layers are no
    repeat of KEPT iterations."""
    source = longest_repeat(original)
    for repeat in served.top():
        if source is None or not isinstance(repeat, RepeatOp) or repeat.attr("count") != KEPT:
            continue
        table = _extended_table(repeat, source)
        caches = _extended_caches(repeat, source, served, original)
        if table is not None and caches is not None:
            return _extended(served, original, repeat, table, caches)
    return None


def _extended_table(repeat: RepeatOp, source: RepeatOp) -> dict[str, tuple[str, ...]] | None:
    rows = {symbols[:KEPT]: symbols for symbols in source.attr("table").values()}
    table = repeat.attr("table")
    if not all(symbols in rows for symbols in table.values()):
        return None
    return {slot: rows[symbols] for slot, symbols in table.items()}


def _extended_caches(
    repeat: RepeatOp, source: RepeatOp, served: Graph, original: Graph
) -> list[list[str]] | None:
    """Per iterated slot of the serving form the cache names of all iterations."""
    roles, names = original.roles["inputs"], {v: n for n, v in original.input_values.items()}
    rows = [
        [roles[names[v]].replace("past", "cache", 1) for v in slot] for slot in source.iterated_operands()
    ]
    by_first = {tuple(row[:KEPT]): row for row in rows}
    inputs = {v: n for n, v in served.input_values.items()}
    keys = [tuple(inputs.get(v, "") for v in slot) for slot in repeat.iterated_operands()]
    return [by_first[k] for k in keys] if all(k in by_first for k in keys) else None


def _extended(
    served: Graph,
    original: Graph,
    repeat: RepeatOp,
    table: Mapping[str, tuple[str, ...]],
    caches: Sequence[Sequence[str]],
) -> Graph:
    new = builder_like(served, weights=False)
    used = {s for symbols in table.values() for s in symbols} | set(served.weights)
    for name, weight in {**original.weights, **served.weights}.items():
        if name in used:
            new.weight(weight)
    values: Values = {}
    plain = [n for n, _ in served.inputs if not n.startswith("cache.")]
    for name in plain:
        old = served.input_values[name]
        values[old] = new.input(name, tensor_type(old), served.roles["inputs"][name])
    kinds = {
        n: tensor_type(s[0]) for row, s in zip(caches, repeat.iterated_operands(), strict=True) for n in row
    }
    alone = [
        n for n, _ in served.inputs if n not in kinds and n not in plain
    ]  # of layers outside of the repeat
    kinds |= {n: tensor_type(served.input_values[n]) for n in alone}
    order = sorted(kinds, key=lambda n: (int(n.split(".")[2]), n))
    inputs = {n: new.input(n, kinds[n], n.replace("cache", "state", 1)) for n in order}
    values.update((served.input_values[n], inputs[n]) for n in alone)
    outputs: dict[str, SSAValue] = {}
    for op in served.top():
        if op is repeat:
            count = len(caches[0]) if caches else 0
            iterated = [[inputs[n] for n in row] for row in caches]
            made = rewrite_repeat(new, repeat, values, _copied, count, table, iterated)
            values.update(zip(repeat.results[:1], made[:1], strict=True))
            outputs = _cache_outputs(served, repeat, caches, made)
        else:
            values.update(zip(op.results, _whole(new, op, values), strict=True))
    made_alone = {n: served.output_values[n] for n in alone if n in served.output_values}
    outputs |= {n: values[v] for n, v in made_alone.items()}
    results = {
        "logits": values[served.output_values["logits"]],
        **{n: outputs[n] for n in order if n in outputs},
    }
    roles = {n: "logits" if n == "logits" else n.replace("cache", "state", 1) for n in results}
    facts = {k: v for k, v in served.roles.items() if k not in ("inputs", "outputs")}
    return new.finish(results, roles, verify=False, **facts)


def _cache_outputs(
    served: Graph, repeat: RepeatOp, caches: Sequence[Sequence[str]], made: Sequence[SSAValue]
) -> dict[str, SSAValue]:
    """Cache name -> its value after the step, from the results of the extended repeat."""
    row_of = {row[0]: row for row in caches}
    names = {v: n for n, v in served.output_values.items()}
    found: dict[str, SSAValue] = {}
    for i, slot in enumerate(repeat.iterated_results()):
        row = row_of[names[slot[0]]]
        start = repeat.attr("carried") + i * len(row)
        found.update(zip(row, made[start : start + len(row)], strict=True))
    return found
