"""From the frontend's working graph to the dataflow IR.

Recognised nodes name their operands in `attrs["slots"]`: those that are weights become symbol attributes of
the op, the others its operands. Primitives read weights through `load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.net import Net, Node, Value, WeightRef, numpy_of
from mapper.frontend.resize import resized
from mapper.ir.builder import GraphBuilder
from mapper.ir.dims import ONE, Call, Dim, Monomial
from mapper.ir.types import TensorType
from mapper.ir.weights import Packing, WeightSymbol

if TYPE_CHECKING:
    from xdsl.ir import SSAValue

    from mapper.ir.graph import Graph

OPERANDS = {
    "attention": ("q", "k", "v", "mask", "sinks"),
    "latent_attention": ("q", "latent", "rope_key", "mask"),
    "rope": ("x", "cos", "sin"),
    "embed": ("ids",),
    "kv_append": ("past", "new"),
    "kv_update": ("past", "new", "rows"),
    "route": ("logits",),
    "moe": ("x", "index", "share"),
}


def symbol_of(ref: WeightRef, folder: Path | None) -> WeightSymbol:
    """The weight symbol of a stored tensor; `folder` is the model's."""
    packing = None
    if ref.packed is not None:
        p = ref.packed
        values, scales, zeros, order = (
            None if part is None else symbol_of(part, folder)
            for part in (p.values, p.scales, p.zeros, p.order)
        )
        assert values is not None and scales is not None
        packing = Packing(p.scheme, values, scales, zeros, order)
    where = (ref.file, ref.offset, ref.bytes)
    return WeightSymbol(ref.name, ref.dims, ref.dtype, *where, ref.data, folder, packing=packing)


class Emitter:
    """Emits nodes into a builder. `env` fixes symbols to numbers; `stand_in` gives weights other data;
    `widths` replaces sizes all through (see `resize`)."""

    def __init__(
        self,
        builder: GraphBuilder,
        env: Mapping[str, int] | None = None,
        stand_in: Mapping[int, WeightSymbol] | None = None,
        widths: Mapping[int, int] | None = None,
    ) -> None:
        self.b = builder
        self.widths = widths or {}
        self.env = env or {}
        self.stand_in = {} if stand_in is None else stand_in
        self.values: dict[int, SSAValue] = {}
        self.sizes: dict[str, tuple[SSAValue, int]] = {}
        self._scalars: dict[Dim, SSAValue] = {}
        self._symbols: dict[str, SSAValue] = {}

    def dim(self, dim: Dim) -> Dim:
        """A dimension with the fixed symbols filled in."""
        dim = resized(dim, self.widths) if self.widths else dim
        return dim.substitute(self.env) if self.env else dim

    def dims(self, dims: Iterable[Dim]) -> tuple[Dim, ...]:
        """Dimensions with the fixed symbols filled in."""
        return tuple(self.dim(d) for d in dims)

    def leaf(self, value: Value, emitted: SSAValue) -> None:
        """Binds a value to one already in the graph, and learns which symbols its shape tells."""
        self.values[id(value)] = emitted
        for axis, dim in enumerate(value.dims):
            for symbol in dim.symbols:
                if dim == Dim.symbol(symbol):
                    self.sizes.setdefault(symbol, (emitted, axis))

    def value(self, value: Value) -> SSAValue:
        """The emitted form of an operand that is already there, a weight or a constant."""
        found = self.values.get(id(value))
        if found is not None:
            return found
        if value.weight is not None:
            found = self.b.load(self.symbol(value))
        elif value.const is not None:
            found = self.b.constant(np.asarray(value.const, numpy_of(value.dtype)), value.dtype)
        else:
            raise ModelError(f"value of {value.op or value.source!r} is used before it is made")
        self.values[id(value)] = found
        return found

    def symbol(self, value: Value) -> str:
        """Declares the weight symbol of a value and returns its name."""
        stand_in = self.stand_in.get(id(value))
        if stand_in is not None:
            return self.b.weight(stand_in)
        if value.weight is None:
            raise ModelError(f"value of {value.op!r} is no weight")
        return self.b.weight(symbol_of(value.weight, self.b.folder))

    def scalar(self, dim: Dim) -> SSAValue:
        """An i64 scalar that computes a dimension from the shapes of the inputs."""
        dim = self.dim(dim)
        if dim not in self._scalars:
            self._scalars[dim] = self._scalar(dim)
        return self._scalars[dim]

    def _scalar(self, dim: Dim) -> SSAValue:
        if dim.is_const:
            return self.b.constant(np.array(dim.value, np.int64))
        total: SSAValue | None = None
        for monomial, coefficient in dim.terms:
            term = self._term(monomial, coefficient)
            total = term if total is None else self.b.add("add", [total, term])
        assert total is not None
        return total

    def _term(self, monomial: Monomial, coefficient: int) -> SSAValue:
        parts = [self._atom(atom) for atom in monomial]
        if coefficient != 1 or not parts:
            parts.insert(0, self.scalar(Dim.of(coefficient)))
        out = parts[0]
        for part in parts[1:]:
            out = self.b.add("mul", [out, part])
        return out

    def _atom(self, atom: str | Call) -> SSAValue:
        if isinstance(atom, str):
            if atom not in self.sizes:
                raise UnsupportedModelError(f"the size {atom!r} is not the size of any input")
            if atom not in self._symbols:
                owner, axis = self.sizes[atom]
                vector = self.b.add("shape_of", [owner], {"start": axis, "end": axis + 1})
                self._symbols[atom] = self.b.add("reshape", [vector], {"dims": ()})
            return self._symbols[atom]
        names = {"//": "div", "%": "mod", "max": "max", "min": "min"}
        out = self.scalar(atom.args[0])
        for arg in atom.args[1:]:
            out = self.b.add(names[atom.fn], [out, self.scalar(arg)])
        return out

    def node(self, node: Node) -> None:
        """Emits one node; its operands are there already."""
        special = _SPECIAL.get(node.op)
        if special is not None:
            results: Sequence[SSAValue] = [special(self, node)]
        elif "slots" in node.attrs:
            results = self._recognised(node)
        else:
            operands = [self.value(v) for v in node.inputs]
            made = self.b.add_op(node.op, operands, self._attrs(node), node=node.origin)
            results = list(made.results)
        for value, emitted in zip(node.outputs, results, strict=True):
            self.values[id(value)] = emitted

    def _attrs(self, node: Node) -> dict[str, Any]:
        attrs = {k: v for k, v in node.attrs.items() if k != "slots"}
        if node.op in ("reshape", "expand"):
            return {"dims": self.dims(attrs["shape"])}
        if node.op == "slice":
            low = Dim.of(-(1 << 62))
            ends = [
                low if s < 0 and e == Dim.of(-1) else e
                for e, s in zip(attrs["ends"], attrs["steps"], strict=True)
            ]
            attrs |= {"starts": self.dims(attrs["starts"]), "ends": self.dims(ends)}
        elif node.op == "tile":
            attrs["repeats"] = self.dims(attrs["repeats"])
        elif node.op == "conv":
            attrs["pads"] = (*attrs.pop("before"), *attrs.pop("after"))
        elif node.op == "topk":
            attrs["k"] = self.dim(Dim.of(attrs["k"])).value
        return attrs

    def _recognised(self, node: Node) -> Sequence[SSAValue]:
        order = OPERANDS.get(node.op, ("x",))
        operands: list[SSAValue | None] = [None] * len(order)
        attrs = {k: v for k, v in node.attrs.items() if k != "slots"}
        for slot, value in zip(node.attrs["slots"], node.inputs, strict=True):
            if slot in order:
                operands[order.index(slot)] = self.value(value)
            else:
                attrs[slot] = self.symbol(value)
        while operands and operands[-1] is None:
            operands.pop()
        return list(self.b.add_op(node.op, operands, attrs, node=node.origin).results)

    def _range(self, node: Node) -> SSAValue:
        a = node.attrs
        ends = [self.scalar(a["start"]), self.scalar(a["limit"]), self.scalar(Dim.of(a["step"]))]
        out = self.b.add("range", ends, types=None, node=node.origin)
        return out if a["dtype"] == "i64" else self.b.add("cast", [out], {"dtype": a["dtype"]})

    def _shape(self, node: Node) -> SSAValue:
        scalars = [self.scalar(d) for d in node.attrs["values"]]
        if not node.attrs["rank"]:
            return scalars[0]
        return self.b.add(
            "concat", [self.b.add("reshape", [s], {"dims": (ONE,)}) for s in scalars], {"axis": 0}
        )

    def _pad(self, node: Node) -> SSAValue:
        fill = node.inputs[1].scalar
        pads = self.dims((*node.attrs["before"], *node.attrs["after"]))
        if fill is None or not all(p.is_const for p in pads):
            raise UnsupportedModelError(f"{node.origin}: padding that depends on the data or on a size")
        return self.b.add(
            "pad", [self.value(node.inputs[0])], {"pads": [p.value for p in pads], "value": fill}
        )


_SPECIAL = {"iota": Emitter._range, "dims": Emitter._shape, "pad": Emitter._pad}


def emit(net: Net, path: Path, sha256: str, roles: Mapping[str, Any]) -> Graph:
    """The graph with its roles, unverified. Raises UnsupportedModelError where no input tells a size."""
    builder = GraphBuilder(path.stem, path, path.parent, sha256)
    emitter = Emitter(builder)
    made = sorted(net.outputs, key=lambda o: roles["outputs"].get(o[0], "").startswith("present."))
    live = net.live(v for _, v in made)  # what is no cache first: every layer's nodes then have one order
    for value in net.inputs:
        role = roles["inputs"].get(value.source, "other")
        emitter.leaf(value, builder.input(value.source, TensorType.of(value.dims, value.dtype), role))
    for node in live:
        emitter.node(node)
    outputs = {name: emitter.value(value) for name, value in net.outputs}
    facts = {k: v for k, v in roles.items() if k not in ("inputs", "outputs")}
    return builder.finish(outputs, roles["outputs"], None, False, **facts)
