"""Numeric verification: a match is kept only where primitives and recognised op compute the same numbers.

Both are evaluated by the IR's reference semantics in float64, on random operands at two small concrete sizes.
Stored weights are never read: random stand-ins take their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mapper.errors import MapperError, ModelError
from mapper.frontend.emit import Emitter, symbol_of
from mapper.frontend.net import Array, Node, Value, numpy_of
from mapper.frontend.resize import resized
from mapper.frontend.rewrite import Match
from mapper.ir.builder import GraphBuilder
from mapper.ir.dims import Dim
from mapper.ir.reference import evaluate
from mapper.ir.types import TensorType
from mapper.ir.weights import WeightSymbol

SIZES = ({"batch": 2, "sequence": 3, "past": 4}, {"batch": 3, "sequence": 5, "past": 1})
TOLERANCE = 1e-6
_COARSE = {"bf16": 2.0**-8, "f16": 2.0**-11}
"""Constants of graphs in half precision are themselves that coarse."""
MAX_ELEMENTS = 1 << 22  # of one value that is evaluated
Shapes = Mapping[int, tuple[int, ...]]
Widths = Mapping[int, int]
Draw = Callable[[Mapping[str, int]], dict[int, Any]]
_OTHER_TYPES = ("embed", "route")
"""Ops whose first result is of another type than their first operand."""


def between(roots: Sequence[Value], stop: set[int]) -> list[Node]:
    """The nodes that compute `roots` from the values in `stop`, in order."""
    order: list[Node] = []
    done: set[int] = set()
    stack = [(v, False) for v in roots]
    while stack:
        value, ready = stack.pop()
        node = value.node
        if node is None or id(value) in stop or id(node) in done:
            continue
        if ready:
            done.add(id(node))
            order.append(node)
        else:
            stack.append((value, True))
            stack.extend((v, False) for v in node.inputs)
    return order


def leaves_of(nodes: Sequence[Node], roots: Sequence[Value]) -> list[Value]:
    """The values that `nodes` and `roots` read and none of `nodes` makes, constants left out."""
    made = {id(o) for n in nodes for o in n.outputs}
    found: dict[int, Value] = {}
    for value in [*(v for n in nodes for v in n.inputs), *roots]:
        if id(value) not in made and value.const is None:
            found.setdefault(id(value), value)
    return list(found.values())


def sizes_for(values: Sequence[Value], nodes: Sequence[Node], base: Mapping[str, int]) -> dict[str, int]:
    """A number for every symbol that occurs."""
    env = dict(base)
    dims = [d for v in [*values, *(o for n in nodes for o in n.outputs)] for d in v.dims]
    for node in nodes:
        for attr in node.attrs.values():
            dims += [d for d in (attr if isinstance(attr, tuple) else (attr,)) if hasattr(d, "symbols")]
    for symbol in sorted({s for d in dims for s in d.symbols}):
        env.setdefault(symbol, 5 + len(env))
    return env


def random_array(value: Value, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Random operands: normal floats, small integers, truths of which most hold."""
    if value.dtype == "bool":
        truths = rng.random(tuple(shape)) < 0.7
        if truths.size and truths.ndim:
            truths[..., 0] = True
        return truths
    if value.dtype[0] in "iu":
        return rng.integers(0, 2, tuple(shape))
    return rng.standard_normal(tuple(shape)).astype(np.float32)


@dataclass(eq=False)
class Probe:
    """Values and the leaves that bound them, ready to be evaluated at concrete sizes."""

    roots: Sequence[Value]
    nodes: list[Node]
    leaves: list[Value]

    @staticmethod
    def of(roots: Sequence[Value], stop: Sequence[Value]) -> Probe:
        """Everything between `stop` and `roots`."""
        nodes = between(roots, {id(v) for v in stop})
        return Probe(roots, nodes, leaves_of(nodes, roots))

    def evaluate(
        self,
        sizes: Mapping[str, int],
        arrays: Mapping[int, Array],
        extra: Sequence[Node] = (),
        shapes: Shapes | None = None,
        widths: Widths | None = None,
    ) -> list[Array]:
        """The roots, then the results of `extra` nodes. `arrays` gives leaves (by id); others are random.
        `widths` replaces sizes all through: see `resize`.

        Raises ModelError where operands do not fit at these sizes.
        """
        try:
            return self._evaluate(sizes, arrays, extra, shapes or {}, widths or {})
        except (ValueError, IndexError, TypeError, ArithmeticError, MemoryError) as error:
            raise ModelError(f"not to be evaluated at these sizes: {error}") from error

    def _evaluate(
        self,
        sizes: Mapping[str, int],
        arrays: Mapping[int, Array],
        extra: Sequence[Node],
        shapes: Shapes,
        widths: Widths,
    ) -> list[Array]:
        rng = np.random.default_rng(7)
        env = sizes_for(self.leaves, [*self.nodes, *extra], sizes)
        builder = GraphBuilder("probe")
        stand_in: dict[int, WeightSymbol] = {}
        given: dict[str, Array] = {}
        emitter = Emitter(builder, env, stand_in, widths)
        self.check_size(env, shapes, widths)
        for index, leaf in enumerate(self.leaves):
            shape = shapes.get(id(leaf)) or tuple(resized(d, widths).evaluate(env) for d in leaf.dims)
            array = arrays[id(leaf)] if id(leaf) in arrays else random_array(leaf, shape, rng)
            array = array.astype(numpy_of(leaf.dtype))
            if leaf.weight is not None:
                stand_in[id(leaf)] = WeightSymbol.of(f"w{index}", np.ascontiguousarray(array))
            else:
                name = f"x{index}"
                emitter.leaf(leaf, builder.input(name, TensorType.of(array.shape, leaf.dtype)))
                given[name] = array
        for node in [*self.nodes, *extra]:
            emitter.node(node)
        results = [*self.roots, *(o for n in extra for o in n.outputs)]
        graph = builder.finish({f"y{i}": emitter.value(v) for i, v in enumerate(results)}, verify=False)
        made = evaluate(graph, given, precision="f64")
        return [made[f"y{i}"] for i in range(len(results))]

    def check_size(self, env: Mapping[str, int], shapes: Shapes, widths: Widths) -> None:
        """Raises ModelError where the evaluation would take long or need much memory."""

        def number(dim: Dim) -> int:
            return resized(dim, widths).evaluate(env)

        work = 0
        for leaf in self.leaves:
            work = max(work, volume(shapes.get(id(leaf)) or map(number, leaf.dims)))
        for node in self.nodes:
            if node.op == "transpose" and id(node.inputs[0]) in shapes:
                continue  # as large as its operand is made
            size = sum(volume(map(number, o.dims)) for o in node.outputs)
            products = node.op == "matmul" and not shapes
            work = max(work, size, size * number(node.inputs[0].dims[-1]) >> 6 if products else 0)
        if work > MAX_ELEMENTS:
            raise ModelError("a value is too large to be verified numerically")


def volume(shape: Iterable[int]) -> int:
    """Elements of a shape; empty dimensions count as one, for loops run over the others all the same."""
    return math.prod(max(size, 1) for size in shape)


def stored_array(leaf: Value, folder: Path, largest: int = 1 << 26) -> Array | None:
    """The numbers of a stored tensor that recognition looks at; None where absent or over `largest` bytes."""
    ref = leaf.weight
    if ref is None or ref.bytes > largest:
        return None
    try:
        numbers = np.array(symbol_of(ref, folder).load())
    except MapperError:
        return None
    ref.looked.add(ref.name if ref.packed is None else ref.packed.values.name)
    return numbers


@dataclass(eq=False)
class Checker:
    """Verifies matches, each distinct structure once. `folder` is the model's."""

    folder: Path
    seen: dict[Any, bool] = field(default_factory=dict)

    def holds(
        self,
        match: Match,
        shapes: Shapes | None = None,
        arrays: Mapping[int, Array] | None = None,
        widths: Widths | None = None,
        draw: Draw | None = None,
    ) -> bool:
        """Whether the match's primitives equal its op. `shapes` may shrink leaves, `widths` sizes all
        through; `draw` makes operands where random ones would not do."""
        if match.op not in _OTHER_TYPES and match.inputs[0].dtype != match.out.dtype:
            return False
        stop = match.bounds or match.inputs
        probe = Probe.of([*match.outs, *match.inputs], stop)
        key = self.key(match, probe)
        if key is None or arrays:
            return self.test(match, probe, shapes, arrays or {}, widths, draw)
        if key not in self.seen:
            self.seen[key] = self.test(match, probe, shapes, {}, widths, draw)
        return self.seen[key]

    def test(
        self,
        match: Match,
        probe: Probe,
        shapes: Shapes | None,
        arrays: Mapping[int, Array],
        widths: Widths | None = None,
        draw: Draw | None = None,
    ) -> bool:
        """Compares at every size; what cannot be evaluated does not hold."""
        results = [Value(out.dims, out.dtype) for out in match.outs]
        node = Node(match.op, match.inputs, match.node_attrs(), results)
        for sizes in SIZES:
            try:
                given = {**arrays, **(draw(sizes) if draw else {})}
                made = probe.evaluate(sizes, given, [node], shapes, widths)
            except MapperError:
                return False
            n = len(results)
            near = max(TOLERANCE, *(_COARSE.get(v.dtype, 0.0) for v in (match.out, *match.inputs)))
            if not all(equal(a, b, near) for a, b in zip(made[:n], made[-n:], strict=True)):
                return False
        return True

    def key(self, match: Match, probe: Probe) -> Any:
        """The structure of a match: equal keys compute equal functions of their leaves."""
        index = {id(v): i for i, v in enumerate(probe.leaves)}
        lines: list[Any] = [(v.dims, v.dtype, v.weight is not None) for v in probe.leaves]

        def ref(value: Value) -> Any:
            if value.const is not None:
                return value.dtype, value.const.shape, value.const.tobytes()
            return index[id(value)]

        for node in probe.nodes:
            lines.append((node.op, tuple(map(ref, node.inputs)), tuple(sorted(node.attrs.items()))))
            for out in node.outputs:
                index[id(out)] = len(index)
        attrs = tuple(sorted(match.node_attrs().items()))
        return (*lines, match.op, attrs, tuple(map(ref, match.outs)), tuple(map(ref, match.inputs)))


def equal(a: Array, b: Array, tolerance: float = TOLERANCE) -> bool:
    """Whether two results agree relative to the largest element."""
    if a.shape != b.shape:
        return False
    if not a.size:
        return True
    scale = max(1.0, float(np.max(np.abs(b))))
    return bool(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))) <= tolerance * scale)
