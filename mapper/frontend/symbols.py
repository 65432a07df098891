"""One name for every size: symbols that the graph or its inputs' roles force to be equal become one.

Exporters give each input its own symbols (`s26`, `s53`); after this pass a decoder speaks of
`batch`, `sequence` and `past` alone (and `capacity`, the
rows of a cache of fixed length). Symbols of the file are tagged while equations are
solved, so that a file which itself uses the name `past` for something else cannot confuse them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mapper.errors import ModelError
from mapper.frontend.build import is_float
from mapper.frontend.caches import Cache, find_caches
from mapper.frontend.net import Net, Node, Value, tame
from mapper.ir.dims import Dim

TAG = "~"
FLAT = 64  # eliminations after which values are brought up to date
KNOWN = ("batch", "sequence", "past", "capacity")


def tags(dims: Iterable[Dim]) -> dict[str, Dim]:
    """Every symbol of some dimensions -> its tagged form."""
    return {s: Dim.symbol(TAG + s) for s in sorted({s for d in dims for s in d.symbols})}


def solve(pairs: Iterable[tuple[Dim, Dim]]) -> dict[str, Dim]:
    """A substitution that makes the sides of each pair equal, where one symbol can be eliminated for it."""
    found: dict[str, Dim] = {}  # values may hold symbols that were eliminated later
    for left, right in dict.fromkeys(pairs):
        difference = _resolved(left - right, found)
        common = math.gcd(*(c for _, c in difference.terms))
        difference = difference // common if common > 1 else difference
        chosen = _eliminable(difference) if difference.terms else None
        if chosen is None:
            continue
        found[chosen[0]] = chosen[1]
        if len(found) % FLAT == 0:
            found = _flattened(found)
    return _flattened(found)


def _resolved(dim: Dim, found: Mapping[str, Dim]) -> Dim:
    """`dim` in symbols that are not eliminated."""
    while not found.keys().isdisjoint(dim.symbols):
        dim = dim.substitute(found)
        if not tame(dim):
            raise ModelError("the sizes of the inputs depend on each other in too complex a way")
    return dim


def _flattened(found: Mapping[str, Dim]) -> dict[str, Dim]:
    """The same substitution in symbols that are not eliminated: those found last come first."""
    done: dict[str, Dim] = {}
    for symbol, value in reversed(list(found.items())):
        done[symbol] = _resolved(value, done)
    return dict(reversed(list(done.items())))


def _eliminable(difference: Dim) -> tuple[str, Dim] | None:
    """(symbol, its value) for a symbol that occurs once, with coefficient 1 or -1; file symbols first."""
    linear = [(m[0], c) for m, c in difference.terms if len(m) == 1 and isinstance(m[0], str) and abs(c) == 1]
    for symbol, sign in sorted(linear, key=lambda t: (str(t[0]) in KNOWN, str(t[0])), reverse=False):
        if not isinstance(symbol, str):
            continue
        rest = difference - Dim.symbol(symbol) * sign
        value = rest * -sign
        if symbol in rest.symbols or (symbol in KNOWN and not rest.is_const):
            continue
        if value.is_const and value.value < 1:
            continue
        return symbol, value
    return None


def equations(net: Net) -> list[tuple[Dim, Dim]]:
    """What the graph's structure says of the inputs' dimensions: tokens, caches, positions and masks."""
    batch, sequence, past = (Dim.symbol(k) for k in KNOWN[:3])
    live = net.live(v for _, v in net.outputs)
    used = {id(v) for n in live for v in n.inputs}
    caches = find_caches(net, live)
    tokens = token_inputs(net, live)
    if len(tokens) != 1 or tokens[0].rank != 2:
        return list(net.equal)
    out = [(tokens[0].dims[0], batch), (tokens[0].dims[1], sequence)]
    out += [pair for cache in caches for pair in cache_sizes(cache)]
    grows = any(c.grows and not c.rolls for c in caches)
    total = past + sequence if grows else None if caches else sequence
    sources = {id(c.source) for c in caches}
    known = solve(net.equal)
    others = [v for v in net.inputs if v.rank > 2 and is_float(v) and id(v) not in sources]
    foreign = {d.substitute(known) for v in others for d in v.dims if not d.is_const}
    for value in net.inputs:
        if id(value) in sources or value in tokens or value.rank != 2 or id(value) not in used:
            continue
        if value.dims[1].substitute(known) in foreign:
            continue  # as long as an encoder's states, or as the keys made of them
        if value.dims == tokens[0].dims:
            continue
        if _reaches(live, value, ("cos", "sin", "gather")):
            out += [(value.dims[0], batch), (value.dims[1], sequence)]
        elif value.dtype[0] != "f":
            out += [(value.dims[0], batch)]
            out += [] if total is None else [(value.dims[1], total)]
    return out + list(net.equal)


def cache_sizes(cache: Cache) -> list[tuple[Dim, Dim]]:
    """What a cache says of its input's dimensions: its batch, and past (where it grows) or capacity."""
    batch, dims = Dim.symbol("batch"), cache.source.dims
    out = []
    for letter, dim in zip(cache.layout, dims, strict=True):
        if letter == "B":
            out.append((dim, batch))
        elif letter == "(BH)" and cache.node.outputs[0].rank == 4:
            out.append((dim, batch * cache.node.outputs[0].dims[1]))
        elif letter == "L" and cache.grows and not cache.rolls:
            out.append((dim, Dim.symbol("past")))
        elif letter == "L" and not dim.is_const:
            out.append((dim, Dim.symbol("capacity")))
    return out


def token_inputs(net: Net, live: Sequence[Node]) -> list[Value]:
    """Integer inputs that choose rows of a stored table with a row per logit, else of any one table."""
    chosen: dict[int, tuple[Value, Dim]] = {}
    for table, ids in lookups(live):
        index = strip_views(ids)
        if index.source and index.dtype in ("i64", "i32") and table.rank == 2:
            chosen.setdefault(id(index), (index, table.dims[0]))
    vocabulary = {v.dims[-1] for _, v in net.outputs if v.rank == 3}
    strong = [v for v, rows in chosen.values() if rows in vocabulary]
    if strong:
        return strong
    paths = [v for v, _ in chosen.values() if not _reaches(live, v, ("cos", "sin"))]
    return paths[:1]


def lookups(nodes: Sequence[Node]) -> Iterator[tuple[Value, Value]]:
    """(table, indices) of every look-up of rows of a stored table, or of a transposed one."""
    for node in nodes:
        if node.op == "embed":
            yield node.inputs[1], node.inputs[0]
        elif node.op == "gather" and node.attrs["axis"] == 0:
            table = node.inputs[0]
            if table.weight is not None or (table.op == "transpose" and table.args[0].weight is not None):
                yield table, node.inputs[1]


def strip_views(value: Value) -> Value:
    """The value behind reshapes and casts."""
    while value.op in ("reshape", "cast"):
        value = value.args[0]
    return value


def _reaches(live: Sequence[Node], value: Value, ops: Sequence[str]) -> bool:
    """Whether `value` reaches one of `ops` through elementwise arithmetic and views alone."""
    simple = (
        "cast",
        "reshape",
        "mul",
        "add",
        "sub",
        "transpose",
        "expand",
        "concat",
        "matmul",
        "cos",
        "sin",
        "gather",
    )
    known = {id(value)}
    for node in live:
        if node.op in simple and any(id(i) in known for i in node.inputs):
            if node.op in ops and (node.op != "gather" or node.inputs[0].weight):
                return True
            known.update(id(o) for o in node.outputs)
    return False


def untag(substitution: Mapping[str, Dim], tagged: Mapping[str, Dim]) -> dict[str, Dim]:
    """File symbol -> its final dimension: solved ones by `substitution`, others under their own name."""
    out: dict[str, Dim] = {}
    for symbol, tag in tagged.items():
        value = tag.substitute(substitution)
        own = {s: s[1:] for s in value.symbols if s[0] == TAG}
        plain = {s: Dim.symbol(n + "_" if n in KNOWN else n) for s, n in own.items()}
        out[symbol] = value.substitute(plain)
    return out
