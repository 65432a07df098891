"""Giving token-wise ops one shape: [batch, seq, width] in place of [batch * seq, width]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.ir import SSAValue

from mapper.ir.builder import BlockBuilder
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.types import TensorType
from mapper.passes.dce import Dce
from mapper.passes.fold import Fold
from mapper.passes.rewrite import Values, rewrite

_TOKENWISE = ("linear", "lm_head", "norm", "mlp", "gated_mlp", "packed_mlp", "activation")


@dataclass(frozen=True)
class Unflatten:
    """Exporters flatten tokens before some matrix products. Lifts every token-wise op on [batch * seq, width]
    to [batch, seq, width], reshaping around it; chains of reshapes then fold away. For static graphs."""

    batch: int = 1
    seq: int = 1
    name = "unflatten"

    def apply(self, graph: Graph) -> Graph:
        """The graph with lifted ops; itself where there is none."""
        if not any(self._lifts(op) for op in graph.ops()):
            return graph
        return Dce(weights=False).apply(Fold().apply(rewrite(graph, self._visit)))

    def _lifts(self, op: DataflowOp) -> bool:
        tokenwise = op.mnemonic in _TOKENWISE or op.ELEMENTWISE
        if not tokenwise or len(op.results) != 1 or not op.operands:
            return False
        first = tensor_type(op.operands[0])
        flat = [self._is_flat(tensor_type(v)) for v in op.operands]
        others = [tensor_type(v).rank <= 1 for v in op.operands]
        return self._is_flat(first) and all(a or b for a, b in zip(flat, others, strict=True))

    def _is_flat(self, kind: TensorType) -> bool:
        return kind.rank == 2 and kind.is_static and kind.ints[0] == self.batch * self.seq

    def _visit(self, new: BlockBuilder, op: DataflowOp, values: Values) -> Sequence[SSAValue] | None:
        if not self._lifts(op):
            return None
        local: Values = {}
        for value in op.operands:
            kind = tensor_type(value)
            local[value] = values[value]
            if self._is_flat(kind):
                dims = (self.batch, self.seq, kind.shape[1])
                local[value] = new.add("reshape", [values[value]], {"dims": dims})
        lifted = new.copy(op, local).results[0]
        return [new.add("reshape", [lifted], {"dims": tensor_type(op.results[0]).shape})]
