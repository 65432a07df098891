"""From the graph of an abridged model to that of the whole one: repeats get their other iterations back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xdsl.ir import SSAValue

from mapper.frontend import tensors
from mapper.frontend.abridge import Abridged
from mapper.frontend.repetition import KEPT, LayerRun
from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.structure import OutputOp, RepeatOp
from mapper.ir.weights import Packing, WeightSymbol
from mapper.passes.rewrite import Values, builder_like, rewrite_op, rewrite_repeat

Rows = Mapping[str, tuple[str, ...]]
_NUMBERED = re.compile(r"(.+)\.(\d+)")


class NotAlike(Exception):
    """The repeats that were found are not the layers that were left out."""


def extend(graph: Graph, short: Abridged) -> Graph:
    """The graph of the whole model, unverified. Raises NotAlike where the graph's repeats are not the runs of
    layers, or where recognition read the numbers of a weight of one layer."""
    if not short.model.looked.isdisjoint(n for run in short.runs for n in run.weights):
        raise NotAlike
    repeats = [op for op in graph.top() if isinstance(op, RepeatOp)]
    rows = [_stored_rows(graph, run) for run in short.runs]
    pairs = zip(short.runs, rows, strict=True)
    plans = [p for run, table in pairs for op in repeats if (p := _plan(graph, op, run, table)) is not None]
    if len(plans) != len(short.runs) or len({id(p.op) for p in plans}) != len(plans):
        raise NotAlike
    new = builder_like(graph, weights=False)
    known = dict(graph.weights)
    for table in rows:
        for name in [n for n in graph.weights if n in table]:
            for i in range(KEPT, len(table[name])):
                _declare(known, short, table, name, i)
    for name in expanded(list(graph.weights), rows):
        new.weight(known[name])
    return _extended(graph, short, new, {id(p.op): p for p in plans})


def _stored_rows(graph: Graph, run: LayerRun) -> dict[str, tuple[str, ...]]:
    """The rows of a run's weights that the graph has; packed ones and parts that are made for them are named
    after the integers."""
    rows = {n: row for n, row in run.weights.items() if n in graph.weights}
    for name, weight in graph.weights.items():
        if weight.packing is not None and weight.packing.values.name in rows:
            integers = weight.packing.values.name
            for made in (name, *(p.name for p in weight.packing.parts.values())):
                if made not in rows and made.startswith(integers):
                    rows[made] = tuple(n + made.removeprefix(integers) for n in rows[integers])
    return rows


def _declare(known: dict[str, WeightSymbol], short: Abridged, rows: Rows, name: str, i: int) -> WeightSymbol:
    """Adds what stands for the weight `name` of the first body in body `i` to the known weights."""
    own = rows[name][i]
    if own in known:
        return known[own]
    first = known[name]
    if own in short.stored:
        known[own] = _symbol(short, own)
    elif first.packing is None:
        known[own] = replace(first, name=own)
    else:
        parts = first.packing.parts.items()
        made = {n: _declare(known, short, rows, p.name, i) if p.name in rows else p for n, p in parts}
        known[own] = replace(first, name=own, packing=Packing(first.packing.scheme, **made))
    return known[own]


def expanded(names: Sequence[str], rows: Iterable[Rows]) -> list[str]:
    """The names, with those of the bodies that were left out after those of the last body that was kept."""
    found = list(names)
    for table in rows:
        first = [n for n in names if n in table]
        if not first:
            continue
        known = {n: i for i, n in enumerate(found)}
        if not all(table[n][KEPT - 1] in known for n in first):
            raise NotAlike
        at = max(known[table[n][KEPT - 1]] for n in first) + 1
        later = (name for body in zip(*(table[n][KEPT:] for n in first), strict=True) for name in body)
        found[at:at] = dict.fromkeys(n for n in later if n not in known)
    return found


def renumbered(roles: Mapping[str, str], names: Iterable[str], rows: Sequence[Rows]) -> dict[str, str]:
    """The roles of all names: numbered ones count through the bodies that were left out, others are those of
    the first body."""
    groups: dict[str, dict[int, str]] = {}
    for name, role in roles.items():
        if numbered := _NUMBERED.fullmatch(role):
            groups.setdefault(numbered[1], {})[int(numbered[2])] = name
    found = dict(roles)
    for table in rows:
        found.update((n, roles[row[0]]) for row in table.values() if row[0] in roles for n in row[KEPT:])
    for kind, members in groups.items():
        if sorted(members) != list(range(len(members))):
            raise NotAlike
        order = expanded([members[i] for i in range(len(members))], rows)
        found.update((name, f"{kind}.{i}") for i, name in enumerate(order))
    return {n: found.get(n, "other") for n in names}


def _cache_table(table: Mapping[str, Mapping[str, str]], runs: Sequence[LayerRun]) -> dict[str, Any]:
    """The table of caches with those of the bodies that were left out, numbered like their roles."""
    entries = {entry["input"]: entry for entry in table.values()}
    if len(entries) != len(table):
        raise NotAlike  # several caches in one input
    for run in runs:
        for name, row in run.inputs.items():
            if name not in entries:
                continue
            made = run.outputs.get(entries[name]["output"], ())
            if len(made) != len(row):
                raise NotAlike
            pairs = zip(row[KEPT:], made[KEPT:], strict=True)
            entries.update((n, {**entries[name], "input": n, "output": out}) for n, out in pairs)
    keys = {entry["input"]: key for key, entry in table.items()}
    numbered = renumbered(keys, entries, [r.inputs for r in runs])
    return {numbered[n]: entries[n] for n in sorted(entries, key=lambda n: _place(numbered[n]))}


def _place(key: str) -> tuple[int, str]:
    kind, _, number = key.rpartition(".")
    return int(number), kind


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a repeat becomes: its table, the graph inputs of each iterated operand, and the graph outputs of
    each iterated result."""

    op: RepeatOp
    count: int
    table: dict[str, tuple[str, ...]]
    inputs: list[tuple[str, ...]]
    outputs: list[tuple[str, ...]]


def _plan(graph: Graph, op: RepeatOp, run: LayerRun, weights: Rows) -> _Plan | None:
    """How a repeat is extended to a run; None where the run's bodies are not iterations of it."""
    slots = op.attr("table")
    direct = {s for inner in op.ops() for s in inner.weights().values() if s not in slots}
    if not direct.isdisjoint(weights) or not all(map(_only_output, _iterated(op))):
        return None
    inputs, outputs = _names(graph.input_values), _names(graph.output_values)
    taken = [[inputs.get(v, "") for v in slot] for slot in op.iterated_operands()]
    given = [[outputs.get(v, "") for v in slot] for slot in op.iterated_results()]
    length = len(run.bodies)
    columns = ((slots.values(), weights), (taken, run.inputs), (given, run.outputs))
    found = [[_widened(names, rows, length) for names in short] for short, rows in columns]
    starts = {start for column in found for start, _ in column}
    if not starts or -1 in starts or max(starts) - min(starts) > 1:  # 1: a run may begin inside an iteration
        return None
    table, wide, out = ([row for _, row in column] for column in found)
    return _Plan(op, op.attr("count") - KEPT + length, dict(zip(slots, table, strict=True)), wide, out)


def _names(values: Mapping[str, SSAValue]) -> dict[SSAValue, str]:
    return {v: n for n, v in values.items()}


def _widened(names: Sequence[str], rows: Rows, length: int) -> tuple[int, tuple[str, ...]]:
    """(where the run begins, the names of all iterations) of the names that a slot has in those that were
    kept: its own names give way to those of all `length` bodies. -1 where they are not the run's."""
    for start in range(len(names) - KEPT + 1):
        kept = tuple(names[start : start + KEPT])
        row = rows.get(kept[0], ())
        if not row and len(set(kept)) == 1 and kept[0]:
            row = kept[:1] * length  # shared by these iterations
        if row[:KEPT] == kept:
            return start, (*names[:start], *row, *names[start + KEPT :])
    return -1, ()


def _iterated(op: RepeatOp) -> list[SSAValue]:
    return [v for slot in op.iterated_results() for v in slot]


def _only_output(value: SSAValue) -> bool:
    users = [use.operation for use in value.uses]
    return len(users) == 1 and isinstance(users[0], OutputOp)


def _symbol(short: Abridged, name: str) -> WeightSymbol:
    """The weight of a body that was left out."""
    tensor, model = short.stored[name], short.model
    location, folder = model.locations[id(tensor)], model.path.parent
    data = None if location.file is not None else tensors.read(tensor, model.source, location, folder)
    dtype = tensors.DTYPES[tensor.dtype][0]
    where = location.file, location.offset, location.bytes
    return WeightSymbol(name, tuple(tensor.dims), dtype, *where, data, folder)


def _extended(graph: Graph, short: Abridged, new: GraphBuilder, plans: Mapping[int, _Plan]) -> Graph:
    first = {n: row[0] for r in short.runs for row in r.inputs.values() for n in row}
    taken, given = [r.inputs for r in short.runs], [r.outputs for r in short.runs]
    roles = renumbered(graph.roles["inputs"], short.inputs, taken)
    kinds = dict(graph.inputs)
    inputs = {n: new.input(n, kinds.get(n) or kinds[first[n]], roles[n]) for n in short.inputs}
    values: Values = {v: inputs[n] for n, v in graph.input_values.items()}
    outputs: dict[str, SSAValue] = {}
    for op in graph.top():
        plan = plans.get(id(op))
        if plan is not None:
            _repeat(new, plan, values, inputs, outputs)
        elif op.regions and not isinstance(op, RepeatOp):
            raise NotAlike
        else:
            rewrite_op(new, op, values, _copied)
    made = graph.output_values
    if any(n not in outputs and n not in made for n in short.outputs):
        raise NotAlike  # an output of each layer that its repeat does not give
    results = {n: outputs[n] if n in outputs else values[made[n]] for n in short.outputs}
    facts = {k: v for k, v in graph.roles.items() if k not in ("inputs", "outputs")}
    if "caches" in facts:
        facts["caches"] = _cache_table(facts["caches"], short.runs)
    out_roles = renumbered(graph.roles["outputs"], short.outputs, given)
    return new.finish(results, out_roles, verify=False, **facts)


def _copied(*_: object) -> None:
    """The rewriting visitor that leaves every op to be copied."""


def _repeat(
    new: GraphBuilder,
    plan: _Plan,
    values: Values,
    inputs: Mapping[str, SSAValue],
    outputs: dict[str, SSAValue],
) -> None:
    """Places a whole run, and records what it gives."""
    iterated = [[inputs[n] for n in row] for row in plan.inputs]
    made = rewrite_repeat(new, plan.op, values, _copied, plan.count, plan.table, iterated)
    carried = plan.op.attr("carried")
    values.update(zip(plan.op.results[:carried], made[:carried], strict=True))
    for i, row in enumerate(plan.outputs):
        start = carried + i * plan.count
        outputs.update(zip(row, made[start : start + plan.count], strict=True))
