"""Specialisation: a graph for given shapes, with all shape arithmetic folded away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mapper.errors import ModelError
from mapper.ir.graph import Graph
from mapper.ir.types import TensorType
from mapper.passes.dce import Dce
from mapper.passes.fold import Folder
from mapper.passes.rewrite import Values, rewrite

Binding = int | Sequence[int]


@dataclass(frozen=True)
class Specialise:
    """Fixes dimension symbols: `-p specialise{batch=1,sequence=4}` gives {"batch": 1, "sequence": 4}; a name
    of an input with a sequence of ints gives its whole shape. Symbols that are not named stay symbolic."""

    bindings: tuple[tuple[str, Binding], ...] = ()
    name = "specialise"

    def apply(self, graph: Graph) -> Graph:
        """The specialised graph, folded and without dead code."""
        return specialise(graph, dict(self.bindings))


def specialise(graph: Graph, bindings: Mapping[str, Binding]) -> Graph:
    """The graph with {input name: shape} or {symbol: int} fixed. Raises ModelError on a misfit."""
    return Dce(weights=False).apply(specialise_values(graph, bindings)[0])


def specialise_values(graph: Graph, bindings: Mapping[str, Binding]) -> tuple[Graph, Values]:
    """The specialised graph with its dead code, and the map from the graph's values to its values."""
    symbols = _symbols(graph, bindings)
    types = {n: TensorType.of([d.substitute(symbols) for d in t.shape], t.dtype) for n, t in graph.inputs}
    for name, shape in bindings.items():
        if not isinstance(shape, int):
            types[name] = TensorType.of(tuple(shape), types[name].dtype)
    values: Values = {}
    return rewrite(graph, Folder(symbols=symbols).visit, types, values), values


def _symbols(graph: Graph, bindings: Mapping[str, Binding]) -> dict[str, int]:
    symbols = {n: v for n, v in bindings.items() if isinstance(v, int)}
    types = dict(graph.inputs)
    for name, shape in bindings.items():
        if isinstance(shape, int):
            continue
        if name not in types or len(shape) != types[name].rank:
            raise ModelError(f"shape {list(shape)} for {name!r}: no input of that name and rank")
        for dim, size in zip(types[name].shape, shape, strict=True):
            if dim.is_const and dim.value != size:
                raise ModelError(f"input {name!r}: dimension {dim} cannot be {size}")
            if not dim.is_const and dim.symbols == {str(dim)} and symbols.setdefault(str(dim), size) != size:
                raise ModelError(f"input {name!r}: {dim} is both {symbols[str(dim)]} and {size}")
    return symbols
