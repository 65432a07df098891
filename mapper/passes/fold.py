"""Constant folding: ops on constants through the reference semantics, shape arithmetic through symbolic
values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from mapper.errors import ModelError, WeightsMissingError
from mapper.ir.builder import BlockBuilder
from mapper.ir.dims import Dim
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, DimsKind, fields, tensor_type
from mapper.ir.primitives_shape import ConstantOp
from mapper.ir.reference import evaluate_op
from mapper.ir.types import Array
from mapper.ir.weights import decode
from mapper.passes.rewrite import Values, erase, rewrite

_SHAPE_OPERANDS = {
    "reshape": (("shape", "dims"),),
    "expand": (("shape", "dims"),),
    "fill": (("shape", "dims"),),
    "tile": (("times", "repeats"),),
    "slice": (("begin", "starts"), ("end", "ends")),
}
"""Ops that take a shape as an operand or as an attribute: (operand, attribute) pairs."""

_VIEWS = ("reshape", "expand", "transpose", "cast", "slice", "tile", "squeeze", "unsqueeze", "concat")


@dataclass(frozen=True)
class Fold:
    """Replaces ops on constants by their value, as long as that has at most `largest` bytes; shape operands
    that are known (also symbolically) by attributes; and views that change nothing by their operand."""

    largest: int = 65536
    name = "fold"

    def apply(self, graph: Graph) -> Graph:
        """The folded graph. What was folded away stays as dead code; run `dce` after."""
        return rewrite(graph, Folder(self.largest).visit)


@dataclass
class Folder:
    """The visitor: remembers the arrays of the constants it has seen. `symbols` are replaced by numbers."""

    largest: int = 65536
    symbols: Mapping[str, int] = field(default_factory=dict)
    arrays: dict[SSAValue, Array] = field(default_factory=dict)

    def visit(self, new: BlockBuilder, op: DataflowOp, values: Values) -> Sequence[SSAValue] | None:
        """The folded results of an op, None where it stays."""
        if isinstance(op, ConstantOp) or op.mnemonic == "load":
            return None
        known = self.constant_results(new, op, values)
        if known is not None:
            return known
        shaped = self.with_attributes(new, op, values)
        if shaped is not None:
            return shaped
        made = new.copy(op, values, self.substituted(op))
        return _unless_view(new, made)

    def substituted(self, op: DataflowOp) -> dict[str, Any]:
        """The attributes of an op that name symbols, with those replaced."""
        if not self.symbols:
            return {}
        found: dict[str, Any] = {}
        for name, declared in fields(type(op)).items():
            dims = op.attr(name) if isinstance(declared.kind, DimsKind) else None
            if dims is not None and not all(d.is_const for d in dims):
                found[name] = tuple(d.substitute(self.symbols) for d in dims)
        return found

    def constant_results(
        self, new: BlockBuilder, op: DataflowOp, values: Values
    ) -> Sequence[SSAValue] | None:
        """Constants for the results where all operands are constants, or shape arithmetic gives numbers."""
        operands = [self.array(values[v]) for v in op.operands]
        arrays = [a for a in operands if a is not None]
        if len(arrays) == len(operands) and op.operands and not op.weights():
            try:
                results = evaluate_op(op, arrays, _no_weights, self.symbols)
            except ModelError:
                return None  # a symbolic attribute: nothing to fold yet
            if all(r.nbytes <= self.largest for r in results):
                return [new.constant(np.asarray(r)) for r in results]
            return None
        if op.mnemonic != "shape_of" and not all(values[v] in new.scope.known for v in op.operands):
            return None
        if not op.operands or len(op.results) != 1 or tensor_type(op.results[0]).dtype == "bool":
            return None
        made = new.copy(op, values, self.substituted(op))
        found = new.scope.known.get(made.results[0])
        if found is not None and all(d.is_const for d in found.flatten()):
            array = np.array([d.value for d in found.flatten()]).astype(tensor_type(made.results[0]).numpy)
            return [new.constant(array.reshape(found.shape))]
        return made.results

    def with_attributes(self, new: BlockBuilder, op: DataflowOp, values: Values) -> Sequence[SSAValue] | None:
        """The op with its shape operands as attributes, where all of them are known dimensions."""
        pairs = [(o, a) for o, a in _SHAPE_OPERANDS.get(op.mnemonic, ()) if op.operand(o) is not None]
        given = [op.operand(o) for o, _ in pairs]
        dims = [_dims(new, values[v]) for v in given if v is not None]
        if not pairs or any(d is None for d in dims):
            return None
        attrs = {
            **op.attrs(),
            **self.substituted(op),
            **{a: d for (_, a), d in zip(pairs, dims, strict=True)},
        }
        kept = [values[v] for v in op.operands if v not in given]
        if op.mnemonic == "reshape":
            attrs["allowzero"] = None
            attrs["dims"] = _complete(new, op, values)
        made = new.add_op(type(op), kept, attrs, node=op.node)
        return _unless_view(new, made)

    def array(self, value: SSAValue) -> Array | None:
        """The array of a constant, None for any other value."""
        owner = value.owner
        if not isinstance(owner, ConstantOp):
            return None
        if value not in self.arrays:
            kind = tensor_type(value)
            self.arrays[value] = decode(np.frombuffer(owner.attr("value"), np.uint8), kind.ints, kind.dtype)
        return self.arrays[value]


def _complete(new: BlockBuilder, op: DataflowOp, values: Values) -> tuple[Dim, ...]:
    """The target of a reshape with 0 and -1 resolved, as inference resolves them."""
    made = new.copy(op, values)
    shape = tensor_type(made.results[0]).shape
    erase(made)
    return shape


def _dims(new: BlockBuilder, value: SSAValue) -> list[Dim] | None:
    found = new.scope.known.get(value)
    dims: list[Dim] = [] if found is None else list(found.flatten())
    unknown = found is None or any(s.startswith("?") for d in dims for s in d.symbols)
    return None if unknown else dims


def _unless_view(new: BlockBuilder, made: DataflowOp) -> Sequence[SSAValue]:
    """The op's results, or its operand where it is a view that changes nothing (the op is then removed)."""
    if made.mnemonic not in _VIEWS or len(made.operands) != 1:
        return made.results
    before = made.operands[0].owner
    if made.mnemonic == "reshape" and isinstance(before, DataflowOp) and before.mnemonic == "reshape":
        made.operands[0] = before.operands[0]  # the elements' order is the same through any chain of reshapes
    source, result = made.operands[0], made.results[0]
    perm = made.attr("perm") if made.mnemonic == "transpose" else ()
    steps = made.attr("steps") if made.mnemonic == "slice" else ()
    shape = tensor_type(result).shape
    unknown = any(s.startswith("?") for d in shape for s in d.symbols)
    if (
        source.type != result.type
        or unknown
        or list(perm) != sorted(perm)
        or any(s != 1 for s in steps or ())
    ):
        return made.results
    new.scope.known.pop(result, None)
    erase(made)
    return [source]


def _no_weights(symbol: str) -> Array:
    raise WeightsMissingError(f"weight {symbol!r} in a constant expression")
