"""The ops that give a module its structure: weight symbols, the graph, its outputs, and repeated layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, StringAttr, SymbolRefAttr
from xdsl.ir import Attribute, Block, SSAValue
from xdsl.irdl import (
    attr_def,
    irdl_op_definition,
    opt_attr_def,
    region_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, IsTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from mapper.ir.op import BOOL, BYTES, INT, TEXT, WEIGHT, DataflowOp, Kind, TextKind
from mapper.ir.types import TensorType
from mapper.lowbit import KINDS, LAYOUTS, PARTS


class NamesKind(Kind):
    """`["a", "b"]`, a tuple of str."""

    def encode(self, value: Any) -> Attribute:
        return ArrayAttr([StringAttr(v) for v in value])

    def decode(self, attr: Any) -> tuple[str, ...]:
        return tuple(str(a.data) for a in attr.data)


class RolesKind(Kind):
    """`{inputs = {name = "role"}, outputs = {...}, kv_layout = "BHLD"}`, str or dicts of such."""

    def encode(self, value: Any) -> Attribute:
        if isinstance(value, str):
            return StringAttr(value)
        return DictionaryAttr({k: self.encode(v) for k, v in value.items()})

    def decode(self, attr: Any) -> Any:
        if isinstance(attr, StringAttr):
            return attr.data
        return {k: self.decode(v) for k, v in attr.data.items()}


class TableKind(Kind):
    """`{slot = [@a, @b]}`: slot name -> weight symbol of each iteration."""

    def encode(self, value: Mapping[str, Any]) -> Attribute:
        return DictionaryAttr({k: ArrayAttr([SymbolRefAttr(s) for s in v]) for k, v in value.items()})

    def decode(self, attr: Any) -> dict[str, tuple[str, ...]]:
        return {k: tuple(str(s.root_reference.data) for s in v.data) for k, v in attr.data.items()}


class TypeKind(Kind):
    """A tensor type."""

    def encode(self, value: TensorType) -> Attribute:
        return value

    def decode(self, attr: Any) -> TensorType:
        if not isinstance(attr, TensorType):
            raise TypeError("not a tensor type")
        return attr


def _print_rest(op: DataflowOp, printer: Printer, without: tuple[str, ...]) -> None:
    rest = {k: v for k, v in sorted(op.attributes.items()) if k not in without}
    if rest:
        printer.print_string(" ")
        printer.print_attr_dict(rest)


NAMES, ROLES, TABLE, TYPE = NamesKind(), RolesKind(), TableKind(), TypeKind()


@irdl_op_definition
class WeightOp(DataflowOp):
    """A weight symbol: `bytes` bytes at `offset` of `file` (relative to the model's folder), or `data` held
    here.

    `derived`: made by a pass (a table of rotary angles), no parameter of the model. A packed weight names
    its parts, weights themselves, and how they stand for it (see `mapper.lowbit`). A weight with a `source`
    is made from that weight (its last two axes exchanged where `turned`) when it is loaded: the `part` of its
    quantisation, or without a part a cast."""

    name = "dataflow.weight"
    sym_name = attr_def(TEXT)
    type = attr_def(TYPE)
    file = opt_attr_def(TEXT)
    offset = opt_attr_def(INT, INT.encode(0))
    bytes = opt_attr_def(INT, INT.encode(0))
    data = opt_attr_def(BYTES)
    derived = opt_attr_def(BOOL, BOOL.encode(False))
    values = opt_attr_def(WEIGHT)
    scales = opt_attr_def(WEIGHT)
    zeros = opt_attr_def(WEIGHT)
    order = opt_attr_def(WEIGHT)
    bits = opt_attr_def(INT, INT.encode(0))
    block = opt_attr_def(INT, INT.encode(0))
    axis = opt_attr_def(INT, INT.encode(-1))
    layout = opt_attr_def(TextKind(LAYOUTS), TEXT.encode("rows"))
    kind = opt_attr_def(TextKind(KINDS), TEXT.encode("int"))
    source = opt_attr_def(WEIGHT)
    part = opt_attr_def(TextKind(PARTS))
    turned = opt_attr_def(BOOL, BOOL.encode(False))
    traits = traits_def(SymbolOpInterface())

    def print(self, printer: Printer) -> None:
        """`dataflow.weight @name : type {attributes}`."""
        printer.print_string(" ")
        printer.print_symbol_name(self.attr("sym_name"))
        printer.print_string(" : ")
        printer.print_attribute(self.attr("type"))
        _print_rest(self, printer, ("sym_name", "type"))

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        """Inverse of `print`."""
        name = parser.parse_symbol_name()
        parser.parse_punctuation(":")
        kind = parser.parse_type()
        return cls.create(attributes={"sym_name": name, "type": kind, **parser.parse_optional_attr_dict()})


@irdl_op_definition
class OutputOp(DataflowOp):
    """Ends a graph: its operands are the outputs, in the order of the graph's `output_names`."""

    name = "dataflow.output"
    values = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())


@irdl_op_definition
class YieldOp(DataflowOp):
    """Ends the body of a repeat: the next carried values, then this iteration's outputs."""

    name = "dataflow.yield"
    values = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())


@irdl_op_definition
class GraphOp(DataflowOp):
    """The model: block arguments are the inputs. `roles` says what each input and output is."""

    name = "dataflow.graph"
    sym_name = attr_def(TEXT)
    input_names = attr_def(NAMES)
    output_names = attr_def(NAMES)
    roles = opt_attr_def(ROLES, ROLES.encode({}))
    body = region_def("single_block")
    traits = traits_def(SymbolOpInterface(), IsolatedFromAbove())

    def print(self, printer: Printer) -> None:
        """`dataflow.graph @name {attributes} {region}`."""
        printer.print_string(" ")
        printer.print_symbol_name(self.attr("sym_name"))
        _print_rest(self, printer, ("sym_name",))
        printer.print_string(" ")
        printer.print_region(self.body)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        """Inverse of `print`."""
        name = parser.parse_symbol_name()
        attributes = {"sym_name": name, **parser.parse_optional_attr_dict()}
        return cls.create(attributes=attributes, regions=[parser.parse_region()])

    def verify_(self) -> None:
        """Names match the block arguments and the output op."""
        block = self.body.block
        if len(self.attr("input_names")) != len(block.args):
            raise VerifyException("input_names and inputs differ in number")
        last = block.last_op
        if not isinstance(last, OutputOp):
            raise VerifyException("a graph must end with dataflow.output")
        if len(self.attr("output_names")) != len(last.operands):
            raise VerifyException("output_names and outputs differ in number")


@irdl_op_definition
class RepeatOp(DataflowOp):
    """`count` identical layers, one after the other.

    Operands: `carried` initial values, `shared` values that every iteration reads, then per iterated input
    slot its `count` values (slot by slot). Body arguments: carried, shared, one per iterated slot. The body
    yields the next carried values, then one value per iterated output. Results: final carried values, then
    per iterated output its `count` values. Weight attributes inside name slots of `table`: slot -> symbol
    of each iteration."""

    name = "dataflow.repeat"
    values = var_operand_def(TensorType)
    outs = var_result_def(TensorType)
    count = attr_def(INT)
    carried = attr_def(INT)
    shared = attr_def(INT)
    table = attr_def(TABLE)
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove())

    @property
    def block(self) -> Block:
        """The body's block."""
        return self.body.block

    def iterated_operands(self) -> list[tuple[SSAValue, ...]]:
        """Per iterated input slot its values, one per iteration."""
        count, first = self.attr("count"), self.attr("carried") + self.attr("shared")
        rest = self.operands[first:]
        return [tuple(rest[i : i + count]) for i in range(0, len(rest), count)]

    def iterated_results(self) -> list[tuple[SSAValue, ...]]:
        """Per iterated output its values, one per iteration."""
        count = self.attr("count")
        rest = self.results[self.attr("carried") :]
        return [tuple(rest[i : i + count]) for i in range(0, len(rest), count)]

    def ops(self) -> list[DataflowOp]:
        """The body's ops without the yield."""
        return [op for op in self.block.ops if isinstance(op, DataflowOp) and not isinstance(op, YieldOp)]

    def verify_(self) -> None:
        """Counts, types and the table agree."""
        count, carried, shared = self.attr("count"), self.attr("carried"), self.attr("shared")
        rest, outs = len(self.operands) - carried - shared, len(self.results) - carried
        if count < 1 or min(carried, shared, rest, outs) < 0 or rest % count or outs % count:
            raise VerifyException(f"repeat of {count}: operands or results do not divide into iterations")
        last = self.block.last_op
        if not isinstance(last, YieldOp) or len(last.operands) != carried + outs // count:
            raise VerifyException("the body of a repeat must end with a yield of carried values and outputs")
        inputs = [*self.operands[: carried + shared], *(slot[0] for slot in self.iterated_operands())]
        if [a.type for a in self.block.args] != [v.type for v in inputs]:
            raise VerifyException("the body's arguments do not have the operands' types")
        if [v.type for v in last.operands[:carried]] != [v.type for v in self.results[:carried]]:
            raise VerifyException("the yielded values do not have the results' types")
        for slot, symbols in self.attr("table").items():
            if len(symbols) != count:
                raise VerifyException(f"slot {slot} names {len(symbols)} weights for {count} iterations")
        self._verify_iterated()

    def _verify_iterated(self) -> None:
        for slot in (*self.iterated_operands(), *self.iterated_results()):
            if len({v.type for v in slot}) != 1:
                raise VerifyException("the values of one iterated slot differ in type")
