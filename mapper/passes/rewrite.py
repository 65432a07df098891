"""Rebuilding a graph op by op: the base of the passes that change types or replace ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from xdsl.ir import Block, Operation, Region, SSAValue

from mapper.ir.builder import BlockBuilder, GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.infer import Scope
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.structure import RepeatOp, YieldOp
from mapper.ir.types import TensorType
from mapper.ir.verify import slot_types

Values = dict[SSAValue, SSAValue]
"""Old value -> new value."""

Visit = Callable[[BlockBuilder, DataflowOp, Values], Sequence[SSAValue] | None]
"""Called for every op but repeats: the new values of its results, or None to copy it."""


def builder_like(graph: Graph, weights: bool = True) -> GraphBuilder:
    """An empty builder with the graph's name, digest and places, and its weights unless told otherwise."""
    made = GraphBuilder(graph.name, graph.path, graph.folder, graph.sha256)
    if weights:
        for symbol in graph.weights.values():
            made.weight(symbol)
    return made


def rewrite(
    graph: Graph,
    visit: Visit,
    types: Mapping[str, TensorType] | None = None,
    values: Values | None = None,
) -> Graph:
    """The graph rebuilt, every op through `visit`, with other input types where `types` names an input.

    Result types are inferred anew. Raises ModelError where the new types do not fit an op.
    """
    return rewrite_graph(graph, lambda new, op, values: rewrite_op(new, op, values, visit), types, values)


def rewrite_graph(
    graph: Graph,
    place: Callable[[BlockBuilder, DataflowOp, Values], None],
    types: Mapping[str, TensorType] | None = None,
    values: Values | None = None,
) -> Graph:
    """The graph rebuilt by `place`, which appends each top-level op and records its results (in `values`,
    where the caller wants the map)."""
    new = builder_like(graph)
    values = {} if values is None else values
    for name, kind in graph.inputs:
        given = (types or {}).get(name, kind)
        values[graph.input_values[name]] = new.input(name, given, graph.roles["inputs"].get(name, "other"))
    for op in graph.top():
        place(new, op, values)
    outputs = {name: values[v] for name, v in graph.output_values.items()}
    facts = {k: v for k, v in graph.roles.items() if k not in ("inputs", "outputs")}
    return new.finish(outputs, graph.roles["outputs"], verify=False, **facts)


def erase(op: Operation) -> None:
    """Removes an op whose results nobody uses."""
    parent = op.parent
    assert parent is not None
    parent.erase_op(op)


def rewrite_op(new: BlockBuilder, op: DataflowOp, values: Values, visit: Visit) -> None:
    """Rebuilds one op, and records its results in `values`."""
    if isinstance(op, RepeatOp):
        results: Sequence[SSAValue] = rewrite_repeat(new, op, values, visit)
    else:
        results = visit(new, op, values) or new.copy(op, values).results
    values.update(zip(op.results, results, strict=True))


def rewrite_repeat(
    new: BlockBuilder,
    op: RepeatOp,
    values: Values,
    visit: Visit,
    count: int | None = None,
    table: Mapping[str, Sequence[str]] | None = None,
    iterated: Sequence[Sequence[SSAValue]] | None = None,
) -> Sequence[SSAValue]:
    """Rebuilds a repeat with its body; the results. With another `count`, `table` and (new) `iterated` values
    where those are given."""
    carried = op.attr("carried")
    n = carried + op.attr("shared")
    outer = [values[v] for v in op.operands[:n]]
    if iterated is None:
        iterated = [[values[v] for v in slot] for slot in op.iterated_operands()]
    block = Block(arg_types=[v.type for v in (*outer, *(slot[0] for slot in iterated))])
    sources = [*([v] for v in outer[carried:]), *iterated]
    slots = {slot: new.scope.weight(symbols[0]) for slot, symbols in (table or {}).items()}
    weights = {**slot_types(op, new.scope), **slots}
    scope = body_scope(new.scope, weights, block.args[carried:], sources)
    body = BlockBuilder(block, scope)
    local: Values = {}
    local.update(zip(op.block.args, block.args, strict=True))
    for inner in op.ops():
        rewrite_op(body, inner, local, visit)
    last = op.block.last_op
    assert isinstance(last, YieldOp)
    return add_repeat(
        new,
        body,
        carried=outer[:carried],
        shared=outer[carried:],
        iterated=iterated,
        yielded=[local[v] for v in last.operands],
        count=op.attr("count") if count is None else count,
        table=op.attr("table") if table is None else table,
    )


def body_scope(
    outside: Scope,
    weights: dict[str, TensorType],
    arguments: Sequence[SSAValue],
    sources: Sequence[Sequence[SSAValue]],
) -> Scope:
    """The scope of a repeat's body: weights and slots, and what is known of the shared and iterated
    arguments in every iteration. `sources` are the outer values of each argument."""
    scope = Scope(weights)
    for argument, values in zip(arguments, sources, strict=True):
        known = [outside.known.get(v) for v in values]
        first = known[0]
        if first is not None and all(k is not None and np.array_equal(first, k) for k in known):
            scope.known[argument] = first
    return scope


def add_repeat(
    new: BlockBuilder,
    body: BlockBuilder,
    carried: Sequence[SSAValue],
    shared: Sequence[SSAValue],
    iterated: Sequence[Sequence[SSAValue]],
    yielded: Sequence[SSAValue],
    count: int,
    table: Mapping[str, Sequence[str]],
) -> Sequence[SSAValue]:
    """Appends a repeat whose finished body is `body`, without its yield; the results."""
    body.block.add_op(YieldOp.create(operands=list(yielded)))
    outs = [v.type for v in yielded[len(carried) :] for _ in range(count)]
    made = RepeatOp.create(
        operands=[*carried, *shared, *(v for slot in iterated for v in slot)],
        result_types=[*(tensor_type(v) for v in yielded[: len(carried)]), *outs],
        regions=[Region(body.block)],
    )
    counts = {"count": count, "carried": len(carried), "shared": len(shared)}
    for name, value in {**counts, "table": dict(table)}.items():
        made.set_attr(name, value)
    new.block.add_op(made)
    return made.results
