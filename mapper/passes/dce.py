"""Dead code elimination: ops and weight symbols that no output depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.structure import RepeatOp, WeightOp
from mapper.passes.rewrite import erase


@dataclass(frozen=True)
class Dce:
    """Removes ops without used results; with `weights`, also weight symbols that nothing names."""

    weights: bool = True
    name = "dce"

    def apply(self, graph: Graph) -> Graph:
        """The graph without dead code."""
        new = graph.clone()
        _sweep(new.top())
        if self.weights:
            used = _used_weights(new.ops())
            used |= {part.name for n, w in graph.weights.items() if n in used for part in w.needed}
            for op in list(new.module.ops):
                if isinstance(op, WeightOp) and op.attr("sym_name") not in used:
                    erase(op)
        return new


def _sweep(ops: list[DataflowOp]) -> None:
    for op in reversed(ops):
        if not any(r.uses for r in op.results):
            erase(op)
        elif isinstance(op, RepeatOp):
            _sweep(op.ops())


def _used_weights(ops: Iterable[DataflowOp]) -> set[str]:
    used: set[str] = set()
    for op in ops:
        if isinstance(op, RepeatOp):
            for symbols in op.attr("table").values():
                used.update(symbols)
        used.update(op.weights().values())
    return used
