"""Where fused operators put new rows, and operators that write rows into a cache of fixed length.

A file with onnxruntime's fused operators can be fed with caches that grow or with buffers of fixed length.
It is read in one of the `MODES`; which of them its inputs ask for is found when it is run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mapper.frontend import build as b
from mapper.frontend.cache_views import following, written
from mapper.frontend.lower import Call, lowers
from mapper.frontend.net import Net, Value
from mapper.ir.dims import ONE, ZERO, Dim

MODES = ("plain", "inside", "beyond")
"""New rows are joined to a cache that is full (plain); written into a buffer that stays as long (inside); or
that gets room for them, where sequences have unequal lengths (beyond)."""


@dataclass(frozen=True)
class Places:
    """Where the `count` new tokens stand: after `past` of every sequence, or at `start` [B]; `room` rows are
    added to the cache. `cleared`: rows that hold no tokens become zero."""

    past: Dim
    count: Dim
    start: Value | None = None
    room: Dim = ZERO
    cleared: bool = False

    def positions(self, net: Net) -> Value:
        """[S], or [B, S]."""
        if self.start is None:
            return b.iota(net, self.past, self.past + self.count, 1)
        return following(net, self.start, self.count)

    def queries(self, net: Net) -> Value:
        """The positions as they stand beside keys: [S, 1], or [B, 1, S, 1]."""
        found = self.positions(net)
        batch = [found.dims[0], ONE] if found.rank == 2 else []
        return b.reshape(net, found, [*batch, self.count, ONE])

    def appended(self, net: Net, cache: Value, new: Value) -> Value:
        """The cache [B, H, P, D] with the new rows [B, H, S, D]."""
        if self.start is None:
            return b.concat(net, [cache, new], 2)
        old = cache
        if self.cleared:
            rows = b.reshape(net, b.iota(net, ZERO, cache.dims[2], 1), [cache.dims[2], ONE])
            held = b.binary(net, "lt", rows, b.reshape(net, self.start, [*self.start.dims, ONE, ONE, ONE]))
            old = b.select(net, held, cache, net.scalar(0.0, cache))
        if self.room != ZERO:
            shape = [cache.dims[0], cache.dims[1], self.room, cache.dims[3]]
            old = b.concat(net, [old, b.expand(net, net.scalar(0.0, cache), shape)], 2)
        return written(net, old, new, self.positions(net), 2)


def grouped_places(c: Call, count: Dim) -> Places:
    """The places of GroupQueryAttention, whose operand 5 [B] is the index of each sequence's last token and 6
    the number of tokens of the longest one. A prompt starts at 0."""
    net = c.net
    past = c.x(3).dims[2] if c.has(3) else ZERO
    if not c.has(3):
        return Places(past, count)
    last = b.cast(net, b.reshape(net, c.x(5), [c.x(3).dims[0]]), "i64")
    start = b.binary(net, "sub", last, net.ints([count - 1], 0))
    start = b.binary(net, "max", start, net.constant(np.array(0, np.int64), "i64"))
    total = b.cast(net, b.reshape(net, c.x(6), []), "i64")
    net.caches.asked.append((start, total, past, count))
    if net.caches.mode == "plain":
        return Places(past, count)
    return Places(past, count, start, count if net.caches.mode == "beyond" else ZERO, cleared=True)


def shared_places(c: Call, length: int, cache: Value, count: Dim) -> Places:
    """The places in a buffer of which operand `length` says how many rows hold tokens."""
    if cache.dims[0] == ZERO:
        raise c.refuse("an empty batch")
    return Places(cache.dims[2], count, b.reshape(c.net, b.cast(c.net, c.x(length), "i64"), [1]))


def within(net: Net, places: Places, keys: Dim, causal: bool) -> Value:
    """[1, 1, S or 1, M]: keys that hold tokens, and (`causal`) none after the query."""
    row = b.iota(net, ZERO, keys, 1)
    if causal:
        return b.binary(net, "le", row, places.queries(net))
    if places.start is None:
        return b.binary(net, "lt", row, net.ints([places.past + places.count], 0))
    ends = b.binary(net, "add", places.start, net.ints([places.count], 0))
    return b.binary(net, "lt", row, b.reshape(net, ends, [*places.start.dims, ONE, ONE, ONE]))


def stretched(net: Net, mask: Value, keys: Dim) -> Value:
    """A mask [.., T] over the tokens that are there, as long as the buffer: what is added hides nothing."""
    if mask.dims[-1] == keys:
        return mask
    last = net.ints([mask.dims[-1] - 1], 0)
    return b.gather(net, mask, b.binary(net, "min", b.iota(net, ZERO, keys, 1), last), mask.rank - 1)


@lowers("TensorScatter")
def _tensor_scatter(c: Call) -> list[Value]:
    """Operands: cache, new rows, first row of each sequence (0 where absent). Semantics: opset 24."""
    net, cache, new, mode = c.net, c.x(0), c.x(1), c.text("mode", "linear")
    axis = c.axis(-2)
    if axis == 0 or mode not in ("linear", "circular"):
        raise c.refuse(f"axis {axis}, mode {mode!r}")
    first = c.x(2) if c.has(2) else b.expand(net, net.constant(np.array(0), "i64"), [cache.dims[0]])
    rows = following(net, first, new.dims[axis])
    if mode == "circular":
        rows = b.binary(net, "mod", rows, net.ints([cache.dims[axis]], 0))
    return [written(net, cache, new, rows, axis)]
