"""Attention of the standard domain, opsets 23 to 28, expanded to canonical primitives."""

from __future__ import annotations

import math

import numpy as np

from mapper.errors import ModelError
from mapper.frontend import build as b
from mapper.frontend.lower import Call, lowers, type_name
from mapper.frontend.net import Net, Value
from mapper.frontend.ops_nn import LOWEST, additive, merge_heads, scored, split_heads, weighted
from mapper.ir.dims import ONE, ZERO, Dim


@lowers("Attention")
def _attention(c: Call) -> list[Value]:
    """Operands: q, k, v (3-d or 4-d), mask, past keys, past values, number of valid keys [B].
    Results: the output, present keys and values, and the scores at the stage that the mode names."""
    net, (q, k, v) = c.net, (c.x(0), c.x(1), c.x(2))
    flat = q.rank == 3
    if flat:
        heads, kv_heads = c.integer("q_num_heads"), c.integer("kv_num_heads")
        if heads < 1 or kv_heads < 1:
            raise ModelError(f"{net.origin}: three-dimensional operands without head counts")
        q, k, v = split_heads(net, q, heads), split_heads(net, k, kv_heads), split_heads(net, v, kv_heads)
    past = ZERO
    if c.has(4) and c.has(5):
        past = c.x(4).dims[2]
        k, v = b.concat(net, [c.x(4), k], 2), b.concat(net, [c.x(5), v], 2)
    masks = _masks(c, q, k, past)
    scale = c.number("scale", 0.0) or 1.0 / math.sqrt(q.dims[3].value)
    stages = scored(net, q, k, masks, scale, max(c.number("softcap", 0.0), 0.0))
    wide = stages[2]
    if c.integer("softmax_precision"):
        wide = b.cast(net, wide, type_name(c, "softmax_precision"))
    shares = b.cast(net, net.make("softmax", [wide], {"axis": 3}), q.dtype)
    out = weighted(net, shares, v)
    empty = _empty_rows(c, masks)
    if empty is not None:
        out = b.select(net, empty, net.scalar(0.0, out), out)
        shares = b.select(net, empty, net.scalar(0.0, shares), shares)
    outs = [merge_heads(net, out) if flat else out, k, v]
    return [*outs, _stage(c, (*stages, shares))] if any(c.node.outputs[3:]) else outs


def _stage(c: Call, stages: tuple[Value, ...]) -> Value:
    mode = c.integer("qk_matmul_output_mode")
    if not 0 <= mode < len(stages):
        raise ModelError(f"{c.net.origin}: output mode {mode}")
    found = stages[mode]
    if mode != 2 or found.dtype != "f32":
        return found
    hidden = b.binary(
        c.net, "lt", found, c.net.scalar(LOWEST / 2, found)
    )  # what a mask hides is infinite here
    return b.select(c.net, hidden, c.net.scalar(-math.inf, found), found)


def _masks(c: Call, q: Value, k: Value, past: Dim) -> list[Value]:
    """The mask that is given, and what is visible by position."""
    net, keys = c.net, k.dims[2]
    masks = [_as_long(net, c.x(3), keys)] if c.has(3) else []
    visible = _by_position(c, q.dims[2], keys, past)
    if visible is not None:
        masks.append(visible)
    if len(masks) == 2 and c.has(6):  # joined before the scores: one mask of a cache of fixed length
        masks = [b.binary(net, "add", additive(net, masks[1], q), additive(net, masks[0], q))]
    return masks


def _as_long(net: Net, mask: Value, keys: Dim) -> Value:
    """A mask that is shorter than the keys hides the rest."""
    rest = keys - mask.dims[-1]
    if mask.dims[-1] == ONE or not rest.is_const or rest.value <= 0:
        return mask
    fill = net.constant(np.array(False), "bool") if mask.dtype == "bool" else net.scalar(-math.inf, mask)
    return b.concat(net, [mask, b.expand(net, fill, [*mask.dims[:-1], rest])], mask.rank - 1)


def _by_position(c: Call, queries: Dim, keys: Dim, past: Dim) -> Value | None:
    """[S, T] or [B, 1, S or 1, T] bool: causal, windows on both sides, and keys that are no padding."""
    net, column = c.net, b.iota(c.net, ZERO, keys, 1)
    left, right = c.integer("left_window_size", -1), c.integer("right_window_size", -1)
    if c.integer("is_causal"):
        right = 0  # the tighter of the two bounds
    length = None
    if c.has(6):
        length = b.reshape(net, b.cast(net, c.x(6), "i64"), [c.x(6).dims[0], ONE, ONE, ONE])
        step = b.reshape(net, b.iota(net, -queries, ZERO, 1), [queries, ONE])
        row = b.binary(net, "add", length, step)
    else:
        row = b.reshape(net, b.iota(net, past, past + queries, 1), [queries, ONE])
    tests = []
    if right >= 0:
        tests.append(b.binary(net, "le", column, b.binary(net, "add", row, net.ints([right], 0))))
    if left >= 0:
        tests.append(b.binary(net, "ge", column, b.binary(net, "sub", row, net.ints([left], 0))))
    if length is not None and right != 0:  # queries are the last valid tokens: causal says it already
        tests.append(b.binary(net, "lt", column, length))
    visible: Value | None = None
    for test in tests:
        visible = test if visible is None else b.binary(net, "and", visible, test)
    return visible


def _empty_rows(c: Call, masks: list[Value]) -> Value | None:
    """[.., S, 1] bool: queries that see no key, whose output is zero. Looked for where the caller gives keys
    and truth values or lengths; in a decoder's own cache each query sees its own key."""
    net = c.net
    given = [c.x(3)] if c.has(3) and c.x(3).dtype == "bool" else []
    given += [c.x(6)] if c.has(6) else []
    if not c.x(1).source or not any(v.node is None for v in given):
        return None
    seen: Value | None = None
    for mask in masks:
        lowest = net.scalar(-1e30 if mask.dtype != "f16" else -6e4, mask) if mask.dtype != "bool" else None
        truth = mask if lowest is None else b.binary(net, "gt", mask, lowest)
        seen = truth if seen is None else b.binary(net, "and", seen, truth)
    assert seen is not None
    some = b.reduce(net, "max", b.cast(net, seen, "i32"), [seen.rank - 1], True)
    return b.binary(net, "eq", some, net.scalar(0, some))
