"""Arithmetic of small integer tensors of known contents: of shapes, and what is computed of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapper.frontend.net import MAX_TERMS, Dims, Net, Value, tame
from mapper.frontend.shapes import COMPARE
from mapper.ir.dims import ZERO, Dim


def with_content(net: Net, op: str, ins: Sequence[Value], content: Sequence[Dim], dims: Dims) -> Value:
    """An integer tensor of known contents: a constant, a `dims` node or (rank 2) the operator itself."""
    if all(c.is_const for c in content):
        shape = [d.value for d in dims]
        return net.constant(np.array([c.value for c in content], np.int64).reshape(shape), "i64")
    if len(dims) <= 1:
        return net.ints(content, len(dims))
    out = net.make(op, ins)
    out.content = tuple(content)
    return out


def content_pair(a: Value, b: Value) -> tuple[Sequence[Dim], Sequence[Dim], Dims] | None:
    """The contents of two tensors of rank 0 or 1 after broadcasting, both of one length, and the dimensions
    of the result; None where the contents of either are not known."""
    if a.content is None or b.content is None or max(a.rank, b.rank) > 1:
        return None
    size = max(len(a.content), len(b.content))
    if {len(a.content), len(b.content)} - {1, size}:
        return None
    left = a.content if len(a.content) == size else a.content * size
    right = b.content if len(b.content) == size else b.content * size
    return left, right, (Dim.of(size),) if max(a.rank, b.rank) else ()


def dim_op(op: str, a: Dim, b: Dim) -> Dim | None:
    """`op` of two dimensions: add, sub, mul, min, max, div or mod. None for others, and where the result
    cannot be written down or would have more than MAX_TERMS terms."""
    if len(a.terms) * len(b.terms) > MAX_TERMS:
        return None
    if op in ("add", "sub", "mul"):
        return a + b if op == "add" else a - b if op == "sub" else a * b
    if op in ("min", "max"):
        return Dim.max(a, b) if op == "max" else Dim.min(a, b)
    if op in ("div", "mod") and b != ZERO and not (a.is_const and a.value < 0):
        return a // b if op == "div" else a % b
    return None


def _dim_compare(op: str, a: Dim, b: Dim) -> bool | None:
    delta = a - b
    if delta.is_const:
        value = delta.value
        return {"eq": value == 0, "lt": value < 0, "le": value <= 0, "gt": value > 0, "ge": value >= 0}[op]
    if op == "eq" and ((b.is_const and b.value < 0) or (a.is_const and a.value < 0)):
        return False  # a size is never negative
    return None


def shape_arithmetic(net: Net, op: str, a: Value, b: Value) -> Value | None:
    """An operator of two tensors of known contents, entry by entry; None where an entry is not known."""
    pair = content_pair(a, b)
    if pair is None:
        return None
    left, right, dims = pair
    if op in COMPARE:
        truths = [_dim_compare(op, x, y) for x, y in zip(left, right, strict=True)]
        if None in truths:
            return None
        return net.constant(np.array(truths, bool).reshape([d.value for d in dims]), "bool")
    results = [dim_op(op, x, y) for x, y in zip(left, right, strict=True)]
    known = [r for r in results if r is not None and tame(r)]
    return with_content(net, op, [a, b], known, dims) if len(known) == len(results) else None
