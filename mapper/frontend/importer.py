"""From a guarded ONNX model to the frontend's working graph: inlines functions, follows constant branches."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend import (
    ops_activation,
    ops_attention,
    ops_basic,
    ops_cache,
    ops_contrib,
    ops_einsum,
    ops_fused,
    ops_moe,
    ops_nn,
    ops_norm,
    ops_quant,
    ops_vision,
    tensors,
)
from mapper.frontend.extent import MAX_CALLS, MAX_NODES
from mapper.frontend.guard import GuardedModel, label
from mapper.frontend.lower import LOWERINGS, Call, lower
from mapper.frontend.net import MAX_RANK, Array, CacheFacts, Net, Value, WeightRef
from mapper.frontend.proto import (
    AttributeRecord,
    FunctionRecord,
    GraphRecord,
    NodeRecord,
    TensorRecord,
    ValueRecord,
)
from mapper.ir.dims import Dim

REGISTERED = (
    ops_basic, ops_nn, ops_contrib, ops_cache, ops_moe, ops_activation, ops_attention, ops_norm, ops_einsum,
    ops_quant, ops_vision, ops_fused,
)  # fmt: skip  # imported for their registrations
MAX_INLINE = 1 << 16  # bytes of a constant held in the graph
MAX_DIM_TEXT = 200
MAX_FACTORS = 4
MAX_DECLARED = 2048  # different sizes among the inputs

Names = MutableMapping[str, Value]


@dataclass(frozen=True)
class Reading:
    """How a file that can be read in more than one way is read: an If whose condition is not known, with the
    branch to follow; what caches of fused operators mean (`ops_cache.MODES`); how many heads caches [B, P,
    H*D] hold, by input."""

    taken: tuple[NodeRecord, bool] | None = None
    mode: str = "plain"
    heads: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Importer:
    """State of one import: the graph under construction and what remains of the node budget."""

    model: GuardedModel
    net: Net
    symbols: Mapping[str, Dim]
    reading: Reading = field(default_factory=Reading)
    nodes_left: int = field(default=MAX_NODES)

    def run(self) -> None:
        """Builds the whole main graph."""
        graph = self.model.record.graph
        names: Names = {}
        given = {t.name for t in graph.tensors}
        for value in graph.inputs:
            if value.name in given:
                continue  # an initializer that may be overridden: its default is the model
            if value.dims is None:
                raise UnsupportedModelError(f"input {value.name[:80]!r} has no rank")
            if len(value.dims) > MAX_RANK:
                raise ModelError(f"input {value.name[:80]!r} has rank {len(value.dims)}")
            dims = [d.substitute(self.symbols) for d in input_dims(value)]
            dtype = tensors.dtype_name(value.dtype, f"input {value.name[:80]!r}")
            names[value.name] = self.net.input(value.name, dims, dtype)
        self.graph(graph, names, self.model.record.opsets, 0)
        self.net.outputs = [(v.name, names[v.name]) for v in graph.outputs]

    def graph(self, graph: GraphRecord, names: Names, opsets: Mapping[str, int], depth: int) -> None:
        """Adds the initializers and nodes of a graph or sub-graph to `names`."""
        for tensor in graph.tensors:
            names[tensor.name] = self.stored(tensor, tensor.name)
        self.run_nodes(graph.nodes, names, opsets, depth)

    def stored(self, tensor: TensorRecord, name: str) -> Value:
        """A tensor of the file: a constant where it is small and steers shapes or scales, else a weight."""
        location = self.model.locations[id(tensor)]
        dtype = tensors.DTYPES[tensor.dtype][0]
        if is_held(tensor, location, inline=False):
            try:
                return self.net.constant(self.array(tensor), dtype)
            except ModelError:
                raise
            except Exception as error:
                if location.file == self.model.path.name:
                    raise ModelError(f"tensor {name[:80]!r} cannot be read: {error}") from error
        data = self.array(tensor) if location.file is None else None
        where = location.file, location.offset, location.bytes
        return self.weight(WeightRef(name, tuple(tensor.dims), dtype, *where, data, looked=self.model.looked))

    def weight(self, ref: WeightRef) -> Value:
        """The value of a weight symbol."""
        return Value(tuple(Dim.of(d) for d in ref.dims), ref.dtype, weight=ref)

    def array(self, tensor: TensorRecord) -> Array:
        """The elements of a small tensor."""
        return tensors.read(
            tensor, self.model.source, self.model.locations[id(tensor)], self.model.path.parent
        )

    def run_nodes(
        self, nodes: Sequence[NodeRecord], names: Names, opsets: Mapping[str, int], depth: int
    ) -> None:
        """Lowers nodes in order."""
        for node in nodes:
            self.nodes_left -= 1
            if self.nodes_left < 0:
                raise ModelError(f"the graph has more than {MAX_NODES} nodes after inlining")
            outs = self.node(node, names, opsets, depth)
            for name, value in zip(node.outputs, outs, strict=False):
                if name:
                    names[name] = value
            for name in node.outputs[len(outs) :]:
                if name:
                    raise UnsupportedModelError(f"{label(node)}: output {name[:80]!r} is not supported")

    def node(self, node: NodeRecord, names: Names, opsets: Mapping[str, int], depth: int) -> list[Value]:
        """The outputs of one node: a function call, a branch, a large constant, or an operator."""
        key = (node.domain, node.op, node.overload)
        function = self.model.record.functions.get(key)
        if function is not None and (node.domain, node.op) not in LOWERINGS:
            return self.call(function, node, names, depth)
        if node.op == "If" and not node.domain:
            return self.branch(node, names, opsets, depth)
        value = node.attributes.get("value")
        if node.op == "Constant" and value and isinstance(value.value, TensorRecord):
            return [self.stored_constant(value.value, node)]
        for name in node.inputs:
            if name and name not in names:
                raise UnsupportedModelError(f"{label(node)}: operand {name[:80]!r} has no value here")
        ins = [names[n] if n else None for n in node.inputs]
        return lower(Call(self.net, node, ins, opsets.get("", 0), self.array))

    def stored_constant(self, tensor: TensorRecord, node: NodeRecord) -> Value:
        """The tensor of a Constant node; in the graph where it is small."""
        location = self.model.locations.get(id(tensor))
        if location is None:
            raise UnsupportedModelError(f"{label(node)}: only numeric constants are supported")
        if is_held(tensor, location, inline=True):
            return self.net.constant(self.array(tensor), tensors.DTYPES[tensor.dtype][0])
        return self.stored(tensor, node.outputs[0])

    def branch(self, node: NodeRecord, names: Names, opsets: Mapping[str, int], depth: int) -> list[Value]:
        """An If whose condition is known."""
        given = names.get(node.inputs[0]) if node.inputs else None
        if given is None:
            raise ModelError(f"{label(node)} lacks a condition")
        condition: float | bool | None = given.scalar
        taken = self.reading.taken
        if taken is not None and node is taken[0]:
            condition = taken[1]
        if condition is None:
            raise UnsupportedModelError(f"{label(node)}: the condition depends on the data")
        chosen = node.attributes.get("then_branch" if condition else "else_branch")
        if chosen is None or not isinstance(chosen.value, GraphRecord):
            raise ModelError(f"{label(node)} lacks a branch")
        inner: Names = names.new_child() if isinstance(names, ChainMap) else ChainMap({}, names)
        self.graph(chosen.value, inner, opsets, depth)
        return [inner[v.name] for v in chosen.value.outputs]

    def call(self, function: FunctionRecord, node: NodeRecord, names: Names, depth: int) -> list[Value]:
        """A function of the model, inlined."""
        if depth >= MAX_CALLS:
            raise ModelError(f"{label(node)}: functions are nested deeper than {MAX_CALLS}")
        absent = [a for a in node.inputs if a and a not in names]
        if absent:
            raise UnsupportedModelError(f"{label(node)}: operand {absent[0][:80]!r} has no value here")
        inner = {f: names[a] for f, a in zip(function.inputs, node.inputs, strict=False) if a}
        given = function.defaults | node.attributes
        body = [_bound(n, given) for n in function.nodes]
        opsets = dict(function.opsets) or dict(self.model.record.opsets)
        self.run_nodes(body, inner, opsets, depth + 1)
        missing = [name for name in function.outputs if name not in inner]
        if missing:
            raise ModelError(f"{label(node)}: its output {missing[0][:80]!r} has no value here")
        return [inner[name] for name in function.outputs]


def is_held(tensor: TensorRecord, location: tensors.Location, inline: bool) -> bool:
    """Whether a tensor of the file becomes a constant of the graph: a small one that is in a Constant node
    (`inline`), or steers shapes or scales."""
    dtype = tensors.DTYPES[tensor.dtype][0]
    steering = inline or dtype in ("i64", "i32", "bool") or all(d == 1 for d in tensor.dims)
    return steering and location.bytes <= MAX_INLINE and dtype in tensors.NUMPY


def input_dims(value: ValueRecord) -> list[Dim]:
    """The declared dimensions of an input; what is not declared is a symbol named after the place."""
    dims = []
    for axis, declared in enumerate(value.dims or []):
        if (isinstance(declared, int) and declared >= 0) or (
            isinstance(declared, str) and _is_plain(declared)
        ):
            dims.append(Dim.of(declared))
        else:
            dims.append(Dim.symbol(declared if isinstance(declared, str) else f"{value.name}.{axis}"))
    return dims


def _is_plain(text: str) -> bool:
    """Whether an expression is short enough to be worked out: products of sums grow exponentially."""
    longest = MAX_DIM_TEXT if "(" not in text else MAX_DIM_TEXT // 3
    return len(text) <= longest and "**" not in text and text.count("*") <= MAX_FACTORS


def declared_dims(model: GuardedModel) -> list[Dim]:
    """The declared dimensions of all inputs of the model. Raises ModelError where there are too many."""
    different = {d for v in model.record.graph.inputs for d in v.dims or ()}
    if len(different) > MAX_DECLARED:
        raise ModelError(f"the inputs have more than {MAX_DECLARED} different sizes")
    return [d for v in model.record.graph.inputs for d in input_dims(v)]


def _bound(node: NodeRecord, given: Mapping[str, AttributeRecord]) -> NodeRecord:
    """A node of a function body with its attribute references replaced by the caller's attributes."""
    if not any(a.refers for a in node.attributes.values()):
        return node
    bound: dict[str, AttributeRecord] = {}
    for name, attribute in node.attributes.items():
        if not attribute.refers:
            bound[name] = attribute
        elif attribute.refers in given:
            bound[name] = AttributeRecord(name, given[attribute.refers].value)
    return replace(node, attributes=bound)


def import_model(
    model: GuardedModel, symbols: Mapping[str, Dim] | None = None, reading: Reading | None = None
) -> Net:
    """The model as canonical primitives. `symbols` replaces symbols of the inputs' declared dimensions."""
    reading = reading or Reading()
    with np.errstate(all="ignore"):
        importer = Importer(
            model, Net(caches=CacheFacts(reading.mode, reading.heads)), symbols or {}, reading
        )
        importer.run()
    return importer.net
