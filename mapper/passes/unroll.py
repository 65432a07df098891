"""Unrolling: every repeat as its iterations, one after the other. The inverse of `repeat`."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.ir import SSAValue

from mapper.ir.builder import BlockBuilder
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.structure import RepeatOp, YieldOp
from mapper.passes.rewrite import Values, rewrite_graph


@dataclass(frozen=True)
class Unroll:
    """Replaces each repeat by copies of its body with the weights of the iteration."""

    name = "unroll"

    def apply(self, graph: Graph) -> Graph:
        """The graph without repeats; itself where it has none."""
        if not any(isinstance(op, RepeatOp) for op in graph.top()):
            return graph
        return rewrite_graph(graph, _unroll_op)


def _unroll_op(new: BlockBuilder, op: DataflowOp, values: Values) -> None:
    if isinstance(op, RepeatOp):
        _unroll_repeat(new, op, values)
    else:
        values.update(zip(op.results, new.copy(op, values).results, strict=True))


def _unroll_repeat(new: BlockBuilder, op: RepeatOp, values: Values) -> None:
    carried = op.attr("carried")
    n = carried + op.attr("shared")
    last = op.block.last_op
    assert isinstance(last, YieldOp)
    state: list[SSAValue] = [values[v] for v in op.operands[:n]]
    for i in range(op.attr("count")):
        slots = {slot: symbols[i] for slot, symbols in op.attr("table").items()}
        local: Values = {}
        local.update(
            zip(op.block.args, [*state, *(values[s[i]] for s in op.iterated_operands())], strict=True)
        )
        for inner in op.ops():
            renamed = {a: slots[s] for a, s in inner.weights().items() if s in slots}
            made = new.copy(inner, local, renamed)
            local.update(zip(inner.results, made.results, strict=True))
        state[:carried] = [local[v] for v in last.operands[:carried]]
        for slot, value in zip(op.iterated_results(), last.operands[carried:], strict=True):
            values[slot[i]] = local[value]
    values.update(zip(op.results[:carried], state[:carried], strict=True))
