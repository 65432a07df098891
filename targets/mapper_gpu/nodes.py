"""What is mapped: a layer as a few kinds of nodes over two-dimensional values [tokens, columns].

Heads are groups of columns, so that reshapes and transposes of the graph are no nodes. The rows of a value
are token b * S + s. A Section is a stretch of nodes that runs `count` times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mapper_gpu.hardware import element_bytes
from mapper_gpu.packed import Packed

EXPERTS = ("expert_up", "expert_down")
"""Products of the experts that tokens chose (see extract_moe)."""
EXCHANGES = ("exchange", "dispatch", "collect")
"""What passes between replicas that share experts: all tokens' routing; their rows to the chips of the
experts that they chose; what these made of them, back."""
HEAVY = ("linear", "attention", "allreduce", "allgather", *EXCHANGES, *EXPERTS)
"""Kinds that shape a kernel: at most one kind of them in it."""
ROWS = ("embed", "positions", "norm")
"""Kinds that need, or make, whole rows."""
HEADS = ("head_norm", "rope", "append")
"""Kinds that need whole heads."""
ROUTES = ("top_k", "align", "places")
"""Kinds that say which expert takes which rows; all but the first need all rows at once."""
POINTS = ("point", "gate", "route", "combine")
"""Kinds that work element by element (`route` and `combine`: token by token)."""


@dataclass(frozen=True)
class Value:
    """A value [rows, width] of elements `dtype`. `head` columns make one head; `state` names the cache that
    it is (rows then count positions of one sequence, and the value holds all sequences)."""

    rows: int
    width: int
    dtype: str
    head: int = 0
    state: str = ""

    @property
    def bytes(self) -> float:
        """Size."""
        return self.rows * self.width * element_bytes(self.dtype)


@dataclass(frozen=True)
class Pick:
    """Rows of a stored weight in another order: of every `stride` rows those at the places `inner`."""

    stride: int
    inner: tuple[int, ...]

    @property
    def label(self) -> str:
        """The places in short: what is picked starts somewhere else each time."""
        return f"{self.inner[0]}+{len(self.inner)} of {self.stride}"


@dataclass(frozen=True)
class Matrix:
    """A weight [n, k] (rows are outputs), `count` of which are read of `total` stored (experts, heads).

    `split` is the axis that tensor parallelism cuts: "n", "k" or "" for a copy on every chip; `copies` chips
    in a row hold the same part. With `owners` the experts are shared out, `total` to each of `owners` groups
    of chips of which `inside` are in one replica.
    `first` and `of` say that these are rows first .. first + n of a stored
    weight of `of` rows (0: all of it); `pick` that they are rows of all of it in another order,
    and `flipped` that each group of these is transposed, to as many rows. `low` says how it is stored in low
    bits; `dtype` is then what products are computed in.
    """

    name: str
    n: int
    k: int
    dtype: str
    count: int = 1
    total: int = 1
    split: str = ""
    first: int = 0
    of: int = 0
    turned: bool = False
    copies: int = 1
    pick: Pick | None = None
    flipped: int = 0
    low: Packed | None = None
    owners: int = 1
    inside: int = 1

    @property
    def label(self) -> str:
        """Its name, with the first row where it is a part."""
        if self.pick is not None:
            return f"{self.name}[{self.pick.label}]"
        return f"{self.name}[{self.first}]" if self.of else self.name

    @property
    def element(self) -> float:
        """Bytes of an element as stored, with its share of scales and zero points."""
        return element_bytes(self.dtype) if self.low is None else self.low.row_bytes(self.k) / self.k

    @property
    def bytes(self) -> float:
        """Bytes that a step reads."""
        return float(self.count * self.n * self.k * self.element)

    @property
    def stored(self) -> float:
        """Bytes that it takes in memory."""
        return float(self.total * self.n * self.k * self.element)


@dataclass(frozen=True)
class Node:
    """One op on values: names of its inputs, of its result, its weights, and its attributes.

    `op` is the row of the schedule's ops table that it is part of.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    weights: tuple[Matrix, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    op: int = -1

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attrs.get(name, default)


@dataclass(frozen=True)
class Section:
    """Nodes in topological order that run `count` times; values by name. `carried` maps the value that enters
    a repetition to the one that leaves it; `outputs` are needed after the section."""

    name: str
    count: int
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    outputs: frozenset[str]
    carried: Mapping[str, str] = field(default_factory=dict)


def flops(node: Node, values: Mapping[str, Value]) -> float:
    """Operations of the products of a node on one chip (a multiply-add counts two)."""
    if node.kind == "linear":
        w = node.weights[0]
        return float(2.0 * node.attr("rows", values[node.inputs[0]].rows) * w.count * w.n * w.k)
    if node.kind == "attention":
        a = node.attrs
        return float(2.0 * a["batch"] * a["heads"] * a["pairs"] * (a["dim"] + a["value_dim"]))
    return 0.0
