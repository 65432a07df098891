"""Kernels: a group of nodes as one kernel with its lanes, what enters and leaves it, its tile and its time.

This is the typed plan that lowering, the model and code emission share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapper_gpu import experts, flash, product
from mapper_gpu.collective import Collective, allgather, allreduce, exchange
from mapper_gpu.experts import ExpertTile, Grouped
from mapper_gpu.flash import Attention, Split
from mapper_gpu.fuse import Group, fuse
from mapper_gpu.hardware import COMPUTE, ENGINES, Gpu, element_bytes
from mapper_gpu.nodes import EXCHANGES, HEADS, HEAVY, Node, Section, Value
from mapper_gpu.packed import OPERATIONS
from mapper_gpu.product import Lane, Low, Product, Tile, Timed
from mapper_gpu.timing import grid_seconds

if TYPE_CHECKING:
    from mapper_gpu.nodes import Matrix

NORM_OPERATIONS = 4.0
"""Operations per element of a normalisation."""
POINT_OPERATIONS = 8.0
"""Operations per element of other row work, an exponential counted as several."""
HEADS_NEAR = 1.05
"""A matrix per head is so small that its kernel is mostly latency: few tiles are as good as many."""
ROWS_TILE = 8
"""Tokens of a row task at most; fewer where SMs would idle."""


@dataclass(frozen=True)
class Branch:
    """A lane of a product kernel: its linears (node numbers), its epilogue nodes in order, what it stores."""

    linears: tuple[int, ...]
    nodes: tuple[int, ...]
    stores: tuple[str, ...]
    lane: Lane


@dataclass(frozen=True)
class Kernel:
    """One fused kernel. `nodes` are numbers of the section's nodes. `reads` are values from outside,
    `stores` those that it leaves in memory; `tile` is set for products, `split` for attention, `rows`
    (tokens per task) for the others, `collective` for collectives, `grouped` and `expert_tile` for experts.
    `timed.seconds` does not hold the launch
    gap."""

    name: str
    kind: str
    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    stores: tuple[str, ...]
    weights: tuple[Matrix, ...]
    timed: Timed
    prologue: tuple[int, ...] = ()
    branches: tuple[Branch, ...] = ()
    tile: Tile | None = None
    split: Split | None = None
    attention: Attention | None = None
    rows: int = 0
    collective: Collective | None = None
    grouped: Grouped | None = None
    expert_tile: ExpertTile | None = None


def kernels_of(gpu: Gpu, section: Section, chips: int = 1) -> tuple[Kernel, ...]:
    """The section cut into kernels, in order, each with the tile that takes least time."""
    groups = fuse(section, lambda kind, nodes: cost(gpu, section, kind, nodes))
    return tuple(make(gpu, section, group, chips) for group in groups)


def outside(section: Section, nodes: Sequence[int]) -> tuple[str, ...]:
    """Values that nodes read and do not make, in order of first use."""
    made = {section.nodes[i].output for i in nodes}
    found = [v for i in nodes for v in section.nodes[i].inputs if v not in made]
    return tuple(dict.fromkeys(found))


def stored(section: Section, nodes: Sequence[int]) -> tuple[str, ...]:
    """Values that nodes make and others, or the section's outputs, need."""
    inside = set(nodes)
    needed = {v for i, n in enumerate(section.nodes) if i not in inside for v in n.inputs}
    return tuple(
        section.nodes[i].output for i in nodes
        if section.nodes[i].output in needed or section.nodes[i].output in section.outputs
    )  # fmt: skip


def moved_bytes(section: Section, nodes: Sequence[int]) -> float:
    """HBM bytes of a kernel: weights, values that enter and that it stores; a cache counts what is
    touched."""
    total = sum(w.bytes for i in nodes for w in section.nodes[i].weights if section.nodes[i].kind != "embed")
    names = (*outside(section, nodes), *stored(section, nodes))
    for name in names:
        value = section.values[name]
        total += 0.0 if value.state else value.bytes
    return total


def cost(gpu: Gpu, section: Section, kind: str, nodes: tuple[int, ...]) -> float:
    """What the cut into kernels is chosen by: bytes at the stream rate, a launch, and the rows that column
    tiles of a product read and normalise again each."""
    launch = gpu.gap + gpu.start + gpu.hbm_latency + gpu.l2_latency
    again = 0.0
    if kind == "route":
        return gpu.gap + _routed(gpu, section, nodes).seconds
    if kind == "product":
        heavy = [section.nodes[i] for i in nodes if section.nodes[i].kind == "linear"]
        before = [i for i in nodes if section.nodes[i].kind in ("norm", "embed")]
        x = section.values[heavy[0].inputs[0]]
        tasks = sum(w.n for n in heavy for w in n.weights[:1]) / 128 * max(1.0, x.rows / 256)
        if before:
            again = tasks * min(x.rows, 256) * x.width * NORM_OPERATIONS / gpu.vector
    return launch + moved_bytes(section, nodes) / gpu.stream + again


def make(gpu: Gpu, section: Section, group: Group, chips: int = 1) -> Kernel:
    """The kernel of a group with its best tile."""
    nodes = group.nodes
    weights = tuple(w for i in nodes for w in section.nodes[i].weights)
    reads, stores = outside(section, nodes), stored(section, nodes)
    head = [section.nodes[i].kind for i in nodes if section.nodes[i].kind in HEAVY]
    name = "+".join(dict.fromkeys(section.nodes[i].attr("name", section.nodes[i].kind) for i in nodes))
    if group.kind == "product":
        return _product(gpu, section, name, nodes, reads, stores, weights)
    if group.kind == "attention":
        i = next(i for i in nodes if section.nodes[i].kind == "attention")
        attention = attention_of(section.nodes[i])
        split, timed = flash.choose(gpu, attention)
        return Kernel(
            name, group.kind, nodes, reads, stores, weights, timed, split=split, attention=attention
        )
    if group.kind == "collective":
        node = next(section.nodes[i] for i in nodes if section.nodes[i].kind == head[0])
        size, far = section.values[node.output].bytes, moved_bytes(section, nodes)
        if node.kind in EXCHANGES:
            size, far = _exchanged(section, node, far)
            made = exchange(gpu, node.attr("replicas"), node.attr("stride"), size)
        else:
            made = (allreduce if node.kind == "allreduce" else allgather)(gpu, chips, size)
        seconds = made.seconds + far / gpu.stream
        timed = Timed(seconds, 1, far, made.bytes, 0.0, 0.0, "link")
        return Kernel(name, group.kind, nodes, reads, stores, weights, timed, collective=made)
    if group.kind == "experts":
        grouped = grouped_of(section, section.nodes[nodes[0]])
        chosen, timed = experts.choose(gpu, grouped)
        return Kernel(name, group.kind, nodes, reads, stores, weights, timed, grouped=grouped,
                      expert_tile=chosen)  # fmt: skip
    if group.kind == "route":
        timed = _routed(gpu, section, nodes)
        return Kernel(name, group.kind, nodes, reads, stores, weights, timed)
    return _rows(gpu, section, group.kind, name, nodes, reads, stores, weights)


def _exchanged(section: Section, node: Node, whole: float) -> tuple[float, float]:
    """(bytes that come to a chip from all replicas, its own included; those of them and what becomes of them
    through HBM) of an exchange. Of the rows of experts those count that the fullest chip has."""
    value, how = section.values[node.output], node.attr("routing")
    if node.kind == "exchange":
        return value.bytes, whole
    moved = section.values[node.inputs[0]]  # as the other replica holds it, whatever becomes of it here
    size = how.fullest * moved.width * element_bytes(moved.dtype)
    made = how.fullest * value.width * element_bytes(value.dtype) if node.kind == "dispatch" else value.bytes
    return size, size + made


def grouped_of(section: Section, node: Node) -> Grouped:
    """The product of experts that a node asks for."""
    w, x, y = node.weights[0], section.values[node.inputs[0]], section.values[node.output]
    return Grouped(
        node.attr("routing"), w.n, w.k, len(node.weights), w.element, element_bytes(x.dtype),
        element_bytes(y.dtype), COMPUTE[w.dtype], _low(node.weights),
    )  # fmt: skip


def _routed(gpu: Gpu, section: Section, nodes: Sequence[int]) -> Timed:
    """Routing of all tokens on one SM: a pass over the scores per chosen expert, and a sort of the pairs by
    counting, then by prefix sums."""
    work = moved = 0.0
    for i in nodes:
        node = section.nodes[i]
        x, y = section.values[node.inputs[0]], section.values[node.output]
        moved += x.bytes + y.bytes
        passes = node.attr("chosen") if node.kind == "top_k" else 2
        work += POINT_OPERATIONS * (x.rows * x.width * passes + y.rows * y.width)
    engine = ENGINES.index("vector")
    body = grid_seconds(gpu, 1, 0.0, moved, work, engine)
    lead = gpu.start + gpu.hbm_latency + gpu.l2_latency
    return Timed(lead + body, 1, 0.0, moved, work, 0.0, "latency" if lead > body else "arithmetic")


def attention_of(node: Node) -> Attention:
    """The attention of a node, from its attributes."""
    a = node.attrs
    return Attention(
        batch=a["batch"],
        heads=a["heads"],
        kv_heads=flash.head_parts(a["heads"], a["value_dim"]) if a.get("shared") else a["kv_heads"],
        dim=a["dim"],
        value_dim=a["value_dim"],
        tokens=a["tokens"],
        past=a["past"],
        length=a["length"],
        element=a["element"],
        engine=a["engine"],
        window=a.get("window", 0),
        chunk=a.get("chunk", 0),
        shared=a.get("shared", False),
    )


def branches_of(section: Section, nodes: Sequence[int]) -> tuple[tuple[int, ...], tuple[Branch, ...]]:
    """(prologue nodes, lanes) of a product group. Linears whose results meet in an epilogue share a lane."""
    linears = [i for i in nodes if section.nodes[i].kind == "linear"]
    owner: dict[str, set[int]] = {section.nodes[i].output: {i} for i in linears}
    behind: list[int] = []
    for i in nodes:
        node = section.nodes[i]
        meet = set().union(*(owner.get(v, set()) for v in node.inputs))
        if i in linears or not meet:
            continue
        behind.append(i)
        joined = set().union(*(s for s in owner.values() if s & meet))
        owner[node.output] = meet
        for name in owner:
            if owner[name] & joined:
                owner[name] = joined
    prologue = tuple(i for i in nodes if i not in linears and i not in behind)
    found: list[Branch] = []
    out = set(stored(section, nodes))
    for i in linears:
        mine = owner[section.nodes[i].output]
        if min(mine) != i:
            continue
        lane_nodes = tuple(j for j in behind if owner[section.nodes[j].output] & mine)
        made = [section.nodes[j].output for j in (*sorted(mine), *lane_nodes)]
        heads = [section.values[section.nodes[j].inputs[0]].head for j in lane_nodes
                 if section.nodes[j].kind in HEADS]  # fmt: skip
        n = section.nodes[i].weights[0].n // section.nodes[i].attr("heads", 1)
        lane = Lane(n, len(mine), max([1, *heads]))
        found.append(Branch(tuple(sorted(mine)), lane_nodes, tuple(v for v in made if v in out), lane))
    return prologue, tuple(found)


def product_of(section: Section, nodes: Sequence[int]) -> Product:
    """The product that a group asks for."""
    prologue, branches = branches_of(section, nodes)
    first = section.nodes[branches[0].linears[0]]
    w, x = first.weights[0], section.values[first.inputs[0]]
    inner = {x_ for i in prologue for x_ in section.nodes[i].inputs}
    entering = [section.values[v] for v in outside(section, nodes) if v in inner] or [x]
    extra = sum(
        section.values[v].bytes for v in outside(section, nodes)
        if v not in inner and v != first.inputs[0] and not section.values[v].state
    )  # fmt: skip
    outs = [section.values[v] for b in branches for v in b.stores]
    width = sum(b.lane.n for b in branches)
    out = sum(element_bytes(v.dtype) * v.width for v in outs if not v.state) / max(1, width)
    norms = sum(section.nodes[i].kind in ("norm", "embed") for i in prologue)
    return Product(
        rows=first.attr("rows", x.rows), k=w.k, lanes=tuple(b.lane for b in branches),
        element=element_bytes(w.dtype), operand=element_bytes(entering[0].dtype), engine=COMPUTE[w.dtype],
        groups=w.count * first.attr("heads", 1), out=out, extra=extra, prologue=norms * NORM_OPERATIONS,
        whole_rows=bool(norms), low=_low([section.nodes[i].weights[0] for b in branches for i in b.linears]),
    )  # fmt: skip


def _low(weights: Sequence[Matrix]) -> Low | None:
    """What a product has to know of weights that are stored in low bits; those of different formats are
    taken at their mean."""
    packed = [w.low for w in weights if w.low is not None]
    if not packed:
        return None
    elements = sum(w.n * w.k for w in weights)
    coded = sum(w.n * w.k for w in weights if w.low is not None)
    return Low(
        element=sum(w.n * w.k * w.element for w in weights) / elements,
        grain=math.lcm(*(p.grain for p in packed)),
        block=max(p.block for p in packed),
        unpack=OPERATIONS * coded / elements,
    )


def _product(
    gpu: Gpu, section: Section, name: str, nodes: tuple[int, ...], reads: tuple[str, ...],
    stores: tuple[str, ...], weights: tuple[Matrix, ...],
) -> Kernel:  # fmt: skip
    prologue, branches = branches_of(section, nodes)
    heads = section.nodes[branches[0].linears[0]].attr("heads")
    near = HEADS_NEAR if heads else product.NEAR
    tile, timed = product.choose(gpu, product_of(section, nodes), near)
    return Kernel(name, "product", nodes, reads, stores, weights, timed, prologue, branches, tile)


def rows_per_task(gpu: Gpu, rows: int) -> int:
    """Tokens of a row task: one where there are SMs enough, at most ROWS_TILE."""
    return max(1, min(ROWS_TILE, rows // gpu.sms))


def _rows(
    gpu: Gpu, section: Section, kind: str, name: str, nodes: tuple[int, ...], reads: tuple[str, ...],
    stores: tuple[str, ...], weights: tuple[Matrix, ...],
) -> Kernel:  # fmt: skip
    values: Mapping[str, Value] = section.values
    rows = max(values[section.nodes[i].output].rows for i in nodes)
    each = rows_per_task(gpu, rows)
    tasks = -(-rows // each) if kind == "rows" else _sequences(section) * max(
        values[v].width // max(1, values[v].head) for i in nodes for v in section.nodes[i].inputs
    )  # fmt: skip
    moved = sum(_touched(section, nodes, v) for v in (*reads, *stores) if not values[v].state)
    moved += sum(values[section.nodes[i].output].bytes for i in nodes if section.nodes[i].kind == "embed")
    made = (
        section.nodes[i].inputs[0] if section.nodes[i].kind == "append" else section.nodes[i].output
        for i in nodes
    )
    elements = sum(values[v].rows * values[v].width for v in made)
    work = POINT_OPERATIONS * elements
    far = moved if moved > 0.5 * gpu.l2 else 0.0
    engine = ENGINES.index("vector")
    body = grid_seconds(gpu, tasks, far / tasks, (moved - far) / tasks, work / tasks, engine)
    lead = gpu.start + gpu.hbm_latency + gpu.l2_latency
    limit = "latency" if lead > body else "L2"
    timed = Timed(lead + body, tasks, far, moved - far, work, 0.0, limit)
    return Kernel(name, kind, nodes, reads, stores, weights, timed, rows=each)


def _touched(section: Section, nodes: Sequence[int], name: str) -> float:
    """Bytes of a value that row work reads or writes: of the rows of experts those that tokens chose."""
    value = section.values[name]
    summed = next((section.nodes[i] for i in nodes if section.nodes[i].kind == "weighted_sum"), None)
    if summed is None or summed.inputs[0] != name:
        return value.bytes
    return value.bytes * min(1.0, float(summed.attr("pairs")) / value.rows)


def _sequences(section: Section) -> int:
    return next((int(n.attr("batch")) for n in section.nodes if n.kind == "attention"), 1)
