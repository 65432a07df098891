"""Type verification: every op's declared result types against inference, with weights and slots resolved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mapper.errors import ModelError
from mapper.ir.infer import Call, Scope, compatible, infer, operands_by_name
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.primitives_shape import ConstantOp
from mapper.ir.structure import RepeatOp, YieldOp
from mapper.ir.types import TensorType

if TYPE_CHECKING:
    from mapper.ir.graph import Graph


def verify_types(graph: Graph) -> None:
    """Raises ModelError naming the first op whose types do not follow from its operands and attributes."""
    for weight in graph.weights.values():
        stored = weight.bytes if weight.data is None else weight.data.nbytes
        if weight.file is not None and stored != weight.type.bytes.value:
            raise ModelError(f"weight {weight.name!r}: {stored} bytes for {weight.type}")
    _verify_ops(graph.top(), Scope({n: w.type for n, w in graph.weights.items()}))


def _verify_ops(ops: Iterable[DataflowOp], scope: Scope) -> None:
    for op in ops:
        if isinstance(op, RepeatOp):
            _verify_ops(op.ops(), Scope(slot_types(op, scope), dict(scope.known)))
        elif isinstance(op, ConstantOp):
            declared = tensor_type(op.y)
            if len(op.attr("value")) != declared.bytes.value:
                raise ModelError(f"{op.name}: {len(op.attr('value'))} bytes for {declared}")
            scope.learn(op)
        elif not isinstance(op, YieldOp):
            _verify_op(op, scope)
            scope.learn(op)


def slot_types(op: RepeatOp, scope: Scope) -> dict[str, TensorType]:
    """Types of the slots of a repeat, and of the weights that its body names directly."""
    types = dict(scope.weights)
    for slot, symbols in op.attr("table").items():
        kinds = {scope.weight(s) for s in symbols}
        if len(kinds) != 1:
            raise ModelError(f"dataflow.repeat: weights of slot {slot} differ in type")
        types[slot] = kinds.pop()
    return types


def _verify_op(op: DataflowOp, scope: Scope) -> None:
    inferred = infer(Call(type(op), operands_by_name(op), op.attrs(), scope))
    declared = [tensor_type(r) for r in op.results]
    if len(inferred) != len(declared) or not all(map(compatible, inferred, declared)):
        place = f" ({op.node})" if op.node else ""
        wanted, given = ", ".join(map(str, inferred)), ", ".join(map(str, declared))
        raise ModelError(f"{op.name}{place}: result types {given}, but operands give {wanted}")
