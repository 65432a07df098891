"""Weights of a schedule: one storage per matrix, table and vector, the port that fills it, its parts per
chip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mapper.backend import weight_source
from mapper.errors import LoweringError
from mapper.ir.graph import Graph
from mapper.ir.types import numpy_dtype
from mapper.ir.weights import WeightSymbol
from mapper.schedule.tables import Port
from mapper_gpu.extractor import Extracted
from mapper_gpu.kernel import Kernel
from mapper_gpu.nodes import EXPERTS, Matrix, Node, Pick
from mapper_gpu.packed import INTEGERS, Part
from mapper_gpu.programs import vector_name
from mapper_gpu.storage import NUMPY, Memory, Storage

Json = Any
Key = tuple[Any, ...]
VECTORS = ("weight", "bias", "vector", "sinks", "slopes", "correction", "biases", "bias0", "bias1")
"""Attributes of nodes that may name a vector."""


@dataclass(frozen=True)
class Held:
    """A stored weight: the symbol, what of it ([first, first + rows) of [n, k], `turned` where the file has
    [k, n]; or those rows that `pick` names), and how chips share it. `count` experts are a stack of such
    weights, or a table with a vector each, on each of `owners` groups of chips, `inside` of which are in one
    replica. A vector has k = 0; a rope table keeps its shape. Of a low-bit
    weight each `part` is held, k its columns."""

    symbol: str
    kind: str
    n: int
    k: int
    first: int
    turned: bool
    split: str
    dtype: str
    copies: int = 1
    pick: Pick | None = None
    count: int = 1
    flipped: int = 0
    part: Part | None = None
    owners: int = 1
    inside: int = 1


class Weights:
    """All weights that any phase needs; phases share a storage where symbol and layout are the same."""

    def __init__(self, graphs: Mapping[Any, Graph], memory: Memory, form: str, base: int = 0) -> None:
        self.graphs, self.form, self.base = graphs, form, base
        self.chips, self.group, self.replicas = memory.tensor or memory.group, memory.group, memory.replicas
        self.symbols: dict[str, WeightSymbol] = {n: w for g in graphs.values() for n, w in g.weights.items()}
        self.cuts: dict[Held, int] = {}
        self.storages: dict[Held, Storage] = {}
        self.users: dict[tuple[Any, int], list[tuple[str, list[Held]]]] = {}

    def need(self, phase: Any, e: Extracted, kernels: Sequence[Kernel]) -> None:
        """Take note of a section's weights, and in how many parts its kernels cut K."""
        found: dict[str, list[Held]] = {}
        for k in kernels:
            splits = k.tile.splits if k.tile is not None else 1
            for i in k.nodes:
                for label, held in _of(e.section.nodes[i], self.form):
                    for name in e.slots.get(held.symbol, (held.symbol,)):
                        one = replace(held, symbol=name)
                        self.cuts[one] = math.lcm(
                            self.cuts.get(one, 1), splits if one.kind == "matrix" else 1
                        )
                    names = e.slots.get(held.symbol, (held.symbol,))
                    made = [replace(held, symbol=n) for n in names]
                    if found.setdefault(label, made) != made:
                        raise LoweringError(f"gpu: two different parts of weights are called {label}")
        self.users[phase, id(e)] = sorted(found.items())

    def allocate(self, memory: Memory) -> None:
        """Storages of all of them. A table that is laid out like a matrix is the same storage."""
        layouts: dict[Key, Storage] = {}
        taken = {s.name for s in memory.storages}
        seen: Counter[Key] = Counter()
        for held, cuts in self.cuts.items():
            rows, width, panel = held.n, held.k, held.k // cuts if held.k else 0
            if held.kind in ("vector", "rope", "vectors"):
                rows, width, panel = held.count if held.kind == "vectors" else 1, held.n, held.n
            key = (
                held.symbol,
                held.first,
                rows,
                width,
                panel,
                held.turned,
                held.split,
                held.dtype,
                held.copies,
                held.count,
                held.flipped,
                held.pick,
                held.part,
                held.owners,
            )
            if key not in layouts:
                name = held.symbol
                if held.pick is not None:
                    name += f"[{held.pick.label}]"
                elif held.first or held.kind in ("vector", "vectors"):
                    name += f"[{held.first}:]"
                same = (held.symbol, held.first, held.pick, held.part)
                name += f"#{seen[same]}" if seen[same] else ""
                seen[same] += 1
                stack = held.count if held.kind == "stack" else 1
                made = Storage(name, rows, width, held.dtype, panel, count=stack)
                if held.part is not None:
                    made = replace(made, name=f"{name}.{held.part.name}", bits=held.part.bits,
                                   per=max(1, held.part.per))  # fmt: skip
                if made.name in taken:  # another stage has it too
                    made = replace(made, name=f"{made.name}@{self.base}")
                layouts[key] = memory.add(replace(made, base=self.base))
            self.storages[held] = layouts[key]

    def lookup(self, phase: Any, e: Extracted) -> dict[str, Storage]:
        """The storages of a section's weights, of its first repetition, by the names that programs use."""
        return {label: self.storages[held[0]] for label, held in self.users[phase, id(e)]}

    def slots(self, phase: Any, e: Extracted) -> list[tuple[Storage, list[Storage]]]:
        """(storage of the first repetition, storages of all) of the weights that change from layer to
        layer."""
        found: dict[Storage, list[Storage]] = {}
        for _, held in self.users[phase, id(e)]:
            if len(held) > 1:
                found[self.storages[held[0]]] = [self.storages[h] for h in held]
        return list(found.items())

    def ports(self) -> list[Port]:
        """A port per storage."""
        seen: set[Storage] = set()
        found: list[Port] = []
        for held, s in self.storages.items():
            if s in seen:
                continue
            seen.add(s)
            shape = self._whole(held)
            layout = _layout(held, s.panel)
            if held.part is not None and held.part.bits:
                stored = self._stored(held, shape[:-1])
                layout |= {"bits": held.part.bits, "columns": shape[-1]}
                layout |= {"loose": True} if stored is None else {}
                shape = stored or shape
            buffers = tuple(range(s.first, s.first + self.group))
            layout |= {"replicas": self.replicas} if self.replicas > 1 else {}
            kind: Any = "weight"
            found.append(
                Port(
                    f"weight:{s.name}",
                    kind,
                    NUMPY[held.dtype],
                    shape,
                    buffers,
                    layout,
                    self._source(held, shape),
                )
            )
        return found

    def _stored(self, held: Held, rows: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of an array of packed elements, whole rows as the file has them; None where the array has
        an element for each."""
        symbol, part = self.symbols[held.symbol], self._part(held)
        assert symbol.packing is not None
        if symbol.packing.scheme.layout == "plain" or part is None:
            return None
        return *rows, part.elements // math.prod(symbol.shape[:-1])

    def _part(self, held: Held) -> WeightSymbol | None:
        """The stored array of a part; None for zero points that are all 0."""
        packing = self.symbols[held.symbol].packing
        assert packing is not None and held.part is not None
        return packing.parts.get(held.part.name)

    def _whole(self, held: Held) -> tuple[int, ...]:
        parts = self.chips // (held.copies * held.inside)
        n = held.n * (parts if held.split == "n" else 1)
        if held.kind in ("vector", "rope"):
            return 1, n
        if held.kind == "vectors":
            return held.count * held.owners, n
        whole = (n, held.k * (parts if held.split == "k" else 1))
        return (held.count * held.owners, *whole) if held.kind == "stack" else whole

    def _source(self, held: Held, shape: tuple[int, ...]) -> Json:
        symbol = self.symbols[held.symbol]
        if held.kind == "stack" and held.part is not None:
            part = self._part(held)
            assert part is not None
            dims = [*symbol.shape[:2], part.elements // math.prod(symbol.shape[:2])]
            return _stacked(held, ["reshape", weight_source(part).expression, dims], dims, shape)
        if held.kind in ("stack", "vectors"):
            return _turned_stack(held, symbol, shape)
        if held.part is not None:
            return self._coded(held, symbol.shape[0])
        source: Json = weight_source(symbol).expression
        if numpy_dtype(symbol.dtype).name != NUMPY[held.dtype]:
            source = ["cast", source, NUMPY[held.dtype]]
        if held.kind in ("vector", "rope"):
            total = symbol.elements
            if held.pick is not None:
                return [
                    "reshape",
                    _picked(["reshape", source, [total, 1]], held.pick, [total, 1]),
                    [1, shape[1]],
                ]
            source = ["reshape", source, [1, total]]
            return source if shape[1] == total else ["slice", source, 1, held.first, held.first + shape[1]]
        if held.turned:
            source = ["transpose", source, [1, 0]]
        rows, k = symbol.shape[::-1] if held.turned else symbol.shape
        if held.pick is not None:
            made = _picked(source, held.pick, [rows, k])
            if not held.flipped:
                return made
            groups = [rows // held.pick.stride, len(held.pick.inner), k]
            turned = ["transpose", ["reshape", made, groups], [0, 2, 1]]
            return ["reshape", turned, list(shape)]
        return source if shape[0] == rows else ["slice", source, 0, held.first, held.first + shape[0]]

    def _coded(self, held: Held, rows: int) -> Json:
        """Rows of a part, as [rows, what is stored of each]; of plain integers an element for each."""
        symbol, part = self.symbols[held.symbol], self._part(held)
        assert symbol.packing is not None
        if symbol.packing.scheme.layout == "plain":
            rows = symbol.shape[1] if held.turned else rows
            source = self._plain(held, part, rows)
        else:
            assert part is not None
            source = weight_source(part).expression
            if len(part.shape) != 2 or part.shape[0] != rows:
                source = ["reshape", source, [rows, part.elements // rows]]
        n = self._whole(held)[0]
        if held.pick is not None:
            stored = self._stored(held, (rows,))
            return _picked(source, held.pick, [rows, held.k if stored is None else stored[-1]])
        return source if n == rows else ["slice", source, 0, held.first, held.first + n]

    def _plain(self, held: Held, part: WeightSymbol | None, rows: int) -> Json:
        """A part of plain integers by rows of the product; signed codes offset by half of their range, and
        what all rows share given to each."""
        if part is None:
            return ["zeros", [rows, held.k], "uint8"]
        source: Json = weight_source(part).expression
        if part.elements == 1 or len(part.shape) < 2:
            source = ["reshape", source, [part.elements, 1]]
        elif held.turned:
            source = ["transpose", source, [1, 0]]
        if part.dtype in INTEGERS:
            half = 1 << INTEGERS[part.dtype] - 1 if part.dtype.startswith("i") else 0
            source = ["add", ["cast", source, "int16"], ["full", [1, 1], "int16", half]]
        if part.elements == 1:
            kind = "int16" if part.dtype in INTEGERS else numpy_dtype(part.dtype).name
            source = ["add", source, ["zeros", [rows, 1], kind]]
        return ["cast", source, "uint8"] if part.dtype in INTEGERS else source

    def files(self) -> dict[str, Any]:
        """Schedule.weights."""
        found = {n: w for h in self.storages for n, w in weight_source(self.symbols[h.symbol]).files.items()}
        return {
            n: {"file": w.file, "offset": w.offset, "bytes": w.bytes, "dtype": numpy_dtype(w.dtype).name,
                "shape": list(w.shape)} for n, w in sorted(found.items())
        }  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Schedule.constants."""
        found = {
            n: np.ascontiguousarray(a)
            for h in self.storages for n, a in weight_source(self.symbols[h.symbol]).constants.items()
        }  # fmt: skip
        return dict(sorted(found.items()))


def _layout(held: Held, panel: int) -> dict[str, Any]:
    """How a weight lies on its chips (see semantics)."""
    owned: dict[str, Any] = {}
    if held.owners > 1:
        owned = {"experts": {"inside": held.inside, "spread": held.owners // held.inside}}
    if held.kind == "stack":
        return {"kind": "stack", "split": held.split, "copies": held.copies, **owned}
    split = "k" if held.kind == "vectors" and held.split == "n" else held.split
    return {"kind": "panels", "panel": panel, "split": split, "copies": held.copies, **owned}


def _turned_stack(held: Held, symbol: WeightSymbol, shape: tuple[int, ...]) -> Json:
    """The expression of a stack [experts, n, k], or of a table [experts, n]."""
    source: Json = weight_source(symbol).expression
    if numpy_dtype(symbol.dtype).name != NUMPY[held.dtype]:
        source = ["cast", source, NUMPY[held.dtype]]
    dims = list(symbol.shape)
    if held.kind == "stack" and held.turned:
        source, dims = ["transpose", source, [0, 2, 1]], [dims[0], dims[2], dims[1]]
    return _stacked(held, source, dims, shape)


def _stacked(held: Held, source: Json, dims: list[int], shape: tuple[int, ...]) -> Json:
    """The rows of each expert's array that are held, of an array of `dims`."""
    if held.pick is not None:
        rest = dims[2:]
        k = math.prod(rest)
        flat = _picked(["reshape", source, [dims[0] * dims[1], k]], held.pick, [dims[0] * dims[1], k])
        return ["reshape", flat, list(shape)]
    return source if dims[1] == shape[1] else ["slice", source, 1, held.first, held.first + shape[1]]


def _picked(source: Json, pick: Pick, shape: list[int]) -> Json:
    """The expression of the rows of an array [rows, k] that `pick` names."""
    rows, k = shape
    grouped = ["reshape", source, [rows // pick.stride, pick.stride, k]]
    runs: list[list[int]] = []
    for i in pick.inner:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    parts = [["slice", grouped, 1, a, b] for a, b in runs]
    made = parts[0] if len(parts) == 1 else ["concat", parts, 1]
    return ["reshape", made, [rows // pick.stride * len(pick.inner), k]]


def _of(node: Node, form: str) -> Iterator[tuple[str, Held]]:
    """(name in programs, what is held) of a node's weights."""
    for w in node.weights:
        if node.kind in ("embed", "positions"):
            yield f"table:{w.name}", Held(w.name, "table", w.n, w.k, 0, w.turned, "", form)
        elif node.kind in EXPERTS:
            for label, held in _matrix(w, form):
                yield label, replace(held, kind="stack", count=w.total, owners=w.owners, inside=w.inside)
        else:
            yield from _matrix(w, form)
    if node.kind == "rope":
        table = node.attr("table")
        yield (
            f"rope:{table['symbol']}",
            Held(table["symbol"], "rope", math.prod(table["shape"]), 0, 0, False, "", "f32"),
        )
    for name in VECTORS:
        v = node.attr(name)
        if isinstance(v, Mapping):
            split = "n" if v.get("chips", 1) > 1 else ""
            yield (
                vector_name(v),
                Held(
                    v["symbol"],
                    "vectors" if "experts" in v else "vector",
                    v["length"],
                    0,
                    v.get("first", 0),
                    False,
                    split,
                    "f32",
                    v.get("copies", 1),
                    v.get("pick"),
                    v.get("experts", 1),
                    owners=v.get("owners", 1),
                    inside=v.get("inside", 1),
                ),
            )


def _matrix(w: Matrix, form: str) -> Iterator[tuple[str, Held]]:
    if w.low is None:
        yield (
            w.label,
            Held(
                w.name, "matrix", w.n, w.k, w.first, w.turned, w.split, form, w.copies, w.pick,
                flipped=w.flipped,
            ),
        )  # fmt: skip
        return
    for part in w.low.parts:
        kind, split = "matrix", w.split
        if not part.per:  # one for a whole row: on every chip that has a part of it
            kind, split = "rows", "" if w.split == "k" else w.split
        whole = Held(
            w.name, kind, w.n, part.width(w.k), w.first, w.turned, split, part.dtype, w.copies, w.pick
        )
        yield f"{w.label}.{part.name}", replace(whole, part=part)
