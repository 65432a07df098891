"""What the tasks of a kernel compute: a short program on registers, the same for all its tasks of one kind.

A program reads operands (a value, its rows and columns given by the task's coordinates), runs instructions
on two-dimensional float32 registers, and writes operands. It is the executable meaning of a task, and what
source code is emitted from. As JSON, in the schedule's plan:

    {"kind": ..., "reads": [operand...], "writes": [operand...], "code": [[instruction, ...]...]}
    operand: {"value", "dtype", "rows", "width", "panel", "r": "m" | "n" | "all", "c": "k" | "n" | "all" |
    "q" ...}; of a part of a low-bit weight also "bits" of its packed elements (0: whole ones) and "per", the
    columns of K that one of its columns stands for"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mapper_gpu.flash import head_parts
from mapper_gpu.nodes import Matrix, Node, Section
from mapper_gpu.storage import Storage

Json = Any
Lookup = Mapping[str, Storage]
Columns = str | list[int]
"""Columns of an operand: by the task's coordinates, or [first, end]."""


@dataclass
class Builder:
    """Collects one program. `storage` finds the storage of a value, a weight or a table by name; `rows` are
    "all" in a task that takes all tokens; `owner` is the number of the chip's group of experts."""

    kind: str
    section: Section
    storage: Lookup
    tokens: int
    rows: str = "m"
    owner: int = 0
    reads: list[Json] = field(default_factory=list)
    writes: list[Json] = field(default_factory=list)
    code: list[Json] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    sources: list[tuple[Storage, str, Columns, int]] = field(default_factory=list)
    targets: list[tuple[Storage, str, str]] = field(default_factory=list)

    def read(self, name: str, r: str, c: Columns, key: str = "", chip: int = -1) -> str:
        """A register with an operand; `chip` -1 is the task's own. The same operand is read once."""
        key = key or f"{name}/{r}/{c}/{chip}"
        if key not in self.registers:
            s = self.storage[name]
            self.registers[key] = f"r{len(self.registers)}"
            self.code.append(["read", self.registers[key], len(self.reads)])
            self.reads.append(_operand(s, r, c, chip))
            self.sources.append((s, r, c, chip))
        return self.registers[key]

    def register(self, value: str) -> str:
        """The register that holds a value made here."""
        return self.registers.setdefault(f"={value}", f"r{len(self.registers)}")

    def value(self, name: str, r: str, c: str) -> str:
        """A value: made here, or read."""
        return self.registers.get(f"={name}") or self.read(name, r, c)

    def write(self, name: str, register: str, r: str = "m", c: str = "n") -> None:
        """Store a register."""
        s = self.storage[name]
        self.code.append(["write", len(self.writes), register])
        self.writes.append(_operand(s, r, c, -1))
        self.targets.append((s, r, c))

    def emit(self, *instruction: Json) -> None:
        """Add an instruction."""
        self.code.append(list(instruction))

    def dequantise(self, out: str, parts: Mapping[str, str], w: Matrix) -> None:
        """Make operands of a low-bit weight's parts, by the registers that they are in."""
        assert w.low is not None
        self.emit("dequantise", out, parts["values"], parts["scales"], parts.get("zeros"), w.low.kind,
                  w.low.bits, w.low.block, w.low.scale, w.dtype)  # fmt: skip

    def json(self) -> Json:
        """The program as plain data."""
        return {"kind": self.kind, "reads": self.reads, "writes": self.writes, "code": self.code}

    def node(self, node: Node, c: str) -> None:
        """The instructions of a node on rows m and columns c."""
        NODES[node.kind](self, node, c)


def _operand(s: Storage, r: str, c: Columns, chip: int) -> Json:
    packed = {"bits": s.bits, "per": s.per} if s.bits or s.per > 1 else {}
    return {
        "value": s.name,
        "dtype": s.dtype,
        "rows": s.rows,
        "width": s.width,
        "panel": s.panel,
        **({"stack": s.count} if s.count > 1 else {}),
        "r": r,
        "c": c,
        "chip": chip,
        **packed,
    }


def vector_name(vector: Mapping[str, Any]) -> str:
    """The storage name of a vector's part."""
    first = vector.get("first", 0)
    whole = vector["length"] * vector.get("chips", 1) // vector.get("copies", 1)
    pick = vector.get("pick")
    return f"vector:{vector['symbol']}:{first if pick is None else pick.label}:{whole}"


def _vector(b: Builder, vector: Mapping[str, Any] | None, c: str) -> str | None:
    return None if vector is None else b.read(vector_name(vector), "all", c)


def _embed(b: Builder, node: Node, c: str) -> None:
    ids, table = b.read(node.inputs[0], "m", "all"), b.read(f"table:{node.weights[0].name}", "all", "all")
    b.emit("embed", b.register(node.output), ids, table)


def _positions(b: Builder, node: Node, c: str) -> None:
    table, past = b.read(f"table:{node.weights[0].name}", "all", "all"), b.read("past_length", "all", "all")
    b.emit("positions", b.register(node.output), table, past, b.tokens, node.attr("offset"))


def _norm(b: Builder, node: Node, c: str) -> None:
    x = b.value(node.inputs[0], "m", c)
    weight, bias = (_vector(b, node.attr(k), "all") for k in ("weight", "bias"))
    b.emit("norm", b.register(node.output), x, weight, bias, node.attr("norm"), node.attr("eps"),
           node.attr("offset"), node.attr("head"))  # fmt: skip


def _rope(b: Builder, node: Node, c: str) -> None:
    x = b.value(node.inputs[0], "m", c)
    table, past = (
        b.read(f"rope:{node.attr('table')['symbol']}", "all", "all"),
        b.read("past_length", "all", "all"),
    )
    length = node.attr("table")["shape"][1]
    b.emit("rope", b.register(node.output), x, table, past, node.attr("style"), node.attr("rotary"),
           node.attr("head"), b.tokens, length)  # fmt: skip


def _point(b: Builder, node: Node, c: str) -> None:
    fn = node.attr("fn")
    inputs = [b.value(v, "m", c) for v in node.inputs]
    if fn == "bias":
        vector = _vector(b, node.attr("vector"), c)
        b.emit("point", b.register(node.output), "add", [inputs[0], vector], None)
        return
    scalar = node.attr("scalar")
    b.emit("point", b.register(node.output), fn, inputs, list(scalar) if scalar else None)


def _gate(b: Builder, node: Node, c: str) -> None:
    gate, up = (b.value(v, "m", c) for v in node.inputs)
    b.emit("gate", b.register(node.output), node.attr("act"), gate, up)


def _append(b: Builder, node: Node, c: str) -> None:
    x, past = b.value(node.inputs[0], "m", c), b.read("past_length", "all", "all")
    cache = node.attr("cache")
    b.read(cache, "cache", "heads")
    b.emit("append", len(b.writes), x, past, b.tokens, node.attr("head"))
    s = b.storage[cache]
    b.writes.append(_operand(s, "cache", "heads", -1))
    b.targets.append((s, "cache", "heads"))


NODES: dict[str, Callable[[Builder, Node, str], None]] = {
    "embed": _embed,
    "positions": _positions,
    "norm": _norm,
    "head_norm": _norm,
    "rope": _rope,
    "point": _point,
    "gate": _gate,
    "append": _append,
}


def run_nodes(b: Builder, nodes: Sequence[int], c: str) -> None:
    """The instructions of some nodes, in order."""
    for i in nodes:
        b.node(b.section.nodes[i], c)


def _weight(b: Builder, w: Matrix, i: int) -> str:
    """A register with the operand [n, k] of the tensor core: read, or made from its parts."""
    if w.low is None:
        return b.read(w.label, "n", "k", f"w{i}")
    parts = {p.name: b.read(f"{w.label}.{p.name}", "n", "k" if p.per else "all", f"w{i}.{p.name}")
             for p in w.low.parts}  # fmt: skip
    made = b.register(f"{w.label}.operand{i}")
    b.dequantise(made, parts, w)
    return made


def product_program(
    b: Builder,
    prologue: Sequence[int],
    linears: Sequence[int],
    epilogue: Sequence[int],
    stores: Sequence[str],
    split: bool,
) -> None:
    """A tile of a product: prologue on whole rows, products over columns k, then the epilogue; or, where K is
    split, the partial sums (`partial` storages) alone."""
    run_nodes(b, prologue, "all")
    nodes = b.section.nodes
    for i in linears:
        x = nodes[i].inputs[0]
        made = b.registers.get(f"={x}")
        if made is not None and split:
            key = f"={x}/k"
            if key not in b.registers:
                b.registers[key] = f"r{len(b.registers)}"
                b.emit("columns", b.registers[key], made)
            made = b.registers[key]
        heads = nodes[i].attr("heads", 0)
        w = nodes[i].weights[0]
        source = made or b.read(x, "m", f"head:{w.k}:{w.n // heads}" if heads else "k")
        block = nodes[i].attr("round", 0)
        if block:
            rounded = f"={x}/round"
            if rounded not in b.registers:
                b.registers[rounded] = f"r{len(b.registers)}"
                b.emit("round_blocks", b.registers[rounded], source, block)
            source = b.registers[rounded]
        weight = _weight(b, w, i)
        b.emit("matmul", b.register(nodes[i].output), source, weight, nodes[i].weights[0].dtype)
    if not split:
        run_nodes(b, epilogue, "n")
        for v in stores:
            if not v.endswith("@"):
                b.write(v, b.registers[f"={v}"])


def merge_program(
    b: Builder,
    linears: Sequence[int],
    epilogue: Sequence[int],
    stores: Sequence[str],
    partial: Mapping[int, str],
    splits: int,
) -> None:
    """The sum of a tile's partial sums, and the epilogue."""
    nodes = b.section.nodes
    for i in linears:
        parts = [b.read(f"{partial[i]}.{j}", "m", "n") for j in range(splits)]
        b.emit("sum", b.register(nodes[i].output), parts)
    run_nodes(b, epilogue, "n")
    for v in stores:
        if not v.endswith("@"):
            b.write(v, b.registers[f"={v}"])


def attention_program(b: Builder, prologue: Sequence[int], node: Node, partial: str | None) -> None:
    """A stretch of the cache for the query heads of one cache head."""
    if node.attr("latent"):
        latent_program(b, node, partial)
        return
    run_nodes(b, prologue, "q")
    q = b.value(node.inputs[0], "m", "q")
    k, v = (b.read(c, "cache", "keys", f"cache{i}") for i, c in enumerate(node.attr("caches")))
    past = b.read("past_length", "all", "all")
    a = node.attrs
    numbers = [
        a["dim"],
        a["value_dim"],
        a["heads"] // a["kv_heads"],
        b.tokens,
        a["window"],
        a["scale"],
        a["softcap"],
    ]
    out, stats = b.register(node.output), b.register(f"{node.output}.stats")
    slopes = [] if a["slopes"] is None else [b.read(vector_name(a["slopes"]), "all", "groups")]
    b.emit("attend", out, stats, q, k, v, past, *numbers, *slopes)
    if partial is None:
        sinks = None if a["sinks"] is None else b.read(vector_name(a["sinks"]), "all", "groups")
        b.emit("finish", out, out, stats, sinks)
        b.write(node.output, out)
    else:
        b.write(f"{partial}.sum", out)
        b.write(f"{partial}.stats", stats, "m", "stats")


def latent_program(b: Builder, node: Node, partial: str | None) -> None:
    """A stretch of the cache of latent rows for a part of the heads: queries in two parts, values are the
    first cache's rows."""
    heads = node.attr("heads") // head_parts(node.attr("heads"), node.attr("value_dim"))
    whole = heads * node.attr("value_dim")
    widths = (whole, heads * (node.attr("dim") - node.attr("value_dim")))
    parts = [f"head:{w}:{whole}" if heads < node.attr("heads") else "all" for w in widths]
    q, rotated = (b.value(v, "m", c) for v, c in zip(node.inputs[:2], parts, strict=True))
    latent, key = (b.read(c, "cache", "keys", f"cache{i}") for i, c in enumerate(node.attr("caches")))
    past = b.read("past_length", "all", "all")
    a = node.attrs
    out, stats = b.register(node.output), b.register(f"{node.output}.stats")
    b.emit("attend_latent", out, stats, q, latent, key, past, a["dim"], a["value_dim"], heads, b.tokens,
           a["window"], a["scale"], a["softcap"], rotated)  # fmt: skip
    if partial is None:
        b.emit("finish", out, out, stats, None)
        b.write(node.output, out)
    else:
        b.write(f"{partial}.sum", out)
        b.write(f"{partial}.stats", stats, "m", "stats")


def attention_merge_program(b: Builder, node: Node, partial: str, splits: int) -> None:
    """The exact merge of all stretches (see flash)."""
    parts = [b.read(f"{partial}.{j}.sum", "m", "n") for j in range(splits)]
    stats = [b.read(f"{partial}.{j}.stats", "m", "stats") for j in range(splits)]
    out, total = b.register(node.output), b.register(f"{node.output}.stats")
    b.emit("merge", out, total, parts, stats)
    a = node.attrs
    sinks = None if a["sinks"] is None else b.read(vector_name(a["sinks"]), "all", "groups")
    b.emit("finish", out, out, total, sinks)
    b.write(node.output, out)


def reduce_program(
    b: Builder, source: str, output: str, chips: range, epilogue: Sequence[int], stores: Sequence[str], c: str
) -> None:
    """The sum over chips in their order, and the epilogue, on columns c."""
    b.emit("sum", b.register(output), [b.read(source, "m", c, chip=chip) for chip in chips])
    run_nodes(b, epilogue, c)
    for v in stores:
        b.write(v, b.registers[f"={v}"], "m", c)


def gather_program(b: Builder, source: str, output: str, chips: range, epilogue: Sequence[int],
                   stores: Sequence[str], share: int) -> None:  # fmt: skip
    """All chips' columns side by side, and the epilogue: of whole values, or of the `share` columns of each
    chip in turn."""
    columns: list[Columns] = [[c * share, (c + 1) * share] if share else "all" for c in range(len(chips))]
    parts = [b.read(source, "m", c, chip=chip) for chip, c in zip(chips, columns, strict=True)]
    b.emit("concat", b.register(output), parts)
    run_nodes(b, epilogue, "all")
    for v in stores:
        b.write(v, b.registers[f"={v}"], "m", "all")
