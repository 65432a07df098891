"""Common subexpression elimination: equal ops on equal operands become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xdsl.ir import SSAValue

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.structure import RepeatOp
from mapper.passes.rewrite import erase


@dataclass(frozen=True)
class Cse:
    """Merges ops that are equal but for the node they stem from. Every op is a pure function, so this is
    exact."""

    name = "cse"

    def apply(self, graph: Graph) -> Graph:
        """The graph with each expression once per block."""
        new = graph.clone()
        _merge(new.top())
        return new


def _merge(ops: list[DataflowOp]) -> None:
    seen: dict[Any, DataflowOp] = {}
    for op in ops:
        if isinstance(op, RepeatOp):
            _merge(op.ops())
            continue
        first = seen.setdefault(_key(op), op)
        if first is not op:
            for old, new in zip(op.results, first.results, strict=True):
                old.replace_all_uses_with(new)
            erase(op)


def _key(op: DataflowOp) -> Any:
    operands: tuple[SSAValue, ...] = tuple(op.operands)
    attributes = frozenset((k, v) for k, v in op.attributes.items() if k != "node")
    return op.name, operands, attributes, tuple(r.type for r in op.results)
