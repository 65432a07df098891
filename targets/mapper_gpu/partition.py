"""Tensor parallelism: which weights are cut, along which axis, and where partial sums are added.

A linear whose columns only meet column-wise work and then feed an attention or another linear gives each
chip its columns (heads); a linear of such cut columns is cut along K and leaves partial sums, which an
all-reduce adds, once what is linear is done. Experts likewise: each chip has some inner columns of each, so
that chips are equally busy whichever experts the tokens choose. The last matrix is cut by vocabulary and its
columns are gathered. All else is done on every chip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mapper.errors import LoweringError
from mapper_gpu.degrees import Degrees
from mapper_gpu.extractor import Extracted, Program
from mapper_gpu.nodes import EXPERTS, HEADS, POINTS, Matrix, Node, Section, Value
from mapper_gpu.partition_experts import own_experts

COLUMNS = (*POINTS, *HEADS, "linear", "attention")
"""Kinds that can do with some columns of their inputs."""


def partition(program: Program, degrees: Degrees) -> Program:
    """One chip's part of a program: every chip's is the same but for the weights and caches it holds.

    Raises LoweringError where heads, columns or experts do not divide."""
    if degrees.expert > 1 and not any(n.kind in EXPERTS for e in program.sections for n in e.section.nodes):
        raise LoweringError(f"gpu: ep={degrees.expert} of a model without experts")
    program = replace(program, sections=tuple(own_experts(e, degrees) for e in program.sections))
    if degrees.tensor == 1:
        return program
    sections = tuple(_section(e, degrees.tensor, program.logits) for e in program.sections)
    logits = program.logits
    made = {n.output for e in sections for n in e.section.nodes}
    if f"{logits}.whole" in made:
        logits = f"{logits}.whole"
    return replace(program, sections=sections, logits=logits)


@dataclass
class _Part:
    """One chip's part of a section while it is made. `sharded` values have the chip's columns, `partial` ones
    are what all chips' add up to; `renamed` maps these to their sums, where these are made."""

    chips: int
    values: dict[str, Value]
    copies: int
    cached: set[str]
    cut: set[int]
    whole_cache: bool
    made: list[Node] = field(default_factory=list)
    sharded: set[str] = field(default_factory=set)
    partial: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def whole(self, name: str) -> str:
        """A value with the sum of all chips' parts: an all-reduce where there was none yet. What is linear is
        done on the parts, so that one sum does for all of it."""
        if name in self.partial and name not in self.renamed:
            total = f"{name}.sum"
            self.values[total] = self.values[name]
            self.values[name] = replace(self.values[name], dtype="f32")
            self.renamed[name] = total
            node = Node("allreduce", (name,), total, (), {"name": "allreduce"}, self.partial[name])
            self.made.append(node)
        return self.renamed.get(name, name)

    def add(self, i: int, node: Node) -> None:
        """One node of the section."""
        if self._linear(node):
            self.partial[node.output] = node.op
            self.made.append(node)
            return
        node = replace(node, inputs=tuple(self.whole(v) for v in node.inputs))
        sharded = [v for v in node.inputs if v in self.sharded]
        w = node.weights[0] if node.weights else None
        if node.kind == "linear" and node.attr("heads") and w is not None:
            heads = _part(node.attr("heads"), self.chips, node)
            mine = replace(w, n=w.n // self.chips, split="n")
            node = replace(node, weights=(mine,), attrs={**node.attrs, "heads": heads})
            self.sharded.add(node.output)
        elif node.kind == "linear" and i in self.cut and w is not None:
            same = self.copies if node.output in self.cached else 1
            n = _part(w.n * same, self.chips, node)
            node = replace(node, weights=(replace(w, n=n, split="n", copies=same),))
            self.sharded.add(node.output)
        elif node.kind in EXPERTS and w is not None and w.owners > 1:
            if node.kind == "expert_down":
                self.partial[node.output] = node.op
        elif node.kind == "expert_up":
            parts = tuple(replace(w, n=_part(w.n, self.chips, node), split="n") for w in node.weights)
            node = replace(node, weights=parts, attrs=_vectors(node.attrs, self.chips, 1))
            self.sharded.add(node.output)
        elif node.kind in ("linear", "expert_down") and sharded and w is not None:
            node = replace(node, weights=(_along_k(w, self.chips, node),))
            self.partial[node.output] = node.op
        elif node.kind == "attention":
            node = replace(node, attrs=_heads(node, self.chips))
            self.sharded.add(node.output)
        elif sharded or (node.kind == "append" and not self.whole_cache):
            self._columns(node)
            same = self.copies if node.output in self.cached else 1
            node = replace(node, attrs=_vectors(node.attrs, self.chips, same))
            self.sharded.add(node.output)
        self.made.append(node)

    def _linear(self, node: Node) -> bool:
        """Whether a node may be done on partial sums: it adds such, or weighs their rows."""
        mine = [v in self.partial and v not in self.renamed for v in node.inputs]
        if node.kind in ("weighted_sum", "collect"):
            return mine[0]
        return node.kind == "point" and node.attr("fn") == "add" and all(mine) and len(mine) == 2

    def _columns(self, node: Node) -> None:
        if node.kind not in (*POINTS, *HEADS):
            raise LoweringError(f"gpu: {node.kind} on columns that {self.chips} chips share")
        if any(v not in self.sharded for v in node.inputs):
            raise LoweringError(f"gpu: {node.kind} of whole and shared columns")


def _section(e: Extracted, chips: int, logits: str) -> Extracted:
    nodes = list(e.section.nodes)
    latent = any(n.attr("latent") for n in nodes)
    copies, cached = _copies(nodes, chips), _cached(nodes)
    cut = _cut_linears(nodes, e.section.outputs, logits)
    if latent:
        # all heads attend to the same rows, so that every chip makes and keeps all of them
        copies, cut = 1, {i for i in cut if nodes[i].output not in cached}
    part = _Part(chips, dict(e.section.values), copies, cached, cut, latent)
    for i, node in enumerate(nodes):
        part.add(i, node)
    outputs = frozenset(part.whole(v) for v in sorted(e.section.outputs))
    values, made = part.values, part.made
    if logits in part.sharded:
        whole = f"{logits}.whole"
        values[whole] = values[logits]
        made.append(Node("allgather", (logits,), whole, (), {"name": "allgather"}, made[-1].op))
        outputs = (outputs - {logits}) | {whole}
    for name in part.sharded:
        v = values[name]
        values[name] = replace(v, width=v.width * (copies if name in cached else 1) // chips)
    states = {m.attr("cache") for m in made if m.kind == "append"}
    states |= {name for m in made if m.kind == "attention" for name in m.attr("caches")}
    for name in states:
        if name in values and not latent:
            values[name] = replace(values[name], width=values[name].width * copies // chips)
    section = Section(e.section.name, e.section.count, tuple(made), values, outputs, e.section.carried)
    carries = tuple(replace(c, yielded=part.renamed.get(c.yielded, c.yielded)) for c in e.carries)
    return replace(e, section=section, carries=carries)


def _copies(nodes: list[Node], chips: int) -> int:
    """Chips that hold the same key/value head, where there are more chips than such heads."""
    heads = next((int(n.attr("kv_heads")) for n in nodes if n.kind == "attention"), chips)
    return chips // heads if chips > heads and chips % heads == 0 else 1


def _cached(nodes: list[Node]) -> set[str]:
    """Values that end in a cache."""
    found: set[str] = set()
    for n in reversed(nodes):
        if n.kind == "append" or n.output in found:
            found |= {n.output} | (set(n.inputs) if n.kind != "linear" else set())
    return found


def _part(size: int, chips: int, node: Node) -> int:
    if size % chips:
        raise LoweringError(f"gpu: {node.attr('name')}: {size} columns do not divide among {chips} chips")
    return size // chips


def _along_k(w: Matrix, chips: int, node: Node) -> Matrix:
    """A chip's columns of K, whole blocks where these share a scale."""
    k = _part(w.k, chips, node)
    if w.low is not None and k % w.low.whole:
        raise LoweringError(
            f"gpu: {node.attr('name')}: {chips} chips would cut the blocks of {w.low.block} along its "
            f"{w.k} columns"
        )
    return replace(w, k=k, split="k")


def _heads(node: Node, chips: int) -> Mapping[str, object]:
    a = dict(node.attrs)
    if chips > a["kv_heads"] and chips % a["kv_heads"] == 0 and not a.get("latent"):
        a["kv_heads"] = chips
    for name in ("heads",) if a.get("latent") else ("heads", "kv_heads"):
        if a[name] % chips:
            raise LoweringError(f"gpu: {a[name]} {name.replace('_', ' ')} do not divide among {chips} chips")
        a[name] //= chips
    for name in ("sinks", "slopes"):
        if a.get(name):
            a[name] = _vector(a[name], chips)
    return a


def _vectors(attrs: Mapping[str, object], chips: int, copies: int) -> Mapping[str, object]:
    a = dict(attrs)
    for name in ("vector", "bias0", "bias1"):
        vector = a.get(name)
        if isinstance(vector, dict) and vector.get("split") == "n":
            a[name] = _vector(vector, chips, copies)
    return a


def _vector(vector: Mapping[str, object], chips: int, copies: int = 1) -> dict[str, object]:
    length = vector["length"]
    assert isinstance(length, int)
    return {**vector, "length": length * copies // chips, "chips": chips, "copies": copies}


def _cut_linears(nodes: list[Node], outputs: frozenset[str], logits: str) -> set[int]:
    """Linears of whole rows whose columns may be cut: all that is done with them is column-wise, until an
    attention or a linear takes them."""
    users: dict[str, list[int]] = {}
    for i, n in enumerate(nodes):
        for v in n.inputs:
            users.setdefault(v, []).append(i)
    maker = {n.output: i for i, n in enumerate(nodes)}
    cut = {i for i, n in enumerate(nodes) if n.kind == "linear"}
    changed = True
    while changed:
        changed = False
        for i in sorted(cut):
            if not _columns_only(nodes, users, maker, outputs, cut, i, logits):
                cut.discard(i)
                changed = True
    return cut


def _columns_only(
    nodes: list[Node], users: dict[str, list[int]], maker: dict[str, int], outputs: frozenset[str],
    cut: set[int], linear: int, logits: str,
) -> bool:  # fmt: skip
    if nodes[linear].output == logits:
        return True
    behind = _behind(nodes, users, linear)
    reached = {nodes[linear].output} | {nodes[j].output for j in behind}
    if any(nodes[j].kind not in COLUMNS for v in reached for j in users.get(v, ())):
        return False
    mine = {nodes[j].output for j in behind} | {nodes[linear].output}
    for name in mine:
        if name in outputs and not name.endswith("@"):
            return False
        if not users.get(name) and not name.endswith("@"):
            return False
    for j in behind:
        for v in nodes[j].inputs:
            origin = _origin(nodes, maker, v)
            if origin is None or origin not in cut:
                return False
    above = _origin(nodes, maker, nodes[linear].inputs[0])
    return above is None or above not in cut


def _behind(nodes: list[Node], users: dict[str, list[int]], linear: int) -> set[int]:
    """Column-wise nodes behind a linear."""
    found: set[int] = set()
    pending = [nodes[linear].output]
    while pending:
        for j in users.get(pending.pop(), []):
            if nodes[j].kind in (*POINTS, *HEADS) and j not in found:
                found.add(j)
                pending.append(nodes[j].output)
    return found


def _origin(nodes: list[Node], maker: dict[str, int], name: str) -> int | None:
    """The linear that a value's columns come from through column-wise nodes; -1 for an attention, None for
    none."""
    while name in maker:
        node = nodes[maker[name]]
        if node.kind == "linear":
            return maker[name]
        if node.kind not in (*POINTS, *HEADS):
            return None
        name = node.inputs[0]
    return None


def stored_rows(w: Matrix, chips: int) -> int:
    """Rows of the whole weight that a chip's part belongs to."""
    return w.n * chips if w.split == "n" else w.n
