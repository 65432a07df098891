"""Which inputs are key-value caches: found from the outputs backwards, through the append to the input.

A cache is an input that new rows are joined to, or written into, to make an output. Between input, append
and output there may be views, casts, a choice of beams and the cutting out of one cache from a stack.
A layout names the axes of an input: B batch, H heads, L tokens, D width, N layers, 2 key and value, 1 none;
axes in parentheses are stored as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mapper.errors import ModelError
from mapper.frontend.net import Dims, Net, Node, Value, product
from mapper.ir.dims import ONE, Dim

WRITES = ("kv_update", "scatter_elements", "scatter_nd")
_DEPTH = 24  # views between an append and its input
Letters = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Cache:
    """One cache: the input it is (part of), the node that adds new rows, the output it becomes (part of).

    `slot` says where in a stacked input it is: one index per stacking axis. `layout` names the input's axes,
    stacking axes as "#". `grows`: new rows are joined, else written into rows that are there. `rolls`: as
    many old rows are dropped as new ones come."""

    node: Node
    source: Value
    output: str
    slot: tuple[int, ...]
    layout: Letters
    grows: bool
    rolls: bool = False
    beams: Value | None = None


@dataclass(frozen=True)
class Origin:
    """How a value comes from an input: which one, the part of it, and what its axes mean."""

    source: Value
    slot: tuple[int, ...]
    letters: Letters
    rolls: bool
    beams: Value | None = None


def find_caches(net: Net, nodes: Sequence[Node]) -> list[Cache]:
    """Every cache of a net, in the order in which `nodes` (topological) append to them."""
    order = {id(n): i for i, n in enumerate(nodes)}
    found: dict[int, Cache] = {}
    for name, value in net.outputs:
        for node in _appends(value):
            cache = None if id(node) in found else _cache(node, name)
            if cache is not None:
                found[id(node)] = cache
    return sorted(found.values(), key=lambda c: order[id(c.node)])


def flat_heads(net: Net, nodes: Sequence[Node]) -> dict[str, int]:
    """Input -> heads, of caches [B, P, H*D]: as their readers split the last axis."""
    found: dict[str, int] = {}
    flat = [c for c in find_caches(net, nodes) if c.node.outputs[0].rank == 3]
    made = {id(c.node.outputs[0]): c for c in flat}
    for node in nodes if flat else ():
        cache = made.get(id(node.inputs[0])) if node.op == "reshape" else None
        out = node.outputs[0]
        if (
            cache is None
            or out.rank != 4
            or out.dims[:2] != node.inputs[0].dims[:2]
            or not out.dims[2].is_const
        ):
            continue
        found.setdefault(cache.source.source, out.dims[2].value)
    return found


def _appends(value: Value) -> Iterator[Node]:
    """The nodes that may add rows to a cache, behind views, casts and stacking of an output."""
    stack, seen = [value], set[int]()
    while stack and len(seen) < 4096:
        here = stack.pop()
        node = here.node
        if node is None or id(here) in seen:
            continue
        seen.add(id(here))
        if node.op in ("kv_append", *WRITES) or (node.op == "concat" and origin(node.inputs[0], ("?",) * 9)):
            yield node
        elif node.op in ("reshape", "transpose", "cast", "select"):
            stack.extend(v for v in node.inputs if v.const is None)
        elif node.op == "concat" and node.attrs["axis"] <= 1:
            stack.extend(reversed(node.inputs))


def _cache(node: Node, output: str) -> Cache | None:
    letters = letters_of(node)
    past = node.inputs[0]
    found = origin(past, letters) if letters else None
    if found is None:
        return None
    grows = node.op in ("kv_append", "concat")
    return Cache(node, found.source, output, found.slot, found.letters, grows, found.rolls, found.beams)


def letters_of(node: Node) -> Letters | None:
    """What the axes of an append's result mean, None where it is none."""
    out = node.outputs[0]
    if out.dtype not in ("f32", "f16", "bf16", "f64") or out.rank not in (3, 4):
        return None
    if node.op in ("kv_append", "kv_update"):
        return ("B", "H", "L", "D")
    if node.op == "scatter_nd" or (node.op == "concat" and len(node.inputs) != 2):
        return None
    axis = node.attrs["axis"] % out.rank
    if node.op == "scatter_elements" and node.attrs["reduction"] != "none":
        return None
    if axis != out.rank - 2:
        return None
    return ("B", "H", "L", "D") if out.rank == 4 else ("B", "L", "D")


def origin(value: Value, letters: Letters) -> Origin | None:
    """The input that a value is a view or a part of; `letters` name the value's axes."""
    slot: list[int] = []
    rolls, beams = False, None
    letters = letters[: value.rank]
    for _ in range(_DEPTH):
        if value.source:
            floats = value.dtype in ("f32", "f16", "bf16", "f64") and value.rank >= 3
            return Origin(value, tuple(reversed(slot)), letters, rolls, beams) if floats else None
        node = value.node
        if node is None:
            return None
        inner = node.inputs[0] if node.inputs else None
        if node.op == "select":
            kept = [v for v in node.inputs[1:] if v.scalar != 0.0]
            inner = kept[0] if len(kept) == 1 and kept[0].dims == value.dims else None
        elif node.op == "transpose":
            moved = {p: letters[i] for i, p in enumerate(node.attrs["perm"])}
            letters = tuple(moved[i] for i in range(len(moved)))
        elif node.op == "reshape" and inner is not None:
            letters = reshaped_letters(letters, value.dims, inner.dims)
        elif node.op == "slice" and inner is not None:
            cut = _cut(node, inner, letters)
            if cut is None:
                return None
            letters, index = cut
            slot += [] if index is None else [index]
            rolls = rolls or index is None
        elif node.op == "concat":  # room for more rows
            inner = inner if len(node.inputs) == 2 and _is_zero(node.inputs[1]) else None
        elif node.op == "gather":
            beams = node.inputs[1]
            inner = inner if beams.rank == 1 and inner is not None and not inner.weight else None
        elif node.op != "cast":
            return None
        if inner is None:
            return None
        value = inner
    return None


def _is_zero(value: Value) -> bool:
    return (value.args[0] if value.op == "expand" else value).scalar == 0.0


def _cut(node: Node, inner: Value, letters: Letters) -> tuple[Letters, int | None] | None:
    """(letters, index) of a slice that takes one of a stack; index None where it drops the oldest rows."""
    attrs = node.attrs
    if len(attrs["axes"]) != 1 or attrs["steps"] != (1,):
        return None
    axis, start = attrs["axes"][0], attrs["starts"][0]
    if node.outputs[0].dims[axis] == ONE and start.is_const and inner.dims[axis].is_const:
        return (*letters[:axis], "#", *letters[axis + 1 :]), start.value
    if letters[axis] in ("L", "?") and attrs["ends"][0] == inner.dims[axis]:
        return letters, None
    return None


def reshaped_letters(letters: Letters, dims: Dims, before: Dims) -> Letters:
    """The meaning of axes `before` a reshape from those after it ("?" where they do not correspond)."""
    found: list[str] = []
    at = 0
    for place, size in enumerate(before):
        if size == ONE and (at >= len(dims) or dims[at] != ONE):
            found.append("1")
            continue
        while at < len(dims) and dims[at] == ONE != size:
            at += 1
        group = 1
        while at + group <= len(dims) and not _is_product(size, dims[at : at + group]):
            group += 1
        if at + group > len(dims):
            return (*found, *("?" for _ in before[place:]))
        name = "".join(letters[at : at + group]).replace("1", "")
        found.append(name if group == 1 else f"({name})")
        at += group
    return tuple(found)


def _is_product(size: Dim, factors: Dims) -> bool:
    try:
        return product(factors) == size
    except ModelError:  # too complex an expression
        return False
