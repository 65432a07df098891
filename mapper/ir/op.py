"""The base class of all `dataflow` operations: attributes as Python values, one uniform text form.

Text form of every op: `%y = dataflow.NAME %a, %b {attributes} : (operand types) -> (result types) {regions}`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

from xdsl.dialects.builtin import (
    ArrayAttr,
    DenseArrayBase,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    f64,
    i1,
    i64,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    AttrConstraint,
    IRDLOperation,
    OptionalDef,
    VerificationContext,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from mapper.errors import ModelError
from mapper.ir.dims import Dim
from mapper.ir.types import BITS, BytesAttr, DimsAttr, TensorType


class Kind(AttrConstraint[Attribute]):
    """An attribute's kind: constrains the IR attribute, and converts it from and to a Python value."""

    @abstractmethod
    def encode(self, value: Any) -> Attribute:
        """The attribute of a Python value."""

    @abstractmethod
    def decode(self, attr: Any) -> Any:
        """The Python value of an attribute."""

    def verify(self, attr: Attribute, constraint_context: VerificationContext) -> None:
        """Checks that the attribute is of this kind."""
        del constraint_context  # a kind has no variables
        try:
            same = self.encode(self.decode(attr)) == attr
        except (AttributeError, TypeError, ValueError, ModelError):
            same = False
        if not same:
            raise VerifyException(f"{attr} is not of kind {type(self).__name__}")

    def mapping_type_vars(self, type_var_mapping: Mapping[Any, Any]) -> Self:
        """No type variables inside."""
        del type_var_mapping
        return self


@dataclass(frozen=True)
class IntKind(Kind):
    """`3 : i64`, an int."""

    def encode(self, value: int) -> Attribute:
        return IntegerAttr(int(value), i64)

    def decode(self, attr: Any) -> int:
        return int(attr.value.data)


@dataclass(frozen=True)
class BoolKind(Kind):
    """`true`, a bool."""

    def encode(self, value: bool) -> Attribute:
        return IntegerAttr(int(bool(value)), i1)

    def decode(self, attr: Any) -> bool:
        return bool(attr.value.data)


@dataclass(frozen=True)
class FloatKind(Kind):
    """`1.5 : f64`, a float."""

    def encode(self, value: float) -> Attribute:
        return FloatAttr(float(value), f64)

    def decode(self, attr: Any) -> float:
        return float(attr.value.data)


@dataclass(frozen=True)
class FloatsKind(Kind):
    """`[1.5 : f64, ...]`, a tuple of floats."""

    def encode(self, value: Sequence[float]) -> Attribute:
        return ArrayAttr([FloatAttr(float(v), f64) for v in value])

    def decode(self, attr: Any) -> tuple[float, ...]:
        return tuple(float(a.value.data) for a in attr.data)


@dataclass(frozen=True)
class TextKind(Kind):
    """`"text"`, a str; one of `choices` where that is not empty."""

    choices: tuple[str, ...] = ()

    def encode(self, value: str) -> Attribute:
        if self.choices and value not in self.choices:
            raise ModelError(f"{value!r} is none of {', '.join(self.choices)}")
        return StringAttr(value)

    def decode(self, attr: Any) -> str:
        return str(attr.data)


@dataclass(frozen=True)
class IntsKind(Kind):
    """`array<i64: 1, 2>`, a tuple of ints."""

    def encode(self, value: Sequence[int]) -> Attribute:
        return DenseArrayBase.from_list(i64, [int(v) for v in value])

    def decode(self, attr: Any) -> tuple[int, ...]:
        return tuple(int(v) for v in attr.get_values())


@dataclass(frozen=True)
class DimsKind(Kind):
    """`#dataflow.dims<[2 x batch]>`, a tuple of Dim (ints and texts are converted)."""

    def encode(self, value: Sequence[int | str | Dim]) -> Attribute:
        return DimsAttr(tuple(Dim.of(v) for v in value))

    def decode(self, attr: Any) -> tuple[Dim, ...]:
        if not isinstance(attr, DimsAttr):
            raise TypeError("not dims")
        return attr.data


@dataclass(frozen=True)
class WeightKind(Kind):
    """`@name`, the name of a weight symbol (or, inside a repeat, of a slot) as a str."""

    def encode(self, value: str) -> Attribute:
        return SymbolRefAttr(value)

    def decode(self, attr: Any) -> str:
        return str(attr.root_reference.data)


@dataclass(frozen=True)
class BytesKind(Kind):
    """`#dataflow.bytes<"00ff">`, raw bytes."""

    def encode(self, value: bytes) -> Attribute:
        return BytesAttr(bytes(value))

    def decode(self, attr: Any) -> bytes:
        if not isinstance(attr, BytesAttr):
            raise TypeError("not bytes")
        return attr.data


INT, BOOL, FLOAT, FLOATS, TEXT = IntKind(), BoolKind(), FloatKind(), FloatsKind(), TextKind()
INTS, DIMS, WEIGHT, BYTES = IntsKind(), DimsKind(), WeightKind(), BytesKind()
DTYPE = TextKind(tuple(BITS))


@dataclass(frozen=True)
class Field:
    """One declared attribute of an op: its kind, and the Python value that absence means (None: none)."""

    kind: Kind
    required: bool
    default: Any

    def is_default(self, value: Any) -> bool:
        """Whether leaving the attribute out means `value` (0.0 and -0.0 are different values)."""
        if self.required or value != self.default:
            return False
        return not isinstance(value, float) or math.copysign(1, value) == math.copysign(1, self.default)


@cache
def fields(cls: type[DataflowOp]) -> Mapping[str, Field]:
    """The declared attributes of an op class by name."""
    found: dict[str, Field] = {}
    for name, definition in cls.get_irdl_definition().attributes.items():
        if isinstance(definition.constr, Kind):
            default = definition.default_value
            value = None if default is None else definition.constr.decode(default)
            found[name] = Field(definition.constr, not isinstance(definition, OptionalDef), value)
    return found


class DataflowOp(IRDLOperation):
    """Base of all dataflow ops. Operands and results are tensors; attributes are read with `attr`."""

    ELEMENTWISE: ClassVar[bool] = False

    @property
    def mnemonic(self) -> str:
        """The op's name without the dialect: "add", "linear"."""
        return self.name.removeprefix("dataflow.")

    @property
    def node(self) -> str:
        """Name of the node of the model file that this op stems from, or "" where unknown."""
        attr = self.attributes.get("node")
        return attr.data if isinstance(attr, StringAttr) else ""

    def attr(self, name: str) -> Any:
        """The attribute as a Python value: int, bool, float, str, tuple, bytes; the default where absent.

        Weight attributes give the symbol's name. Raises ModelError for a name that this op does not declare.
        """
        field = fields(type(self)).get(name)
        if field is None:
            raise ModelError(f"{self.name} has no attribute {name!r}")
        attr = self.attributes.get(name)
        return field.default if attr is None else field.kind.decode(attr)

    def attrs(self) -> dict[str, Any]:
        """All declared attributes as Python values, defaults included (None: absent without default)."""
        return {name: self.attr(name) for name in fields(type(self))}

    def set_attr(self, name: str, value: Any) -> None:
        """Sets a declared attribute from a Python value; None, or the default, removes it."""
        field = fields(type(self)).get(name)
        if field is None:
            raise ModelError(f"{self.name} has no attribute {name!r}")
        if value is None or field.is_default(value):
            self.attributes.pop(name, None)
        else:
            self.attributes[name] = field.kind.encode(value)

    def weights(self) -> dict[str, str]:
        """Attribute name -> symbol (or slot), of every weight attribute that is present."""
        found = {
            name: self.attr(name) for name, f in fields(type(self)).items() if isinstance(f.kind, WeightKind)
        }
        return {name: symbol for name, symbol in found.items() if symbol is not None}

    def operand(self, name: str) -> SSAValue | None:
        """The operand of that field name, None where an optional one is absent."""
        value = getattr(self, name)
        return value if isinstance(value, SSAValue) else None

    def operand_shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of operand number `index` (absent ones not counted). Raises ModelError where symbolic."""
        return tensor_type(self.operands[index]).ints

    def result_shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of result number `index`. Raises ModelError where symbolic."""
        return tensor_type(self.results[index]).ints

    def producers(self) -> list[DataflowOp | None]:
        """Per operand the op that makes it, None for an input of the graph or region."""
        owners = [v.owner for v in self.operands]
        return [o if isinstance(o, DataflowOp) else None for o in owners]

    def consumers(self, index: int = 0) -> list[DataflowOp]:
        """The ops that read result number `index`, in program order of use."""
        users = [use.operation for use in self.results[index].uses]
        return [u for u in users if isinstance(u, DataflowOp)]

    def print(self, printer: Printer) -> None:
        """The uniform text form."""
        if self.operands:
            printer.print_string(" ")
            printer.print_list(self.operands, printer.print_ssa_value)
        if self.attributes:
            printer.print_string(" ")
            printer.print_attr_dict(dict(sorted(self.attributes.items())))
        printer.print_string(" : ")
        printer.print_operation_type(self)
        for region in self.regions:
            printer.print_string(" ")
            printer.print_region(region)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        """Inverse of `print`."""
        position = parser.pos
        unresolved = parser.parse_optional_undelimited_comma_separated_list(
            parser.parse_optional_unresolved_operand, parser.parse_unresolved_operand
        )
        attributes = parser.parse_optional_attr_dict()
        parser.parse_punctuation(":")
        signature = parser.parse_function_type()
        operands = parser.resolve_operands(unresolved or [], signature.inputs.data, position)
        regions = [parser.parse_region() for _ in cls.get_irdl_definition().regions]
        return cls.create(
            operands=operands,
            result_types=signature.outputs.data,
            attributes=attributes,
            regions=regions,
        )


def tensor_type(value: SSAValue) -> TensorType:
    """The tensor type of a value. Raises ModelError where it has none."""
    if not isinstance(value.type, TensorType):
        raise ModelError(f"value of type {value.type} where a tensor is needed")
    return value.type


def parent_op(op: Operation, cls: type[Operation]) -> Operation | None:
    """The nearest op of class `cls` that encloses `op`."""
    parent = op.parent_op()
    while parent is not None and not isinstance(parent, cls):
        parent = parent.parent_op()
    return parent
