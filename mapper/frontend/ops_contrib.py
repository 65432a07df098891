"""Lowerings of onnxruntime's contrib attention operators, each expanded to canonical primitives.

Semantics: the public contrib operator documentation of onnxruntime (com.microsoft, version 1).
"""

from __future__ import annotations

import math

import numpy as np

from mapper.errors import ModelError
from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers
from mapper.frontend.net import Net, Value
from mapper.frontend.ops_cache import Places, grouped_places, shared_places, stretched, within
from mapper.frontend.ops_nn import (
    additive,
    attend,
    merge_heads,
    rms,
    rotate,
    scored,
    split_heads,
    weighted,
)
from mapper.frontend.ops_quant import integer_product
from mapper.ir.dims import ONE, ZERO, Dim


@lowers("RotaryEmbedding", domain=MS)
def _rotary(c: Call) -> list[Value]:
    """Operands: x [B, S, H*D] or [B, H, S, D], positions [B, S] or [1], tables [L, R/2]."""
    net, x, positions = c.net, c.x(0), c.x(1)
    if c.integer("is_packed_batching") or c.number("scale", 1.0) != 1.0:
        raise c.refuse("packed batches and scaled positions are not supported")
    flat, half = x.rank == 3, c.x(2).dims[1].value
    width = c.integer("rotary_embedding_dim") or 2 * half
    if flat:
        heads = c.integer("num_heads") or x.dims[2].value // width
        x = split_heads(net, x, heads)
    if positions.rank == 1:
        positions = b.binary(net, "add", b.iota(net, ZERO, x.dims[2], 1), positions)
    tables = [_per_head(net, b.gather(net, c.x(i), positions, 0)) for i in (2, 3)]
    out = rotate(net, x, tables[0], tables[1], width, bool(c.integer("interleaved")))
    return [merge_heads(net, out) if flat else out]


def _per_head(net: Net, table: Value) -> Value:
    """[S, r] or [B, S, r] with an axis for the heads."""
    batch = [ONE] if table.rank == 2 else [table.dims[0]]
    return b.reshape(net, table, [*batch, ONE, *table.dims[-2:]])


@lowers("GroupQueryAttention", domain=MS)
def _grouped(c: Call) -> list[Value]:
    """What the cache's length means is said by `net.caches.mode`."""
    net, heads, kv_heads = c.net, c.integer("num_heads"), c.integer("kv_num_heads")
    if heads < 1 or kv_heads < 1:
        raise ModelError(f"{net.origin}: no head counts")
    if c.has(12) or c.has(13) or c.has(16) or c.integer("sliding_window_cache"):
        raise c.refuse("quantised caches, padded chunks and caches that evict are not supported")
    q, k, v = _query_key_value(c, heads, kv_heads)
    if c.has(14) and c.has(15):
        q, k = (_head_norm(c, x, i, name) for x, i, name in ((q, 14, "q"), (k, 15, "k")))
    places = grouped_places(c, q.dims[2])
    if c.integer("do_rotary"):
        q, k = (_rotated(c, x, places) for x in (q, k))
    if c.has(3):
        k, v = (places.appended(net, _like(net, c.x(i), x), x) for i, x in ((3, k), (4, v)))
    window = c.integer("local_window_size", -1)
    mask = _grouped_mask(c, q, k, places, window)
    scale = c.number("scale", 0.0) or 1.0 / math.sqrt(q.dims[3].value)
    stages = scored(net, q, k, [mask], scale, max(c.number("softcap", 0.0), 0.0))
    shares = _shares(c, stages[2])
    outs = [merge_heads(net, weighted(net, shares, v)), k, v]
    if any(c.node.outputs[3:]):
        if c.integer("qk_output") != 2:
            raise c.refuse("the matrix of query-key products before the softmax is an output")
        outs.append(shares)
    return outs


def _shares(c: Call, scores: Value) -> Value:
    """Softmax, where a sink (one number per head, or zero) may join the denominator."""
    net, heads = c.net, scores.dims[1]
    if c.has(11):
        sink = b.reshape(net, c.x(11), [ONE, heads, ONE, ONE])
    elif c.integer("smooth_softmax") == 1:
        sink = net.scalar(0.0, scores)
    else:
        return net.make("softmax", [scores], {"axis": 3})
    column = b.expand(net, b.cast(net, sink, scores.dtype), [*scores.dims[:3], ONE])
    joint = net.make("softmax", [b.concat(net, [scores, column], 3)], {"axis": 3})
    return b.slice_(net, joint, [ZERO], [scores.dims[3]], [3], [1])


def _head_norm(c: Call, x: Value, weight: int, name: str) -> Value:
    eps = c.number(f"{name}_norm_epsilon", c.number("qk_norm_epsilon", 1e-6))
    wide = rms(c.net, b.cast(c.net, x, "f32"), [3], eps)
    return b.binary(c.net, "mul", b.cast(c.net, wide, x.dtype), c.x(weight))


def _like(net: Net, cache: Value, new: Value) -> Value:
    """The cache with its head width, which the file may leave symbolic, set to that of the new rows."""
    net.same(cache.dims[3], new.dims[3])
    return cache


def _query_key_value(c: Call, heads: int, kv_heads: int) -> tuple[Value, Value, Value]:
    net, q = c.net, c.x(0)
    if c.has(1):
        return (
            split_heads(net, q, heads),
            split_heads(net, c.x(1), kv_heads),
            split_heads(net, c.x(2), kv_heads),
        )
    width = q.dims[2] // (heads + 2 * kv_heads)
    at, parts = ZERO, []
    for count in (heads, kv_heads, kv_heads):
        part = b.slice_(net, q, [at], [at + width * count], [2], [1])
        parts.append(split_heads(net, part, count))
        at = at + width * count
    return parts[0], parts[1], parts[2]


def _rotated(c: Call, x: Value, places: Places) -> Value:
    net = c.net
    positions = c.x(9) if c.has(9) else places.positions(net)
    tables = [_per_head(net, b.gather(net, c.x(i), positions, 0)) for i in (7, 8)]
    width = 2 * c.x(7).dims[1].value
    return rotate(net, x, tables[0], tables[1], width, bool(c.integer("rotary_interleaved")))


def _grouped_mask(c: Call, q: Value, k: Value, places: Places, window: int) -> Value:
    """Causal, within the window, and before the end of each sequence (operand 5: its last index)."""
    net, keys = c.net, k.dims[2]
    row = b.iota(net, ZERO, keys, 1)
    visible = net.constant(np.array(True), "bool")
    if c.integer("causal", 1):
        visible = b.binary(net, "le", row, places.queries(net))
    if window > 0:
        span = net.constant(np.array(window, np.int64), "i64")
        oldest = b.binary(net, "sub", places.queries(net), span)
        visible = b.binary(net, "and", visible, b.binary(net, "gt", row, oldest))
    if places.start is None or not c.integer("causal", 1):
        last = b.reshape(net, b.cast(net, c.x(5), "i64"), [q.dims[0], ONE, ONE, ONE])
        visible = b.binary(net, "and", visible, b.binary(net, "le", row, last))
    mask = additive(net, visible, q)
    return b.binary(net, "add", mask, stretched(net, c.x(10), keys)) if c.has(10) else mask


@lowers("MultiHeadAttention", domain=MS)
def _multi_head(c: Call) -> list[Value]:
    """Operands: q, k, v, bias, key_padding_mask, attention_bias, past_key, past_value, past_sequence_length
    (of a buffer of fixed length), cache_indirection."""
    net, heads = c.net, c.integer("num_heads")
    if c.has(9):
        raise c.refuse("a cache indirection is not supported")
    q, k, v = _operands(c, heads)
    if c.has(6) and c.has(8):
        return _in_buffer(c, (q, k, v), (6, 7, 8), (4, 5), bool(c.integer("unidirectional")))
    past = ZERO
    if c.has(6):
        past = c.x(6).dims[2]
        k, v = b.concat(net, [c.x(6), k], 2), b.concat(net, [c.x(7), v], 2)
    low = c.number("mask_filter_value", -10000.0)
    mask = c.x(5) if c.has(5) else None
    if c.has(4):
        padding = padding_mask(c, c.x(4), k.dims[2], low)
        mask = padding if mask is None else b.binary(net, "add", mask, padding)
    scale = c.number("scale", 0.0) or 1.0 / math.sqrt(q.dims[3].value)
    out = attend(net, q, k, v, mask, scale, 0.0, past if c.integer("unidirectional") else None)
    return [merge_heads(net, out), k, v]


def _operands(c: Call, heads: int) -> tuple[Value, Value, Value]:
    """Queries, keys and values [B, H, S, D], given apart, or packed: [B, S, H, 3, D], or keys and values
    [B, T, H, 2, D]."""
    net = c.net
    if c.has(1) and c.has(2):
        q, k, v = (_headed(c, i, heads) for i in range(3))
        return q, k, v
    packed, count = (c.x(1), 2) if c.has(1) else (c.x(0), 3)
    if packed.rank != 5 or packed.dims[3] != Dim.of(count):
        raise c.refuse("packed operands of another form are not supported")
    if c.has(3) and count == 3:
        width = packed.dims[2] * packed.dims[4]
        bias = b.reshape(net, c.x(3), [Dim.of(3), packed.dims[2], packed.dims[4]])
        net.same(c.x(3).dims[0], width * 3)
        packed = b.binary(net, "add", packed, b.transpose(net, bias, (1, 0, 2)))
    elif c.has(3):
        raise c.refuse("a bias beside packed keys and values is not supported")
    apart = []
    for i in range(count):
        part = b.slice_(net, packed, [Dim.of(i)], [Dim.of(i + 1)], [3], [1])
        part = b.reshape(net, part, [*packed.dims[:3], packed.dims[4]])
        apart.append(b.transpose(net, part, (0, 2, 1, 3)))
    q = apart[0] if count == 3 else _headed(c, 0, heads)
    return q, apart[-2], apart[-1]


@lowers("DecoderMaskedMultiHeadAttention", domain=MS)
def _decoder_masked(c: Call) -> list[Value]:
    """Operands: q, k, v, mask, attention_bias, past_key, past_value, past_sequence_length, beam_width,
    cache_indirection, bias; the caches are buffers of fixed length."""
    if not c.has(1) or not c.has(2):
        raise c.refuse("packed operands are not supported")
    if c.has(9):
        raise c.refuse("a cache indirection is not supported")
    if not (c.has(5) and c.has(6) and c.has(7) and c.integer("past_present_share_buffer")):
        raise c.refuse("caches that are no shared buffers are not supported")
    q, k, v = (_headed(c, i, c.integer("num_heads"), 10) for i in range(3))
    return _in_buffer(c, (q, k, v), (5, 6, 7), (3, 4), True)


def _in_buffer(
    c: Call, heads: tuple[Value, ...], caches: tuple[int, int, int], masks: tuple[int, int], causal: bool
) -> list[Value]:
    """Attention over caches of fixed length. `caches` are the operands of keys, values and the number of
    valid rows, `masks` those of padding and of bias."""
    net, (q, new_keys, new_values) = c.net, heads
    places = shared_places(c, caches[2], c.x(caches[0]), q.dims[2])
    k = places.appended(net, c.x(caches[0]), new_keys)
    v = places.appended(net, c.x(caches[1]), new_values)
    keys = k.dims[2]
    mask = additive(net, within(net, places, keys, causal), q)
    if c.has(masks[0]):
        padding = c.x(masks[0])
        padding = padding if padding.rank == 1 else stretched(net, padding, keys)
        hidden = padding_mask(c, padding, keys, c.number("mask_filter_value", -10000.0))
        mask = b.binary(net, "add", mask, hidden)
    if c.has(masks[1]):
        mask = b.binary(net, "add", mask, stretched(net, c.x(masks[1]), keys))
    scale = c.number("scale", 0.0) or 1.0 / math.sqrt(q.dims[3].value)
    out = attend(net, q, k, v, mask, scale, 0.0, None)
    return [merge_heads(net, out), k, v]


def _headed(c: Call, index: int, heads: int, bias: int = 3) -> Value:
    x = c.x(index)
    if x.rank == 4:
        return x
    if c.has(bias):
        width = x.dims[2]
        start = [ZERO, c.x(0).dims[-1], c.x(0).dims[-1] * 2][index]
        x = b.binary(c.net, "add", x, b.slice_(c.net, c.x(bias), [start], [start + width], [0], [1]))
    return split_heads(c.net, x, heads)


def padding_mask(c: Call, mask: Value, keys: Dim, low: float) -> Value:
    """[B] lengths, [2 B] ends and starts, [B, T] truths or [B, S, T] truths as something to add to scores."""
    net, batch = c.net, c.x(0).dims[0]
    if mask.rank == 1:
        if mask.dims[0] == batch * 3 + 2:
            raise c.refuse("a mask of three vectors per sequence is not supported")
        two = mask.dims[0] == batch * 2 and batch != ZERO
        vectors = b.reshape(net, b.cast(net, mask, "i64"), [Dim.of(2 if two else 1), batch, ONE, ONE, ONE])
        ends = b.gather(net, vectors, net.ints([0], 0), 0)
        places = b.iota(net, ZERO, keys, 1)
        visible = b.binary(net, "lt", places, ends)
        if two:
            starts = b.gather(net, vectors, net.ints([1], 0), 0)
            visible = b.binary(net, "and", visible, b.binary(net, "ge", places, starts))
    elif mask.rank in (2, 3):
        shape = [mask.dims[0], ONE, *([ONE] if mask.rank == 2 else []), *mask.dims[1:]]
        visible = b.reshape(net, b.cast(net, mask, "bool"), shape)
    else:
        raise c.refuse(f"a mask of rank {mask.rank} is not supported")
    zero, hidden = (net.constant(np.array(v, np.float32), "f32") for v in (0.0, low))
    return b.select(net, visible, zero, hidden)


@lowers("Attention", domain=MS)
def _packed(c: Call) -> list[Value]:
    """Operands: x [B, S, D], weights [D, 3 D], bias, mask, past [2, B, H, P, Dh], attention_bias."""
    joint = b.matmul(c.net, c.x(0), c.x(1))
    joint = b.binary(c.net, "add", joint, c.x(2)) if c.has(2) else joint
    return _joint_attention(c, joint, 3, 4, 5)


@lowers("QAttention", domain=MS)
def _quantised_attention(c: Call) -> list[Value]:
    """Operands: x, weights (integers), bias, their scales, mask, their zero points, past."""
    net = c.net
    zeros = [c.x(i) if c.has(i) else None for i in (6, 7)]
    joint = b.cast(net, integer_product(net, c.x(0), c.x(1), zeros[0], zeros[1]), "f32")
    joint = b.binary(net, "mul", joint, b.binary(net, "mul", c.x(3), c.x(4)))
    return _joint_attention(c, b.binary(net, "add", joint, c.x(2)), 5, 8, 99)


def _joint_attention(c: Call, joint: Value, padding: int, cache: int, bias: int) -> list[Value]:
    """Self-attention over queries, keys and values side by side; the last three name operands."""
    net, heads = c.net, c.integer("num_heads")
    if c.integer("past_present_share_buffer"):
        raise c.refuse("a stacked cache of fixed length is not supported")
    if c.integer("do_rotary") or heads < 1:
        raise c.refuse("built-in rotary embeddings are not supported")
    widths = [Dim.of(w) for w in c.integers("qkv_hidden_sizes") or ()] or [joint.dims[2] // 3] * 3
    if len(widths) != 3:
        raise ModelError(f"{net.origin}: {len(widths)} hidden sizes")
    at, parts = ZERO, []
    for width in widths:
        parts.append(split_heads(net, b.slice_(net, joint, [at], [at + width], [2], [1]), heads))
        at = at + width
    (q, k, v), past = parts, ZERO
    if c.has(cache):
        past = c.x(cache).dims[3]
        old = [b.gather(net, c.x(cache), net.ints([i], 0), 0) for i in (0, 1)]
        k, v = b.concat(net, [old[0], k], 2), b.concat(net, [old[1], v], 2)
    low = c.number("mask_filter_value", -10000.0)
    mask = padding_mask(c, c.x(padding), k.dims[2], low) if c.has(padding) else None
    if c.has(bias):
        mask = c.x(bias) if mask is None else b.binary(net, "add", mask, c.x(bias))
    scale = c.number("scale", 0.0) or 1.0 / math.sqrt(q.dims[3].value)
    out = merge_heads(
        net, attend(net, q, k, v, mask, scale, 0.0, past if c.integer("unidirectional") else None)
    )
    if not any(c.node.outputs[1:]):
        return [out]
    return [out, b.concat(net, [b.reshape(net, y, [ONE, *y.dims]) for y in (k, v)], 0)]
