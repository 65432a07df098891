"""One spelling for every cache: whatever its axes, new rows are joined or written along axis 2 of
[B, H, L, D]. Applied while operators are lowered; the result has the axes that the file asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from mapper.frontend import build as b
from mapper.frontend.caches import origin
from mapper.frontend.net import Net, Value, product
from mapper.ir.dims import ONE, ZERO, Dim

_TO_BHLD = {0: (1, 2, 0, 3), 1: (0, 2, 1, 3), 2: (0, 1, 2, 3), 3: (0, 1, 3, 2)}
"""Axis of the tokens -> permutation to [B, H, L, D]; of two orders of batch and heads, batch first."""


def joined(net: Net, parts: Sequence[Value], axis: int) -> Value:
    """Concatenation; one of a cache with new rows in another order of axes is made of one along axis 2."""
    rank = parts[0].rank
    axis %= max(rank, 1)
    if len(parts) == 2 and rank in (3, 4) and _is_cache(parts[0]):
        past, new = parts
        if rank == 4 and axis != 2:
            there = _TO_BHLD[axis]
            whole = net.make("concat", [b.transpose(net, p, there) for p in parts], {"axis": 2})
            return b.transpose(net, whole, _inverse(there))
        count = _flat_heads(net, past) if rank == 3 and axis == 1 else 0
        if count:
            parts = [_with_heads(net, p, count) for p in parts]
            whole = joined(net, parts, 1)
            return b.reshape(net, whole, [*whole.dims[:2], whole.dims[2] * whole.dims[3]])
        if rank == 3 and axis > 0 and _merges_heads(new):
            batch, heads = new.args[0].dims[:2]
            net.same(past.dims[0], new.dims[0])
            wide = b.reshape(net, past, [batch, heads, *past.dims[1:]])
            whole = joined(net, [wide, new.args[0]], axis + 1)
            return b.reshape(net, whole, [new.dims[0], *whole.dims[2:]])
    return b.concat(net, parts, axis)


def _is_cache(value: Value) -> bool:
    return origin(value, ("?",) * value.rank) is not None


def _flat_heads(net: Net, cache: Value) -> int:
    """The heads in the last axis of a [B, P, H*D] cache; 0 where nothing is known of them."""
    found = origin(cache, ("?",) * cache.rank)
    return net.caches.heads.get(found.source.source, 0) if found else 0


def _with_heads(net: Net, rows: Value, heads: int) -> Value:
    return b.reshape(net, rows, [*rows.dims[:2], Dim.of(heads), rows.dims[2] // heads])


def _merges_heads(value: Value) -> bool:
    """Whether a [B*H, ., .] value is a view of a [B, H, ., .] one."""
    if value.op != "reshape" or value.args[0].rank != 4:
        return False
    inner = value.args[0].dims
    return inner[2:] == value.dims[1:] and product(inner[:2]) == value.dims[0]


def _inverse(perm: Sequence[int]) -> tuple[int, ...]:
    return tuple(perm.index(i) for i in range(len(perm)))


def written(net: Net, cache: Value, new: Value, rows: Value, axis: int) -> Value:
    """`cache` with row rows[b, s] (or rows[s]) along `axis` replaced by new's row s; b counts the first axis.
    The sizes of the other axes are noted as equal."""
    heads = _flat_heads(net, cache) if cache.rank == 3 and axis == 1 else 0
    if heads:
        whole = written(net, _with_heads(net, cache, heads), _with_heads(net, new, heads), rows, 1)
        return b.reshape(net, whole, cache.dims)
    there = _TO_BHLD[axis] if cache.rank == 4 else tuple(range(cache.rank))
    old, fresh = (b.transpose(net, v, there) for v in (cache, new))
    at = there.index(axis)
    for i in range(old.rank):
        if i != at:
            net.same(old.dims[i], fresh.dims[i])
    shape = [ONE] * old.rank
    shape[at] = rows.dims[-1]
    shape[there.index(0)] = rows.dims[0] if rows.rank == 2 else shape[there.index(0)]
    index = b.expand(net, b.reshape(net, b.cast(net, rows, "i64"), shape), fresh.dims)
    out = net.make("scatter_elements", [old, index, fresh], {"axis": at, "reduction": "none"})
    return b.transpose(net, out, _inverse(there))


def following(net: Net, first: Value, count: Dim) -> Value:
    """[B, S] row numbers: `count` consecutive ones from first[b] on."""
    start = b.reshape(net, b.cast(net, first, "i64"), [*first.dims, ONE])
    return b.binary(net, "add", start, b.iota(net, ZERO, count, 1))


def scattered_rows(net: Net, x: Value, indices: Value, updates: Value) -> Value | None:
    """ScatterND of whole rows into a cache, as it is written in a cache's own axes; None for any other.

    The index vectors name the row alone, in a cache that has its tokens first; or all leading axes, those
    but the row's by the grid of their own numbers."""
    if x.rank != 4 or not _is_cache(x):
        return None
    if indices.rank == 2 and indices.dims[1] == ONE:
        rows = b.reshape(net, indices, [indices.dims[0]])
        if x.op != "transpose" or x.node is None:
            return written(net, x, updates, rows, 0)
        perm = x.node.attrs["perm"]
        new = b.transpose(net, updates, _inverse(perm))
        return b.transpose(net, written(net, x.args[0], new, rows, perm[0]), perm)
    rank = indices.rank - 1
    if indices.op != "concat" or len(indices.args) != rank or indices.node is None:
        return None
    if indices.node.attrs["axis"] != rank or updates.rank != 4:
        return None
    found = [_along(part) for part in indices.args]
    moved = [i for i, f in enumerate(found) if f is None or not _counts(f[0], x.dims[i]) or f[1] != i]
    if len(moved) != 1 or (chosen := found[moved[0]]) is None or chosen[1] != moved[0]:
        return None
    return written(net, x, updates, b.reshape(net, chosen[0], [Dim.of(-1)]), moved[0])


def _along(part: Value) -> tuple[Value, int] | None:
    """(numbers, axis): a [..., 1] part of a grid of index vectors that varies along one axis alone."""
    wide = part.args[0] if part.op == "reshape" and part.dims[-1] == ONE else part
    if wide.op != "expand":
        return None
    inner = wide.args[0]
    axes = [i for i, d in enumerate(inner.dims) if d != ONE]
    if len(axes) != 1:
        return None
    leaf = inner.args[0] if inner.op == "reshape" and inner.args[0].rank == 1 else inner
    return leaf, axes[0] + wide.rank - inner.rank


def _counts(numbers: Value, size: Dim) -> bool:
    """Whether some numbers are 0, 1, ... size - 1."""
    if numbers.const is not None:
        flat = numbers.const.reshape(-1)
        return size.is_const and flat.tolist() == list(range(size.value))
    attrs = numbers.node.attrs if numbers.node is not None and numbers.op == "iota" else {}
    return bool(attrs) and attrs["start"] == ZERO and attrs["step"] == 1 and attrs["limit"] == size


def scattered_elements(net: Net, x: Value, indices: Value, updates: Value, axis: int) -> Value:
    """ScatterElements without reduction: of shape vectors a shape vector, along axis 2 into a cache."""
    if x.content is not None and updates.content is not None and indices.const is not None and x.rank == 1:
        content = list(x.content)
        for place, value in zip(indices.const.reshape(-1), updates.content, strict=True):
            content[int(place)] = value
        return net.ints(content)
    attrs = {"axis": 2, "reduction": "none"}
    if x.rank == 4 and axis != 2 and _is_cache(x):
        there = _TO_BHLD[axis]
        index = b.transpose(net, indices, there)
        if indices.op == "expand":  # the index of one row for all heads and columns stays recognisable
            inner = indices.args[0]
            inner = b.reshape(net, inner, [*[ONE] * (4 - inner.rank), *inner.dims])
            index = b.expand(net, b.transpose(net, inner, there), index.dims)
        out = net.make(
            "scatter_elements", [b.transpose(net, x, there), index, b.transpose(net, updates, there)], attrs
        )
        return b.transpose(net, out, _inverse(there))
    return net.make("scatter_elements", [x, indices, updates], {**attrs, "axis": axis})
