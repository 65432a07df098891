"""Shape inference: the result types of an op from its operands, attributes and what is known of shape
arithmetic.

`Scope` carries what one graph knows: the types of weight symbols, and the symbolic values of small integer
tensors (so that `reshape(x, concat(shape_of(ids), [-1]))` gets its dimensions). A dimension that only the
data can tell becomes a fresh symbol `?N`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from xdsl.ir import SSAValue
from xdsl.irdl import OperandDef, OptOperandDef, VarOperandDef

from mapper.errors import ModelError
from mapper.ir.dims import Dim
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.symbolic import SymbolicArray, symbolic_value
from mapper.ir.types import TensorType

Operand = SSAValue | Sequence[SSAValue] | None
Rule = Callable[["Call"], Sequence[TensorType]]
REGISTERED: dict[type[DataflowOp], Rule] = {}
_R = TypeVar("_R", bound=Rule)


def rule(*classes: type[DataflowOp]) -> Callable[[_R], _R]:
    """Registers the inference rule of some op classes (and of classes derived from them)."""

    def register(function: _R) -> _R:
        for cls in classes:
            REGISTERED[cls] = function
        return function

    return register


@dataclass
class Scope:
    """What is known while types are inferred: weight types by symbol, symbolic values, and fresh symbols."""

    weights: dict[str, TensorType] = field(default_factory=dict)
    known: dict[SSAValue, SymbolicArray] = field(default_factory=dict)
    _fresh: int = 0

    def fresh(self) -> Dim:
        """A dimension that nothing is known of."""
        self._fresh += 1
        return Dim.symbol(f"?{self._fresh - 1}")

    def weight(self, symbol: str) -> TensorType:
        """The type of a weight symbol. Raises ModelError where there is none of that name."""
        if symbol not in self.weights:
            raise ModelError(f"no weight is called {symbol!r}")
        return self.weights[symbol]

    def learn(self, op: DataflowOp) -> None:
        """Records the symbolic value of an op's result, where it is shape arithmetic."""
        value = symbolic_value(op, self.known)
        if value is not None:
            self.known[op.results[0]] = value


@dataclass(frozen=True)
class Call:
    """One op about to be typed: its class, its operands by field name, its attributes as Python values."""

    cls: type[DataflowOp]
    operands: Mapping[str, Operand]
    attrs: Mapping[str, Any]
    scope: Scope

    def has(self, name: str) -> bool:
        """Whether the operand is there."""
        return isinstance(self.operands.get(name), SSAValue)

    def type(self, name: str) -> TensorType:
        """The type of an operand. Raises ModelError where it is absent."""
        value = self.operands.get(name)
        if not isinstance(value, SSAValue):
            raise self.error(f"operand {name} is missing")
        return tensor_type(value)

    def types(self, name: str) -> list[TensorType]:
        """The types of a variadic operand."""
        value = self.operands.get(name)
        return [tensor_type(v) for v in value] if isinstance(value, Sequence) else []

    def dims(self, name: str) -> list[Dim] | None:
        """The known elements of an integer operand, None where they are data. Raises where it is absent."""
        value = self.operands.get(name)
        if not isinstance(value, SSAValue):
            raise self.error(f"operand {name} is missing")
        found = self.scope.known.get(value)
        return None if found is None else list(found.flatten())

    def weight(self, name: str) -> TensorType:
        """The type of the weight that attribute `name` points to."""
        return self.scope.weight(self.attrs[name])

    def axis(self, value: int, rank: int) -> int:
        """A normalised axis. Raises ModelError where it is outside [-rank, rank)."""
        if not -rank <= value < rank:
            raise self.error(f"axis {value} of a tensor of rank {rank}")
        return value % rank

    def need(self, condition: bool, why: str) -> None:
        """Raises ModelError with the op's name where `condition` does not hold."""
        if not condition:
            raise self.error(why)

    def error(self, why: str) -> ModelError:
        """A ModelError that names the op."""
        return ModelError(f"{self.cls.name}: {why}")


def broadcast(call: Call, *shapes: Iterable[Dim]) -> tuple[Dim, ...]:
    """NumPy broadcasting of shapes. Two different symbols give their maximum (one of them must then be 1)."""
    lists = [list(s) for s in shapes]
    rank = max(len(s) for s in lists)
    result: list[Dim] = []
    for column in zip(*[[Dim.of(1)] * (rank - len(s)) + s for s in lists], strict=True):
        best = column[0]
        for dim in column[1:]:
            best = _join(call, best, dim)
        result.append(best)
    return tuple(result)


def _join(call: Call, a: Dim, b: Dim) -> Dim:
    if a == b or (b.is_const and b.value == 1):
        return a
    if a.is_const and a.value == 1:
        return b
    if a.is_const and b.is_const:
        raise call.error(f"shapes do not broadcast: {a} against {b}")
    if a.is_const or b.is_const:
        return a if a.is_const else b
    return Dim.max(a, b)


def operand_fields(cls: type[DataflowOp]) -> list[tuple[str, str]]:
    """(field name, "one" | "optional" | "many") of an op class's operands, in order."""
    kinds: dict[type, str] = {OperandDef: "one", OptOperandDef: "optional", VarOperandDef: "many"}
    return [(name, kinds[type(d)]) for name, d in cls.get_irdl_definition().operands]


def operands_by_name(op: DataflowOp) -> dict[str, Operand]:
    """Field name -> operand of an existing op: a value, None where absent, a tuple for a variadic field."""
    found: dict[str, Operand] = {}
    for name, kind in operand_fields(type(op)):
        value = getattr(op, name)
        found[name] = tuple(value) if kind == "many" else value
    return found


def infer(call: Call) -> list[TensorType]:
    """The result types of an op. Raises ModelError where operands do not fit together."""
    from mapper.ir.infer_rules import RULES

    for cls in call.cls.__mro__:
        if cls in RULES:
            return list(RULES[cls](call))
    raise call.error("its result types cannot be inferred; give them")


def compatible(inferred: TensorType, declared: TensorType) -> bool:
    """Whether a declared type can stand for an inferred one: same dtype and rank, equal where both are
    numbers."""
    if inferred.dtype != declared.dtype or inferred.rank != declared.rank:
        return False
    pairs = zip(inferred.shape, declared.shape, strict=True)
    return all(a == b or not (a.is_const and b.is_const) for a, b in pairs)
