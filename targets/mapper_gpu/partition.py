"""Tensor parallelism: which weights are cut, along which axis, and where partial sums are added.

A linear whose columns only meet column-wise work and then feed an attention or another linear gives each
chip its columns (heads); a linear of such cut columns is cut along K and leaves partial sums, which an
all-reduce adds. The last matrix is cut by vocabulary and its columns are gathered. All else is done on
every chip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mapper.errors import LoweringError
from mapper_gpu.extractor import Extracted, Program
from mapper_gpu.nodes import HEADS, POINTS, Matrix, Node, Section, Value


def partition(program: Program, chips: int) -> Program:
    """One chip's part of a program: every chip's is the same but for the weights and caches it holds.

    Raises LoweringError where heads or columns do not divide."""
    if chips == 1:
        return program
    sections = tuple(_section(e, chips, program.logits) for e in program.sections)
    logits = program.logits
    made = {n.output for e in sections for n in e.section.nodes}
    if f"{logits}.whole" in made:
        logits = f"{logits}.whole"
    return replace(program, sections=sections, logits=logits)


def _section(e: Extracted, chips: int, logits: str) -> Extracted:
    nodes = list(e.section.nodes)
    cut = _cut_linears(nodes, e.section.outputs, logits)
    copies, cached = _copies(nodes, chips), _cached(nodes)
    values: dict[str, Value] = dict(e.section.values)
    sharded: set[str] = set()
    renamed: dict[str, str] = {}
    made: list[Node] = []
    for i, node in enumerate(nodes):
        node = replace(node, inputs=tuple(renamed.get(v, v) for v in node.inputs))
        if node.kind == "linear" and i in cut:
            w, same = node.weights[0], copies if node.output in cached else 1
            n = _part(w.n * same, chips, node)
            node = replace(node, weights=(replace(w, n=n, split="n", copies=same),))
            sharded.add(node.output)
        elif node.kind == "linear" and node.inputs[0] in sharded:
            w = node.weights[0]
            node = replace(node, weights=(replace(w, k=_part(w.k, chips, node), split="k"),))
            made += [node, _sum(node, values, renamed)]
            continue
        elif node.kind == "attention":
            node = replace(node, attrs=_heads(node, chips))
            sharded.add(node.output)
        elif any(v in sharded for v in node.inputs) or node.kind == "append":
            if node.kind not in (*POINTS, *HEADS):
                raise LoweringError(f"gpu: {node.kind} on columns that {chips} chips share")
            if any(v not in sharded for v in node.inputs):
                raise LoweringError(f"gpu: {node.kind} of whole and shared columns")
            same = copies if node.output in cached else 1
            node = replace(node, attrs=_vectors(node.attrs, chips, same))
            sharded.add(node.output)
        made.append(node)
    outputs = frozenset(renamed.get(v, v) for v in e.section.outputs)
    if logits in sharded:
        whole = f"{logits}.whole"
        values[whole] = values[logits]
        made.append(Node("allgather", (logits,), whole, (), {"name": "allgather"}, made[-1].op))
        outputs = (outputs - {logits}) | {whole}
    for name in sharded:
        v = values[name]
        values[name] = replace(v, width=v.width * (copies if name in cached else 1) // chips)
    states = {m.attr("cache") for m in made if m.kind == "append"}
    states |= {name for m in made if m.kind == "attention" for name in m.attr("caches")}
    for name in states:
        if name in values:
            values[name] = replace(values[name], width=values[name].width * copies // chips)
    section = Section(e.section.name, e.section.count, tuple(made), values, outputs, e.section.carried)
    carries = tuple(replace(c, yielded=renamed.get(c.yielded, c.yielded)) for c in e.carries)
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


def _sum(node: Node, values: dict[str, Value], renamed: dict[str, str]) -> Node:
    """The all-reduce behind a linear of partial sums; later nodes read its result."""
    whole = f"{node.output}.sum"
    values[whole] = values[node.output]
    values[node.output] = replace(values[node.output], dtype="f32")
    renamed[node.output] = whole
    return Node("allreduce", (node.output,), whole, (), {"name": "allreduce"}, node.op)


def _heads(node: Node, chips: int) -> Mapping[str, object]:
    a = dict(node.attrs)
    if chips > a["kv_heads"] and chips % a["kv_heads"] == 0:
        a["kv_heads"] = chips
    for name in ("heads", "kv_heads"):
        if a[name] % chips:
            raise LoweringError(f"gpu: {a[name]} {name.replace('_', ' ')} do not divide among {chips} chips")
        a[name] //= chips
    for name in ("sinks", "slopes"):
        if a.get(name):
            a[name] = _vector(a[name], chips)
    return a


def _vectors(attrs: Mapping[str, object], chips: int, copies: int) -> Mapping[str, object]:
    a = dict(attrs)
    vector = a.get("vector")
    if isinstance(vector, dict) and vector.get("split") == "n":
        a["vector"] = _vector(vector, chips, copies)
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
            elif nodes[j].kind == "norm" and j not in found:
                found.add(j)
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
