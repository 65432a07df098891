"""Fusion: the cheapest cut of a section into kernels, by dynamic programming over convex sets of nodes.

A state is a down-closed set of nodes that are done; a step adds a set that one kernel can do and whose
operands are done. Every such set is convex: no path leaves it and comes back. The cost of a kernel is its
HBM bytes at the stream rate plus its launch. A kernel has one shape of reduction:

    product     linears of the same x; before them row and point nodes on x, which every task repeats; behind
                them point and head nodes on their columns; or one linear with a matrix per head
    attention   one attention, with head nodes on its queries
    collective  one all-reduce, all-gather or exchange between replicas, with point nodes behind it
    experts     one product of the chosen experts, with what is done inside of it
    route       routing of all tokens at once: one task
    heads       point and head nodes of one width with an append, by sequence and head
    rows        anything else without a heavy node: row by row

An append writes rows that only the data names, so a product may hold it only where one tile takes all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mapper_gpu.nodes import EXCHANGES, EXPERTS, HEADS, HEAVY, POINTS, ROUTES, ROWS, Node, Section

Cost = Callable[[str, tuple[int, ...]], float]
"""(kind of kernel, its nodes) -> seconds."""


ONE_TILE = 64
"""Rows that a product's tile always takes whole (see product.candidates)."""

WIDEST_HEAD = 256
"""Columns of a head that an epilogue may need whole: the widest tile."""


@dataclass(frozen=True)
class Group:
    """Nodes of one kernel in topological order, and the kernel's kind."""

    kind: str
    nodes: tuple[int, ...]


class Dag:
    """Producers and consumers of a section's nodes as bit sets."""

    def __init__(self, section: Section) -> None:
        self.nodes: Sequence[Node] = section.nodes
        self.outputs = section.outputs
        self.widths = {name: value.width for name, value in section.values.items()}
        self.heads = [
            max((section.values[v].head for v in n.inputs), default=0) if n.kind in HEADS else 0
            for n in section.nodes
        ]
        self.rows = max((section.values[v].rows for n in section.nodes for v in n.inputs
                         if not section.values[v].state), default=0)  # fmt: skip
        maker = {n.output: i for i, n in enumerate(section.nodes)}
        self.before = [0] * len(self.nodes)
        self.after = [0] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            for name in node.inputs:
                if name in maker:
                    self.before[i] |= 1 << maker[name]
                    self.after[maker[name]] |= 1 << i
        self.above = [0] * len(self.nodes)
        for i in range(len(self.nodes)):
            for j in bits(self.before[i]):
                self.above[i] |= self.above[j] | 1 << j

    def escapes(self, i: int, group: int) -> bool:
        """Whether node i's result is needed outside of the group."""
        return bool(self.after[i] & ~group) or self.nodes[i].output in self.outputs


def bits(mask: int) -> Iterator[int]:
    """Positions of the ones, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def kernel_kind(dag: Dag, group: int, final: bool) -> str | None:
    """The kind of kernel that can do the group, or None; not `final`: whether it may grow into one."""
    members = list(bits(group))
    heavy = [i for i in members if dag.nodes[i].kind in HEAVY]
    if not heavy:
        return _light(dag, members)
    kinds = {dag.nodes[i].kind for i in heavy}
    if len(kinds) != 1:
        return None
    kind = next(iter(kinds))
    up = down = 0
    for i in members:
        if any(dag.above[h] >> i & 1 for h in heavy):
            up |= 1 << i
        if any(dag.above[i] >> h & 1 for h in heavy):
            down |= 1 << i
    if up & down or group & ~(up | down | sum(1 << h for h in heavy)):
        return None
    if final and any(dag.escapes(i, group) for i in bits(up)):
        return None
    above = {dag.nodes[i].kind for i in bits(up)}
    below = {dag.nodes[i].kind for i in bits(down)}
    if kind == "linear":
        same = len({(dag.nodes[h].inputs[0], dag.nodes[h].attr("groups", 1)) for h in heavy}) == 1
        legal = above <= {*ROWS, *POINTS} and below <= {*POINTS, *HEADS} and same
        legal = legal and not (dag.nodes[heavy[0]].attr("heads") and (above or below or len(heavy) > 1))
        legal = legal and ("append" not in below or dag.rows <= ONE_TILE)
        legal = legal and all(dag.heads[i] <= WIDEST_HEAD for i in bits(down))
        return "product" if legal and not down & sum(1 << h for h in heavy) else None
    if len(heavy) != 1:
        return None
    if kind in EXPERTS:
        return "experts" if len(members) == 1 else None
    if kind == "attention":
        legal = above <= {"rope", "head_norm", "point"} and not below
        legal = legal and not (above and dag.nodes[heavy[0]].attr("latent"))
        return "attention" if legal else None
    if kind in EXCHANGES and kind != "collect" and below:
        return None
    return "collective" if not above and below <= set(POINTS) else None


def _light(dag: Dag, members: Sequence[int]) -> str | None:
    kinds = {dag.nodes[i].kind for i in members}
    if kinds & set(ROUTES[1:]):
        return "route" if kinds <= set(ROUTES) else None
    if "append" not in kinds:
        return "rows"
    widths = {dag.widths[v] for i in members for v in dag.nodes[i].inputs}
    return "heads" if kinds <= {*HEADS, *POINTS} and len(widths) == 1 else None


def _absorb(dag: Dag, done: int, group: int) -> int:
    """The group with all epilogue nodes that need nothing else: they never cost bytes or launches."""
    grown = True
    while grown:
        grown = False
        for i, node in enumerate(dag.nodes):
            bit = 1 << i
            if (done | group) & bit or node.kind not in (*POINTS, *HEADS):
                continue
            if not dag.before[i] & group or dag.before[i] & ~(done | group):
                continue
            if kernel_kind(dag, group | bit, False) not in (None, "rows", "heads"):
                group |= bit
                grown = True
    return group


def _groups(dag: Dag, done: int) -> list[tuple[str, int]]:
    """All kernels that can come next."""
    found: dict[int, str] = {}
    count = len(dag.nodes)
    ready = [i for i in range(count) if not done >> i & 1 and not dag.before[i] & ~done]
    pending = [1 << i for i in ready]
    seen = set(pending)
    while pending:
        group = pending.pop()
        if kernel_kind(dag, group, False) is None:
            continue
        if any(dag.nodes[i].kind in HEAVY for i in bits(group)):
            group = _absorb(dag, done, group)
        kind = kernel_kind(dag, group, True)
        if kind is not None:
            found[group] = kind
        for i in range(count):
            bit = 1 << i
            if (done | group) & bit or dag.before[i] & ~(done | group):
                continue
            near = dag.before[i] & group or any(
                set(dag.nodes[i].inputs) & set(dag.nodes[j].inputs) for j in bits(group)
            )
            if near and group | bit not in seen:
                seen.add(group | bit)
                pending.append(group | bit)
    return [(kind, group) for group, kind in found.items()]


def fuse(section: Section, cost: Cost) -> list[Group]:
    """The cheapest cut. Ties go to the cut that was found first, in the order of the nodes."""
    dag = Dag(section)
    every = (1 << len(dag.nodes)) - 1
    best: dict[int, tuple[float, int, str, int]] = {0: (0.0, 0, "", 0)}
    waiting: dict[int, set[int]] = {0: {0}}
    known: dict[int, float] = {}
    for size in range(len(dag.nodes) + 1):
        for done in sorted(waiting.pop(size, ())):
            spent = best[done][0]
            for kind, group in _groups(dag, done):
                if group not in known:
                    known[group] = cost(kind, tuple(bits(group)))
                after, total = done | group, spent + known[group]
                if after not in best or total < best[after][0] - 1e-15:
                    best[after] = (total, done, kind, group)
                waiting.setdefault(after.bit_count(), set()).add(after)
    cut: list[Group] = []
    state = every
    while state:
        _, before, kind, group = best[state]
        cut.append(Group(kind, tuple(bits(group))))
        state = before
    return cut[::-1]
