"""The ops table of a schedule: every IR op with its place, operands, shape, operations and weight bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xdsl.ir import SSAValue

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper_host.work import flops_of, weight_bytes_of

if TYPE_CHECKING:
    from mapper_host.context import Context

_SILENT = ("constant", "load")
"""Ops that are data: they have no row."""


@dataclass(eq=False)
class OpList:
    """Rows of the ops table of one program, numbered from `first`."""

    graph: Graph
    phase: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    makers: dict[SSAValue, int] = field(default_factory=dict)
    first: int = 0
    _mark: int = 0

    def add(self, op: DataflowOp, c: Context, repeat: int) -> int:
        """A row for an op (its number), or -1 for one that is data."""
        if op.mnemonic in _SILENT:
            return -1
        number = len(self.rows)
        kind = tensor_type(op.results[0])
        self.rows.append(
            {
                "program": self.phase,
                "kind": op.mnemonic,
                "name": f"{c.place}{op.mnemonic}.{number}",
                "repetition": 0,
                "repeat": repeat,
                "operands": [self.makers.get(v, -1) for v in op.operands],
                "shape": list(kind.ints) if kind.is_static else [],
                "flops": flops_of(self.graph, op),
                "weight_bytes": weight_bytes_of(self.graph, op),
            }
        )
        self.makers.update(dict.fromkeys(op.results, number))
        return number

    def same(self, new: SSAValue, old: SSAValue) -> None:
        """`new` is made by the op that makes `old`."""
        if old in self.makers:
            self.makers[new] = self.makers[old]

    def mark(self) -> None:
        """Remember how many rows there are."""
        self._mark = len(self.rows)

    def reset(self) -> None:
        """Drop the rows since `mark`."""
        del self.rows[self._mark :]
        self.makers = {v: n for v, n in self.makers.items() if n < self._mark}
