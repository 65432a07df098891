"""Stored weights of low-bit integers as one weight: all that is said of weights holds for them too."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mapper.frontend.net import PackedRef, Value, WeightRef
from mapper.ir.dims import Dim
from mapper.lowbit import Scheme


def stored(value: Value | None, name: str) -> WeightRef | None:
    """Where the data of a value is, if it is stored: in a file, or a small constant of the graph."""
    if value is None:
        return None
    if value.weight is not None:
        return value.weight if value.weight.packed is None else None
    if value.const is None:
        return None
    dims = tuple(d.value for d in value.dims)
    return WeightRef(name, dims, value.dtype, None, 0, value.const.nbytes, value.const)


def packed_weight(
    scheme: Scheme,
    shape: Sequence[int],
    dtype: str,
    values: Value,
    scales: Value,
    zeros: Value | None = None,
    order: Value | None = None,
) -> Value | None:
    """The weight that stored parts stand for, None where one of them is computed."""
    source = values.weight
    if source is None or source.packed is not None:
        return None
    name = f"{source.name}:{scheme.name}"
    parts = [stored(v, f"{name}.{n}") for v, n in ((scales, "scales"), (zeros, "zeros"), (order, "order"))]
    absent = [v is not None and p is None for v, p in zip((scales, zeros, order), parts, strict=True)]
    if any(absent) or parts[0] is None or any(n < 0 for n in shape) or math.prod(shape) >= 1 << 60:
        return None
    ref = PackedRef(scheme, source, parts[0], parts[1], parts[2])
    size = source.bytes + sum(p.bytes for p in parts if p is not None)
    whole = WeightRef(name, tuple(shape), dtype, None, 0, size, None, ref, source.looked)
    return Value(tuple(Dim.of(n) for n in shape), dtype, weight=whole)
