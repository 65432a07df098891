"""Builders: make graphs op by op, with result types inferred.

b = GraphBuilder("tiny")
ids = b.input("input_ids", TensorType.of(["batch", "sequence"], "i64"), role="token_ids")
b.weight(WeightSymbol("wte", (112, 64), "f32", file="model.bin", offset=0, bytes=28672))
x = b.add(EmbedOp, [ids], {"table": "wte"})
graph = b.finish({"hidden": x}, {"hidden": "hidden"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from xdsl.dialects.builtin import DictionaryAttr, ModuleOp, StringAttr
from xdsl.ir import Block, Region, SSAValue

from mapper.errors import ModelError
from mapper.ir.dialect import op_class
from mapper.ir.graph import Graph
from mapper.ir.infer import Call, Operand, Scope, infer, operand_fields, operands_by_name
from mapper.ir.op import DataflowOp, Field, fields, tensor_type
from mapper.ir.primitives_shape import ConstantOp
from mapper.ir.structure import GraphOp, OutputOp
from mapper.ir.types import Array, TensorType, type_of
from mapper.ir.weights import WeightSymbol, encode


class BlockBuilder:
    """Appends ops to one block. `scope` holds weight (or slot) types and known shape arithmetic."""

    def __init__(self, block: Block, scope: Scope) -> None:
        self.block = block
        self.scope = scope

    def add(
        self,
        op: str | type[DataflowOp],
        operands: Sequence[Operand] = (),
        attrs: Mapping[str, Any] | None = None,
        types: Sequence[TensorType] | None = None,
        node: str = "",
    ) -> SSAValue:
        """Appends an op with one result, and returns that. See `add_op`."""
        made = self.add_op(op, operands, attrs, types, node)
        if len(made.results) != 1:
            raise ModelError(f"{made.name} has {len(made.results)} results")
        return made.results[0]

    def add_op(
        self,
        op: str | type[DataflowOp],
        operands: Sequence[Operand] = (),
        attrs: Mapping[str, Any] | None = None,
        types: Sequence[TensorType] | None = None,
        node: str = "",
    ) -> DataflowOp:
        """Appends an op; the way to make those with several results.

        `op` is a class or mnemonic. `operands` follow the op's operand fields; an absent optional operand
        is None (or left out at the end), and a variadic field takes all values that follow. `attrs` are
        Python values; None, or a default, is not stored. `types` overrides the inferred result types.
        `node` names the node of the model file. Raises ModelError where operands or attributes do not fit.
        """
        cls = op_class(op)
        named = _named_operands(cls, operands)
        values, encoded = _attributes(cls, attrs or {})
        if types is None:
            types = infer(Call(cls, named, values, self.scope))
        grouped = [v if isinstance(v, Sequence) else [v] if v is not None else [] for v in named.values()]
        flat = [v for group in grouped for v in group]
        kinds = dict(operand_fields(cls))
        if sum(k != "one" for k in kinds.values()) > 1:
            encoded["operandSegmentSizes"] = _segments(grouped)
        if node:
            encoded["node"] = StringAttr(node)
        made = cls.create(operands=flat, result_types=list(types), attributes=encoded)
        self.append(made)
        return made

    def copy(
        self, op: DataflowOp, values: Mapping[SSAValue, SSAValue], attrs: Mapping[str, Any] | None = None
    ) -> DataflowOp:
        """Appends a copy of an op without regions: operands replaced through `values`, attributes by `attrs`,
        result types inferred anew (a constant keeps its type)."""
        attributes = dict(op.attributes)
        for name, value in (attrs or {}).items():
            attributes[name] = fields(type(op))[name].kind.encode(value)
        if isinstance(op, ConstantOp):
            types = [tensor_type(r) for r in op.results]
        else:
            named: dict[str, Operand] = {}
            for name, value in operands_by_name(op).items():
                if isinstance(value, Sequence):
                    named[name] = tuple(values[v] for v in value)
                else:
                    named[name] = None if value is None else values[value]
            types = infer(Call(type(op), named, {**op.attrs(), **(attrs or {})}, self.scope))
        made = type(op).create(
            operands=[values[v] for v in op.operands], result_types=types, attributes=attributes
        )
        self.append(made)
        return made

    def append(self, op: DataflowOp) -> None:
        """Appends a finished op."""
        self.block.add_op(op)
        self.scope.learn(op)

    def constant(
        self, array: Array | np.generic | float | Sequence[Any], dtype: str | None = None
    ) -> SSAValue:
        """A constant of the array's type (Python ints give i64, floats f32), or of element type `dtype`."""
        value = np.asarray(array)
        if dtype is not None:
            value = value.astype(TensorType.of([], dtype).numpy)
        elif value.dtype == np.float64 and not isinstance(array, np.ndarray | np.generic):
            value = value.astype(np.float32)
        return self.add(ConstantOp, [], {"value": encode(value)}, [type_of(value)])

    def load(self, symbol: str) -> SSAValue:
        """The weight as a value."""
        return self.add("load", [], {"weight": symbol})


class GraphBuilder(BlockBuilder):
    """Builds a whole graph: inputs and weights first or as they come, then ops, then `finish`."""

    def __init__(
        self, name: str = "model", path: Path | None = None, folder: Path | None = None, sha256: str = ""
    ) -> None:
        super().__init__(Block(), Scope())
        self.path = path
        self.folder = folder if folder is not None or path is None else path.parent
        self._model = {"name": name, "sha256": sha256}
        self._inputs: list[str] = []
        self._weights: dict[str, WeightSymbol] = {}
        self._input_roles: dict[str, str] = {}

    def input(self, name: str, type: TensorType, role: str = "other") -> SSAValue:
        """Adds an input of the graph."""
        if name in self._inputs:
            raise ModelError(f"two inputs called {name!r}")
        self._inputs.append(name)
        self._input_roles[name] = role
        return self.block.insert_arg(type, len(self.block.args))

    def weight(self, symbol: WeightSymbol) -> str:
        """Declares a weight and returns its name. Declaring the same one again is allowed."""
        known = self._weights.get(symbol.name)
        if known is symbol:
            return symbol.name
        if known is not None and (known.type != symbol.type or known.file != symbol.file):
            raise ModelError(f"two weights called {symbol.name!r}")
        for part in symbol.needed:
            self.weight(part)
        self._weights[symbol.name] = symbol
        self.scope.weights[symbol.name] = symbol.type
        return symbol.name

    def finish(
        self,
        outputs: Mapping[str, SSAValue],
        roles: Mapping[str, str] | None = None,
        input_roles: Mapping[str, str] | None = None,
        verify: bool = True,
        **facts: str,
    ) -> Graph:
        """The graph. `roles` are the outputs' (default "other"), `input_roles` override those given with
        `input`, `facts` are further entries of the roles (kv_layout="BHLD"). Weights that no op uses stay
        declared."""
        self.block.add_op(OutputOp.create(operands=list(outputs.values())))
        output_roles = {n: (roles or {}).get(n, "other") for n in outputs}
        all_roles = {"inputs": {**self._input_roles, **(input_roles or {})}, "outputs": output_roles, **facts}
        graph_op = GraphOp.create(regions=[Region(self.block)])
        name = "main"
        while name in self._weights:  # one module, one set of symbols
            name += "_"
        graph_op.set_attr("sym_name", name)
        graph_op.set_attr("input_names", tuple(self._inputs))
        graph_op.set_attr("output_names", tuple(outputs))
        graph_op.set_attr("roles", all_roles)
        module = ModuleOp([*(w.op() for w in self._weights.values()), graph_op])
        module.attributes["dataflow.model"] = DictionaryAttr(
            {k: StringAttr(v) for k, v in self._model.items()}
        )
        graph = Graph(module, self.path, self.folder)
        graph.know(self._weights)
        if verify:
            graph.verify()
        return graph


def _named_operands(cls: type[DataflowOp], operands: Sequence[Operand]) -> dict[str, Operand]:
    named: dict[str, Operand] = {}
    rest = list(operands)
    for name, kind in operand_fields(cls):
        if kind == "many":
            flat = [v for o in rest for v in (o if isinstance(o, Sequence) else [o]) if v is not None]
            named[name], rest = tuple(flat), []
            continue
        value = rest.pop(0) if rest else None
        if isinstance(value, Sequence) or (value is None and kind == "one"):
            raise ModelError(f"{cls.name}: operand {name} must be one value")
        named[name] = value
    if rest:
        raise ModelError(f"{cls.name}: {len(rest)} operands too many")
    return named


def _attributes(cls: type[DataflowOp], attrs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all values with defaults, encoded attributes to store)."""
    declared: Mapping[str, Field] = fields(cls)
    unknown = set(attrs) - set(declared)
    if unknown:
        raise ModelError(f"{cls.name} has no attribute {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    encoded: dict[str, Any] = {}
    for name, field in declared.items():
        value = attrs.get(name)
        if value is None and field.required:
            raise ModelError(f"{cls.name}: attribute {name} is missing")
        if value is None or field.is_default(value):
            values[name] = field.default
            continue
        encoded[name] = field.kind.encode(value)
        values[name] = field.kind.decode(encoded[name])
    return values, encoded


def _segments(grouped: Sequence[Sequence[SSAValue]]) -> Any:
    from xdsl.dialects.builtin import DenseArrayBase, i32

    return DenseArrayBase.from_list(i32, [len(g) for g in grouped])
