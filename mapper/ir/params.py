"""Which weight symbols are parameters of the model, and which only make positions (rotary frequencies)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.ir import SSAValue

from mapper.ir.op import DataflowOp
from mapper.ir.structure import RepeatOp

if TYPE_CHECKING:
    from mapper.ir.graph import Graph


def parameters(graph: Graph) -> set[str]:
    """Names of the weights that reach what is computed from tokens. A weight that is only combined with
    positions or masks first, and a table that a pass derived, is none. Without an input of token ids every
    weight counts."""
    tokens = {graph.input_values[n] for n in graph.inputs_with_role("token_ids")}
    if not tokens:
        return {n for n, w in graph.weights.items() if not w.derived}
    from_inputs: set[SSAValue] = set(graph.input_values.values())
    pending: dict[SSAValue, set[str]] = {}
    found: set[str] = set()
    for op in graph.top():
        by_value = op.mnemonic != "shape_of"
        on_path = by_value and any(v in tokens for v in op.operands)
        reading = {name for v in op.operands for name in pending.get(v, ())} | _named(op)
        if on_path or op.mnemonic == "embed_at" or (op.mnemonic == "embed" and reading):
            found |= reading
        elif not any(v in from_inputs for v in op.operands):
            pending.update(dict.fromkeys(op.results, reading))
        if on_path:
            tokens.update(op.results)
        if any(v in from_inputs for v in op.operands):
            from_inputs.update(op.results)
    return {n for n in found if not graph.weights[n].derived}


def _named(op: DataflowOp) -> set[str]:
    """The symbols that an op names, those of a repeat's body included."""
    if not isinstance(op, RepeatOp):
        return set(op.weights().values())
    table = op.attr("table")
    inside = {s for inner in op.ops() for s in inner.weights().values() if s not in table}
    return inside | {s for symbols in table.values() for s in symbols}
