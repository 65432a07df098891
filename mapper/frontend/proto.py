"""ONNX messages as plain Python records, decoded from the wire without reading tensor data.

Field numbers: onnx.proto of the public ONNX repository (IR version 13). A tensor's data is a span of the file
or an external reference; strings and small attributes are decoded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from mapper.errors import ModelError
from mapper.frontend.wire import FIXED32, SPAN, Source, chunk, fields, packed_varints, signed, text

MAX_DEPTH = 16  # of sub-graphs inside sub-graphs
MAX_SHAPE_DIMS = 64
MAX_STRING = 1 << 20
MESSAGE_COST = 5  # a record costs about as much as this many fields

Span = tuple[int, int]


@dataclass
class TensorRecord:
    """A TensorProto: `raw` is the span of raw_data; `typed` the spans of typed elements."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    dtype: int = 0
    raw: Span | None = None
    typed: list[tuple[int, int, int, int]] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


@dataclass
class ValueRecord:
    """A tensor's ValueInfoProto: `dims` holds ints, names or None; None where there is no shape."""

    name: str = ""
    dtype: int = 0
    dims: list[int | str | None] | None = None


@dataclass
class AttributeRecord:
    """An AttributeProto: `value` is an int, float, bytes, TensorRecord, GraphRecord or a list of those."""

    name: str = ""
    value: Attribute = None
    refers: str = ""


@dataclass
class NodeRecord:
    """A NodeProto. `attributes` by name; inputs that are absent are empty strings."""

    op: str = ""
    domain: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, AttributeRecord] = field(default_factory=dict)
    overload: str = ""


@dataclass
class GraphRecord:
    """A GraphProto; its value_info, which only repeats what shapes follow from, is skipped."""

    name: str = ""
    nodes: list[NodeRecord] = field(default_factory=list)
    inputs: list[ValueRecord] = field(default_factory=list)
    outputs: list[ValueRecord] = field(default_factory=list)
    tensors: list[TensorRecord] = field(default_factory=list)
    sparse: bool = False


@dataclass
class FunctionRecord:
    """A FunctionProto, by (domain, name, overload)."""

    domain: str = ""
    name: str = ""
    overload: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[NodeRecord] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)
    defaults: dict[str, AttributeRecord] = field(default_factory=dict)


@dataclass
class ModelRecord:
    """A ModelProto."""

    graph: GraphRecord
    opsets: dict[str, int]
    functions: dict[tuple[str, str, str], FunctionRecord]
    ir_version: int


Attribute = int | float | bytes | TensorRecord | GraphRecord | list["Attribute"] | None


def decode_model(source: Source, size: int) -> ModelRecord:
    """The model in bytes 0..size. Raises ModelError where the bytes are no ONNX model."""
    graph: GraphRecord | None = None
    opsets: dict[str, int] = {}
    functions: dict[tuple[str, str, str], FunctionRecord] = {}
    ir_version = 0
    for number, kind, a, b in fields(source, 0, size):
        if number == 1 and kind == 0:
            ir_version = a
        elif number == 7 and kind == SPAN:
            if graph is not None:
                raise ModelError("the file holds two graphs")
            graph = _graph(source, a, b, 0)
        elif number == 8 and kind == SPAN:
            _opset(source, a, b, opsets)
        elif number == 25 and kind == SPAN:
            function = _function(source, a, b)
            functions[function.domain, function.name, function.overload] = function
    if graph is None:
        raise ModelError("the file is no ONNX model: it holds no graph")
    return ModelRecord(graph, opsets, functions, ir_version)


def _opset(source: Source, start: int, end: int, into: dict[str, int]) -> None:
    domain, version = "", 0
    for number, kind, a, b in fields(source, start, end):
        if number == 1 and kind == SPAN:
            domain = _domain(text(source, a, b))
        elif number == 2:
            version = signed(a)
    into[domain] = version


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _graph(source: Source, start: int, end: int, depth: int) -> GraphRecord:
    if depth > MAX_DEPTH:
        raise ModelError(f"sub-graphs are nested deeper than {MAX_DEPTH}")
    graph = GraphRecord()
    for number, kind, a, b in fields(source, start, end):
        if kind != SPAN:
            continue
        source.spend(MESSAGE_COST)
        if number == 1:
            graph.nodes.append(_node(source, a, b, depth))
        elif number == 2:
            graph.name = text(source, a, b)
        elif number == 5:
            graph.tensors.append(_tensor(source, a, b))
        elif number == 11:
            graph.inputs.append(_value(source, a, b))
        elif number == 12:
            graph.outputs.append(_value(source, a, b))
        elif number == 15:
            graph.sparse = True
    return graph


def _node(source: Source, start: int, end: int, depth: int) -> NodeRecord:
    node = NodeRecord()
    for number, kind, a, b in fields(source, start, end):
        if kind != SPAN:
            continue
        if number == 1:
            node.inputs.append(text(source, a, b))
        elif number == 2:
            node.outputs.append(text(source, a, b))
        elif number == 3:
            node.name = text(source, a, b)
        elif number == 4:
            node.op = text(source, a, b)
        elif number == 5:
            attribute = _attribute(source, a, b, depth)
            if attribute.name in node.attributes:
                raise ModelError(f"node {node.name!r} has two attributes {attribute.name!r}")
            node.attributes[attribute.name] = attribute
        elif number == 7:
            node.domain = _domain(text(source, a, b))
        elif number == 8:
            node.overload = text(source, a, b)
    return node


_ZEROS: dict[int, Attribute] = {1: 0.0, 2: 0, 3: b""}


def _attribute(source: Source, start: int, end: int, depth: int) -> AttributeRecord:
    out = AttributeRecord()
    single: dict[int, Attribute] = {}
    many: dict[int, list[Attribute]] = {7: [], 8: [], 9: [], 10: [], 11: []}
    kind_code = 0
    for number, kind, a, b in fields(source, start, end):
        if number == 1 and kind == SPAN:
            out.name = text(source, a, b)
        elif number == 20:
            kind_code = a
        elif number == 21 and kind == SPAN:
            out.refers = text(source, a, b)
        elif number in (2, 3, 4, 5, 6):
            single[number] = _attribute_value(source, number, kind, a, b, depth)
        elif number in many:
            _extend(source, many[number], number, kind, a, b, depth)
    if kind_code in (0, 1, 2, 3, 4, 5):  # old files carry no type
        found = single.get(kind_code + 1) if kind_code else next(iter(single.values()), None)
        if found is None and not out.refers:
            listed = next((v for v in many.values() if v), None) if not kind_code else None
            found = listed if listed is not None else _ZEROS.get(kind_code)
        out.value = found
    elif 6 <= kind_code <= 10:
        out.value = many[kind_code + 1]
    return out


def _attribute_value(source: Source, number: int, kind: int, a: int, b: int, depth: int) -> Attribute:
    if number == 2 and kind == FIXED32:
        return float(struct.unpack("<f", source.data[a:b])[0])
    if number == 3 and kind == 0:
        return signed(a)
    if kind != SPAN:
        raise ModelError(f"malformed protobuf: attribute field {number} has wire type {kind}")
    if number == 4:
        return chunk(source, a, b, MAX_STRING)
    return _tensor(source, a, b) if number == 5 else _graph(source, a, b, depth + 1)


def _extend(
    source: Source, into: list[Attribute], number: int, kind: int, a: int, b: int, depth: int
) -> None:
    if number == 7 and kind in (SPAN, FIXED32):
        source.spend((b - a) // 4)
        into.extend(struct.unpack(f"<{(b - a) // 4}f", source.data[a : b - (b - a) % 4]))
    elif number == 8:
        into.extend(_integers(source, kind, a, b))
    elif kind != SPAN:
        raise ModelError(f"malformed protobuf: attribute field {number} has wire type {kind}")
    elif number == 9:
        into.append(chunk(source, a, b, MAX_STRING))
    else:
        into.append(_tensor(source, a, b) if number == 10 else _graph(source, a, b, depth + 1))


def _integers(source: Source, kind: int, a: int, b: int) -> list[int]:
    """The integers of a repeated field, packed or not."""
    if kind != SPAN:
        return [signed(a)]
    source.spend(b - a)
    numbers: list[int] = packed_varints(bytes(source.data[a:b])).view("i8").tolist()
    return numbers


def _tensor(source: Source, start: int, end: int) -> TensorRecord:
    tensor = TensorRecord()
    for number, kind, a, b in fields(source, start, end):
        if number == 1:
            tensor.dims += _integers(source, kind, a, b)
        elif number == 2:
            tensor.dtype = a
        elif number in (4, 5, 6, 7, 10, 11):
            tensor.typed.append((number, kind, a, b))
        elif number == 8 and kind == SPAN:
            tensor.name = text(source, a, b)
        elif number == 9 and kind == SPAN:
            tensor.raw = (a, b)
        elif number == 13 and kind == SPAN:
            _entry(source, a, b, tensor.external)
        elif number == 14:
            tensor.is_external = a == 1
    if len(tensor.dims) > MAX_SHAPE_DIMS:
        raise ModelError(f"tensor {tensor.name!r} has {len(tensor.dims)} dimensions")
    return tensor


def _entry(source: Source, start: int, end: int, into: dict[str, str]) -> None:
    key = value = ""
    for number, kind, a, b in fields(source, start, end):
        if kind == SPAN and number == 1:
            key = text(source, a, b)
        elif kind == SPAN and number == 2:
            value = text(source, a, b)
    into[key] = value


def _value(source: Source, start: int, end: int) -> ValueRecord:
    out = ValueRecord()
    for number, kind, a, b in fields(source, start, end):
        if number == 1 and kind == SPAN:
            out.name = text(source, a, b)
        elif number == 2 and kind == SPAN:
            for n, k, c, d in fields(source, a, b):
                if n == 1 and k == SPAN:
                    _tensor_type(source, c, d, out)
    return out


def _tensor_type(source: Source, start: int, end: int, out: ValueRecord) -> None:
    for number, kind, a, b in fields(source, start, end):
        if number == 1:
            out.dtype = a
        elif number == 2 and kind == SPAN:
            out.dims = []
            for n, k, c, d in fields(source, a, b):
                if n == 1 and k == SPAN:
                    out.dims.append(_dim(source, c, d))


def _dim(source: Source, start: int, end: int) -> int | str | None:
    out: int | str | None = None
    for number, kind, a, b in fields(source, start, end):
        if number == 1 and kind == 0:
            out = signed(a)
        elif number == 2 and kind == SPAN:
            out = text(source, a, b) or None
    return out


def _function(source: Source, start: int, end: int) -> FunctionRecord:
    out = FunctionRecord()
    for number, kind, a, b in fields(source, start, end):
        if kind != SPAN:
            continue
        if number == 1:
            out.name = text(source, a, b)
        elif number == 4:
            out.inputs.append(text(source, a, b))
        elif number == 5:
            out.outputs.append(text(source, a, b))
        elif number == 7:
            out.nodes.append(_node(source, a, b, 0))
        elif number == 9:
            _opset(source, a, b, out.opsets)
        elif number == 10:
            out.domain = _domain(text(source, a, b))
        elif number == 11:
            attribute = _attribute(source, a, b, 0)
            out.defaults[attribute.name] = attribute
        elif number == 13:
            out.overload = text(source, a, b)
    return out
