"""Smart constructors of indexed moves: what is really a row look-up or a concatenation is made as one."""

from __future__ import annotations

from mapper.frontend import build
from mapper.frontend.net import Net, Value
from mapper.ir.dims import ONE, ZERO, Dim


def gather_nd(net: Net, x: Value, index: Value, batch_dims: int) -> Value:
    """Slices of `x` at index tuples; tuples of one number are rows."""
    if batch_dims == 0 and index.rank >= 1 and index.dims[-1] == ONE and index.rank > 1:
        return build.gather(net, x, build.reshape(net, index, index.dims[:-1]), 0)
    return net.make("gather_nd", [x, index], {"batch_dims": batch_dims})


def scatter_nd(net: Net, x: Value, index: Value, updates: Value, reduction: str) -> Value:
    """`x` with slices replaced; a known run of whole rows is a concatenation."""
    run = _run(index) if reduction == "none" and index.rank == 2 and x.rank == updates.rank else None
    if run is not None and x.dims[0].is_const and updates.dims[1:] == x.dims[1:]:
        first, last = run
        parts = [_rows(net, x, 0, first), updates, _rows(net, x, last, x.dims[0].value)]
        return build.concat(net, [p for p in parts if p.dims[0] != ZERO], 0)
    return net.make("scatter_nd", [x, index, updates], {"reduction": reduction})


def _run(index: Value) -> tuple[int, int] | None:
    """(first, last + 1) of constant indices [n, 1] that count up by one."""
    if index.const is None or index.dims[-1] != ONE or not index.const.size:
        return None
    numbers = [int(v) for v in index.const.reshape(-1)]
    right = numbers[0] >= 0 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return (numbers[0], numbers[-1] + 1) if right else None


def _rows(net: Net, x: Value, start: int, end: int) -> Value:
    return build.slice_(net, x, [Dim.of(start)], [Dim.of(end)], [0], [1])
