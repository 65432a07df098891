"""The frontend's working graph: canonical primitives with symbolic shapes, built by smart constructors.

A `Value` knows its shape, its type and, for small integer tensors, its contents as symbolic dimensions: shape
arithmetic of the original graph disappears while it is built. Equal nodes are built once (hash-consing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError
from mapper.ir.dims import ONE, Dim
from mapper.lowbit import Scheme

Array = npt.NDArray[Any]
Dims = tuple[Dim, ...]
MAX_CONTENT = 256  # elements of an integer tensor whose contents are followed symbolically
MAX_FOLDED = 1 << 14  # elements of a constant that folding may make
MAX_RANK = 16
MAX_SIZE = 1 << 62  # of one dimension
MAX_TERMS, MAX_TEXT = 64, 400  # of one dimension's expression


@dataclass(frozen=True)
class PackedRef:
    """The stored parts of a weight of low-bit integers."""

    scheme: Scheme
    values: WeightRef
    scales: WeightRef
    zeros: WeightRef | None = None
    order: WeightRef | None = None


@dataclass(frozen=True)
class WeightRef:
    """A stored tensor: its ONNX name and where its bytes are; its data, where it holds typed elements; or its
    parts, where it is packed. Who reads its numbers adds the name to `looked`."""

    name: str
    dims: tuple[int, ...]
    dtype: str
    file: str | None
    offset: int
    bytes: int
    data: Array | None = None
    packed: PackedRef | None = None
    looked: set[str] = field(default_factory=set, compare=False, repr=False)


@dataclass(eq=False)
class Value:
    """A tensor. Exactly one of `node`, `weight`, `const`, `source` (graph input) says where it comes from."""

    dims: Dims
    dtype: str
    node: Node | None = None
    index: int = 0
    weight: WeightRef | None = None
    const: Array | None = None
    source: str = ""
    content: tuple[Dim, ...] | None = None

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)

    @property
    def op(self) -> str:
        """The operator that makes this value; empty for inputs, weights and constants."""
        return self.node.op if self.node else ""

    @property
    def args(self) -> tuple[Value, ...]:
        """The operands of the operator that makes this value."""
        return self.node.inputs if self.node else ()

    @property
    def scalar(self) -> float | None:
        """The number, where this is a constant with equal elements (one or more)."""
        if self.const is None or self.const.size == 0:
            return None
        flat = self.const.reshape(-1)
        return float(flat[0]) if bool((flat == flat[0]).all()) else None


@dataclass(eq=False)
class Node:
    """One primitive. `attrs` are hashable; `origin` names the ONNX node it comes from."""

    op: str
    inputs: tuple[Value, ...]
    attrs: dict[str, Any]
    outputs: list[Value] = field(default_factory=list)
    origin: str = ""


Rule = Callable[["Net", Sequence[Value], dict[str, Any]], list[tuple[Dims, str]]]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Registers a shape rule for primitives."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


@dataclass(eq=False)
class CacheFacts:
    """What is noted of a file's key-value caches, shared by all copies of its net.

    `mode`: how caches of fused operators are read (`ops_cache.MODES`); `asked`: per such cache the values and
    sizes that tell which mode inputs mean (first new row, tokens in all, rows, new rows); `spelled`: the
    ONNX operator that a node's origin names, where it may add to a cache; `steering`: what inputs mean;
    `heads`: how many heads an input [B, P, H*D] holds."""

    mode: str = "plain"
    heads: Mapping[str, int] = field(default_factory=dict)
    asked: list[tuple[Value, Value, Dim, Dim]] = field(default_factory=list)
    spelled: dict[str, str] = field(default_factory=dict)
    steering: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Net:
    """A graph under construction. `equal` collects pairs of dimensions that operators require to be equal."""

    inputs: list[Value] = field(default_factory=list)
    outputs: list[tuple[str, Value]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    equal: list[tuple[Dim, Dim]] = field(default_factory=list)
    caches: CacheFacts = field(default_factory=CacheFacts)
    origin: str = ""  # how errors name the ONNX node being lowered
    name: str = ""  # its plain name
    _seen: dict[Any, Node] = field(default_factory=dict)
    _consts: dict[Any, Value] = field(default_factory=dict)

    # leaves ----------------------------------------------------------------------------------------------

    def input(self, name: str, dims: Iterable[Dim], dtype: str) -> Value:
        """A graph input."""
        value = Value(tuple(dims), dtype, source=name)
        self.inputs.append(value)
        return value

    def constant(self, array: Array, dtype: str) -> Value:
        """A small constant; equal ones are one value."""
        array = np.asarray(array)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._consts:
            dims = tuple(Dim.of(n) for n in array.shape)
            content = None
            if array.dtype.kind in "iu" and array.size <= MAX_CONTENT and array.ndim <= 2:
                content = tuple(Dim.of(int(v)) for v in array.reshape(-1))
            self._consts[key] = Value(dims, dtype, const=array, content=content)
        return self._consts[key]

    def scalar(self, number: float, like: Value) -> Value:
        """A rank-0 constant of the type of `like`."""
        return self.constant(np.asarray(number, numpy_of(like.dtype)), like.dtype)

    def ints(self, content: Sequence[Dim | int], rank: int = 1) -> Value:
        """An int64 tensor with the given symbolic contents: a constant, or a `dims` node."""
        dims = tuple(Dim.of(c) for c in content)
        if all(d.is_const for d in dims):
            array = np.array([d.value for d in dims], np.int64)
            return self.constant(array if rank else array.reshape(()), "i64")
        value = self.make("dims", (), {"values": dims, "rank": rank})
        value.content = dims
        return value

    # nodes -----------------------------------------------------------------------------------------------

    def make(self, op: str, inputs: Sequence[Value], attrs: dict[str, Any] | None = None) -> Value:
        """The single output of a primitive, built once."""
        return self.many(op, inputs, attrs)[0]

    def many(self, op: str, inputs: Sequence[Value], attrs: dict[str, Any] | None = None) -> list[Value]:
        """All outputs of a primitive, built once. Raises ModelError where shapes do not fit."""
        attrs = attrs or {}
        key = (op, tuple(id(v) for v in inputs), tuple(sorted(attrs.items(), key=lambda t: t[0])))
        found = self._seen.get(key)
        if found is None:
            if op not in RULES:
                raise ModelError(f"no shape rule for primitive {op}")
            found = Node(op, tuple(inputs), attrs, origin=self.name)
            types = RULES[op](self, inputs, attrs)
            for dims, _ in types:
                check_dims(dims, self.origin)
            found.outputs = [Value(d, t, node=found, index=i) for i, (d, t) in enumerate(types)]
            self._seen[key] = found
            self.nodes.append(found)
        return found.outputs

    def put(
        self, op: str, inputs: Sequence[Value], attrs: dict[str, Any], like: Sequence[Value], origin: str
    ) -> list[Value]:
        """A node whose results have the types and contents of `like`, built once: copies, recognised ops."""
        key = (op, tuple(id(v) for v in inputs), tuple(sorted(attrs.items(), key=lambda t: t[0])))
        found = self._seen.get(key)
        if found is None:
            found = Node(op, tuple(inputs), attrs, origin=origin)
            found.outputs = [Value(v.dims, v.dtype, found, i, content=v.content) for i, v in enumerate(like)]
            self._seen[key] = found
            self.nodes.append(found)
        return found.outputs

    def same(self, a: Dim, b: Dim) -> None:
        """Notes that two dimensions must be equal; raises ModelError where they are different numbers."""
        if a == b:
            return
        if a.is_const and b.is_const:
            raise ModelError(f"{self.origin}: dimensions {a} and {b} differ")
        self.equal.append((a, b))

    def broadcast(self, *shapes: Dims) -> Dims:
        """The NumPy broadcast of shapes; symbolic dimensions that meet are noted as equal."""
        rank = max((len(s) for s in shapes), default=0)
        out: list[Dim] = []
        for axis in range(rank):
            best = ONE
            for shape in shapes:
                at = axis - rank + len(shape)
                if at < 0 or shape[at] == ONE or shape[at] == best:
                    continue
                if best != ONE:
                    self.same(best, shape[at])
                best = shape[at] if best == ONE or (shape[at].is_const and not best.is_const) else best
            out.append(best)
        return tuple(out)

    def live(self, roots: Iterable[Value]) -> list[Node]:
        """The nodes that `roots` need, in topological order."""
        order: list[Node] = []
        done: set[int] = set()
        stack: list[tuple[Node, bool]] = [(v.node, False) for v in reversed(list(roots)) if v.node]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif id(node) not in done:
                done.add(id(node))
                stack.append((node, True))
                stack.extend(
                    (v.node, False) for v in reversed(node.inputs) if v.node and id(v.node) not in done
                )
        return order


def numpy_of(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of one of our dtype names."""
    from mapper.ir.types import numpy_dtype

    return numpy_dtype(dtype)


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements of a shape. Raises ModelError where the expression grows out of hand."""
    total = ONE
    for dim in dims:
        if len(total.terms) * len(dim.terms) > MAX_TERMS:
            raise ModelError("a shape whose number of elements is too complex an expression")
        total = total * dim
    return total


def tame(dim: Dim) -> bool:
    """Whether a dimension is an expression of reasonable size."""
    if dim.is_const:
        return abs(dim.value) < MAX_SIZE
    return len(dim.terms) <= MAX_TERMS and len(str(dim)) <= MAX_TEXT


def check_dims(dims: Dims, where: str) -> None:
    """Raises ModelError for a shape of too many, negative, or absurd dimensions."""
    if len(dims) > MAX_RANK:
        raise ModelError(f"{where}: a tensor of rank {len(dims)}")
    for dim in dims:
        if not tame(dim):
            raise ModelError(f"{where}: a dimension is too large or too complex an expression")
        if dim.is_const and dim.value < 0:
            raise ModelError(f"{where}: a dimension is {dim}")


def users(nodes: Iterable[Node]) -> dict[int, list[tuple[Node, int]]]:
    """`id` of each value -> the nodes that read it, with the operand index."""
    out: dict[int, list[tuple[Node, int]]] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            out.setdefault(id(value), []).append((node, index))
    return out


def walk(value: Value, stop: Callable[[Value], bool]) -> Iterator[Value]:
    """`value` and everything it is computed from, each once, not looking behind values where `stop` holds."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        here = stack.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        if not stop(here):
            stack.extend(here.args)
