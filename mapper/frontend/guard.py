"""Guarded reading of a model file: structure, names, order and sizes are checked before any data is read."""

from __future__ import annotations

import mmap
import stat
from collections import ChainMap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.extent import check_size
from mapper.frontend.proto import GraphRecord, ModelRecord, NodeRecord, TensorRecord, decode_model
from mapper.frontend.tensors import ExternalFiles, Location, locate
from mapper.frontend.wire import Source

OPSETS = range(11, 29)
DOMAINS = {"", "com.microsoft", "ai.onnx.ml"}
MAX_OPERANDS = 4096  # of one node; experts stacked one by one are hundreds
MAX_FILE = 1 << 31  # a protobuf message is at most 2 GiB; larger weights are external by definition
TEXT_SUFFIXES = {".json", ".txt", ".textproto", ".prototxt", ".onnxtxt", ".onnxjson", ".pbtxt"}


Names = ChainMap[str, str]  # value -> what defines it, the innermost graph first


@dataclass(frozen=True)
class GuardedModel:
    """A model whose structure has been checked. `locations` is keyed by `id` of the tensor record; `looked`
    collects the names of weights whose numbers recognition reads; `identify`: the graph carries the file's
    digest."""

    path: Path
    record: ModelRecord
    source: Source
    locations: dict[int, Location] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)
    identify: bool = True


def read_model(path: str | Path, external_root: str | Path | None = None) -> GuardedModel:
    """Open, decode and check a model file; reads no data. Raises ModelError or UnsupportedModelError.

    The real path of every weight file must lie in the model's folder or, where it is given, in
    `external_root`."""
    file, root = Path(path), None if external_root is None else Path(external_root)
    source = _open(file)
    record = decode_model(source, len(source.data))
    check_size(record)
    model = GuardedModel(file, record, source)
    check_opsets(record)
    check_graph(record.graph, ChainMap(), "graph")
    for function in record.functions.values():
        where = f"function {function.name[:80]!r}"
        names: Names = ChainMap({n: where for n in function.inputs})
        _check_nodes(function.nodes, function.outputs, names, where)
    others = ExternalFiles(file.parent, root)
    for owner, tensor in _tensors(record):
        model.locations[id(tensor)] = locate(tensor, source, file, owner, others)
    return model


def _open(file: Path) -> Source:
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: no such model file") from error
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{file} is a directory, not an ONNX file")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{file} is not a regular file")
    if file.suffix.lower() in TEXT_SUFFIXES:
        raise ModelError(f"{file}: text formats are not read; give the binary ONNX file")
    if status.st_size == 0:
        raise ModelError(f"{file} is empty")
    if status.st_size >= MAX_FILE:
        raise ModelError(f"{file} has {status.st_size} bytes; a protobuf file has less than {MAX_FILE}")
    try:
        with file.open("rb") as stream:
            return Source(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error


def check_opsets(record: ModelRecord) -> None:
    """The standard opset is one we know. Raises UnsupportedModelError otherwise."""
    for opsets in (record.opsets, *(f.opsets for f in record.functions.values())):
        version = opsets.get("")
        if version is not None and version not in OPSETS:
            raise UnsupportedModelError(f"opset {version} is not one of {OPSETS.start}..{OPSETS.stop - 1}")
    if "" not in record.opsets and any(not n.domain for n in record.graph.nodes):
        raise ModelError("the model does not say which opset its standard operators are of")


def label(node: NodeRecord) -> str:
    """How errors name a node."""
    name = node.name or (node.outputs[0] if node.outputs else "")
    domain = f"{node.domain[:40]}." if node.domain else ""
    return f"node {name[:80]!r} ({domain}{node.op[:40]})"


def check_graph(graph: GraphRecord, outer: Names, where: str) -> None:
    """Single assignment, defined inputs, no cycle, sub-graphs included; sorts `graph.nodes` topologically."""
    names = outer.new_child()
    given = {v.name for v in graph.inputs}
    for value in graph.inputs:
        _define(names, value.name, f"an input of {where}")
    for tensor in graph.tensors:
        if tensor.name not in given:
            _define(names, tensor.name, f"an initializer of {where}")
    if len({t.name for t in graph.tensors}) != len(graph.tensors):
        raise ModelError(f"two initializers of {where} have one name")
    if graph.sparse:
        raise UnsupportedModelError(f"{where} holds sparse initializers")
    graph.nodes[:] = _check_nodes(graph.nodes, [v.name for v in graph.outputs], names, where)


def _define(names: Names, name: str, what: str) -> None:
    if not name:
        raise ModelError(f"{what} has no name")
    if name in names:
        raise ModelError(f"value {name[:80]!r} is assigned twice: {names[name]} and {what}")
    names[name] = what


def _check_nodes(
    nodes: list[NodeRecord], outputs: Iterable[str], names: Names, where: str
) -> list[NodeRecord]:
    defined = ChainMap(dict(names.maps[0]), *names.maps[1:])
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node.domain not in DOMAINS and not node.domain.startswith("pkg.") and not node.op:
            raise ModelError(f"{label(node)} has no operator")
        if max(len(node.inputs), len(node.outputs)) > MAX_OPERANDS:
            raise ModelError(f"{label(node)} has more than {MAX_OPERANDS} operands or results")
        for name in node.outputs:
            if name:
                _define(names, name, label(node))
                producer[name] = index
    needs: list[set[int]] = []
    for node in nodes:
        used = {n for n in node.inputs if n} | {n for g in subgraphs(node) for n in free_names(g)}
        for name in used:
            if name not in names:
                raise ModelError(f"{label(node)} reads {name[:80]!r}, which nothing defines")
        needs.append({producer[n] for n in used if n in producer})
    for name in outputs:
        if name not in names:
            raise ModelError(f"{where} gives {name[:80]!r}, which nothing defines")
    order = _order(nodes, needs)
    for index in order:
        for graph in subgraphs(nodes[index]):
            check_graph(graph, defined, f"a sub-graph of {label(nodes[index])}")
        defined.update((n, label(nodes[index])) for n in nodes[index].outputs if n)
    return [nodes[i] for i in order]


def _order(nodes: list[NodeRecord], needs: list[set[int]]) -> list[int]:
    import heapq

    users: list[list[int]] = [[] for _ in nodes]
    missing = [len(n) for n in needs]
    for index, sources in enumerate(needs):
        for s in sources:
            users[s].append(index)
    ready = [i for i, n in enumerate(missing) if n == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(nodes):
        stuck = next(i for i, n in enumerate(missing) if n > 0)
        raise ModelError(f"the graph has a cycle through {label(nodes[stuck])}")
    return order


def subgraphs(node: NodeRecord) -> Iterator[GraphRecord]:
    """The graphs among a node's attributes."""
    for attribute in node.attributes.values():
        values = attribute.value if isinstance(attribute.value, list) else [attribute.value]
        yield from (v for v in values if isinstance(v, GraphRecord))


def free_names(graph: GraphRecord) -> set[str]:
    """The names that a sub-graph reads from the graphs around it."""
    own = {v.name for v in graph.inputs} | {t.name for t in graph.tensors}
    own |= {o for n in graph.nodes for o in n.outputs}
    used = {i for n in graph.nodes for i in n.inputs if i} | {v.name for v in graph.outputs}
    for node in graph.nodes:
        for inner in subgraphs(node):
            used |= free_names(inner)
    return used - own


def _tensors(record: ModelRecord) -> Iterator[tuple[str, TensorRecord]]:
    yield from _graph_tensors(record.graph)
    for function in record.functions.values():
        yield from _node_tensors(function.nodes)


def _graph_tensors(graph: GraphRecord) -> Iterator[tuple[str, TensorRecord]]:
    yield from (("initializer", t) for t in graph.tensors)
    yield from _node_tensors(graph.nodes)


def _node_tensors(nodes: list[NodeRecord]) -> Iterator[tuple[str, TensorRecord]]:
    for node in nodes:
        for attribute in node.attributes.values():
            values = attribute.value if isinstance(attribute.value, list) else [attribute.value]
            for value in values:
                if isinstance(value, TensorRecord) and value.dtype != 8:
                    yield f"{label(node)}: attribute {attribute.name[:40]!r}", value
                elif isinstance(value, GraphRecord):
                    yield from _graph_tensors(value)
