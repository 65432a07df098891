"""Lowerings of operators that write new rows into a key-value cache of fixed length."""

from __future__ import annotations

import numpy as np

from mapper.frontend import build as b
from mapper.frontend.cache_views import following, written
from mapper.frontend.lower import Call, lowers
from mapper.frontend.net import Value


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
