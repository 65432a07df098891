"""Lowering of transformer ops, as recognised and in serving form."""

from __future__ import annotations

from mapper.ir.op import DataflowOp, fields, tensor_type
from mapper_host.context import Context, Matrix, rule
from mapper_host.opcodes import (
    ACTIVATION,
    ATTENTION,
    CACHE_APPEND,
    CACHED_ATTENTION,
    COPY,
    EMBED_AT,
    GATE,
    GATHER,
    LINEAR_KN,
    LINEAR_NK,
    NORM,
    PROJECT,
    ROPE,
    ROPE_AT,
    ROUND_BLOCKS,
    SCATTER_ELEMENTS,
    SIZES,
    bits,
    span,
)
from mapper_host.program import Slice, Value
from mapper_host.strides import broadcast, collapse, row_major
from mapper_kernels.names import ACTIVATIONS, COMBINATIONS, ELEMENTWISE, EPILOGUES


@rule("embed")
def _embed(c: Context, op: DataflowOp) -> None:
    table, ids, y = c.need("table", None), c.value(op.operands[0]), c.out()
    rows, d = table.shape
    size = SIZES[table.code]
    moved = 2 * y.bytes + ids.bytes
    c.emit(GATHER, [size, ids.code, 1, rows, d, ids.items], [table, ids, y], y.items, bytes=moved)


@rule("embed_at")
def _embed_at(c: Context, op: DataflowOp) -> None:
    table, past, y = c.need("table"), c.value(op.operands[0]), c.f32_out()
    args = [*table.shape, op.attr("batch"), op.attr("seq"), op.attr("offset")]
    c.emit(EMBED_AT, args, [table, past, y], y.items, bytes=2 * y.bytes)


def linear(c: Context, x: Value, name: str, transposed: bool, bias: str, y: Value) -> None:
    """Emit y = x W + b over the last axis, W and b the weights that attributes name. x is rounded first where
    the op says so."""
    if c.op is not None and (block := c.op.attr("round_block") if "round_block" in fields(type(c.op)) else 0):
        x = rounded(c, x, block)
    if c.serving:
        project(c, x, [(c.product(name, transposed), c.weight(bias) if bias else None)], y)
        return
    weight = c.need(name)
    given = c.weight(bias) if bias else None
    n, k = weight.shape if transposed else weight.shape[::-1]
    m = y.items // n if n else 0
    operands = [x, weight, *([] if given is None else [given]), y]
    args = [m, n, k, int(given is not None)]
    c.emit(LINEAR_NK if transposed else LINEAR_KN, args, operands, 2 * m * n * k + (m * n if given else 0))


def project(
    c: Context, x: Value, matrices: list[tuple[Matrix, Value | None]], y: Value, act: str | None = None
) -> None:
    """Emit y = x W^T + b, or with two matrices y = act(first) second."""
    n, k = matrices[0][0].n, matrices[0][0].k
    m = y.items // n if n else 0
    kind = EPILOGUES.index("plain" if act is None else "gate")
    args = [m, k, 0, 0, 0, 0, 0, kind, ACTIVATIONS[act] if act else 0, len(matrices)]
    operands: list[Value] = [x]
    for matrix, bias in matrices:
        args += [n, matrix.format.code, int(matrix.zeros is not None), int(bias is not None)]
        operands += [*matrix.operands, *([] if bias is None else [bias])]
    biased = sum(b is not None for _, b in matrices)
    c.emit(PROJECT, args, [*operands, y], m * n * (2 * k * len(matrices) + biased + (5 if act else 0)))


def rounded(c: Context, x: Value, block: int) -> Value:
    """Emit the rounding of x to 8-bit multiples per block; the rounded copy."""
    y, d = c.temporary(x.shape, "f32"), x.shape[-1]
    c.emit(ROUND_BLOCKS, [x.items // d if d else 0, d, block], [x, y], 4 * x.items)
    return y


@rule("round_blocks")
def _round_blocks(c: Context, op: DataflowOp) -> None:
    x = c.f32(op.operands[0])
    c.emit(
        ROUND_BLOCKS, [x.items // x.shape[-1], x.shape[-1], op.attr("block")], [x, c.f32_out()], 4 * x.items
    )


@rule("linear", "lm_head")
def _linear(c: Context, op: DataflowOp) -> None:
    linear(c, c.f32(op.operands[0]), "weight", op.attr("transposed"), "bias", c.f32_out())


@rule("norm")
def _norm(c: Context, op: DataflowOp) -> None:
    x, weight, bias = c.f32(op.operands[0]), c.weight("weight"), c.weight("bias")
    y = c.f32_out()
    d = x.shape[-1]
    args = [
        x.items // d, d, int(op.attr("kind") == "layer"), int(weight is not None), int(bias is not None),
        bits(op.attr("eps")), bits(op.attr("weight_offset")),
    ]  # fmt: skip
    c.emit(NORM, args, [v for v in (x, weight, bias, y) if v is not None], 8 * x.items)


@rule("rope")
def _rope(c: Context, op: DataflowOp) -> None:
    x, cos, sin = (c.f32(v) for v in op.operands)
    b, h, s, d = x.shape
    y = c.f32_out()
    width, rotary = cos.shape[-1], op.attr("rotary_dim")
    full = (
        cos.shape
        if len(cos.shape) == 4
        else (cos.shape[0], 1, *cos.shape[1:])
        if len(cos.shape) == 3
        else cos.shape
    )
    walk = broadcast(full, (b, 1, s, width))
    interleaved = op.attr("style") == "interleaved"
    step = 2 if interleaved and width == rotary else 1
    args = [b, h, s, d, rotary, int(interleaved), step, width, walk[0], walk[2]]
    c.emit(ROPE, args, [x, cos, sin, y], 6 * x.items)


@rule("rope_at")
def _rope_at(c: Context, op: DataflowOp) -> None:
    x, past, table = c.f32(op.operands[0]), c.value(op.operands[1]), c.need("table")
    y = c.f32_out()
    s, d = x.shape[2:]
    interleaved = int(op.attr("style") == "interleaved")
    args = [x.items // d, d, s, table.shape[1], op.attr("rotary_dim"), interleaved]
    moved = 2 * x.bytes + 4 * s * op.attr("rotary_dim")
    c.emit(ROPE_AT, args, [x, table, past, y], 6 * x.items, bytes=moved)


@rule("scale_at")
def _scale_at(c: Context, op: DataflowOp) -> None:
    """The factors of the step's positions, looked up as rows of one column, then a product."""
    x, past, table = c.f32(op.operands[0]), c.value(op.operands[1]), c.need("table")
    axis = op.attr("axis")
    tokens = x.shape[axis]
    factors = c.temporary((tokens, *[1] * (-axis - 1)), "f32")
    c.emit(EMBED_AT, [table.items, 1, 1, tokens, 0], [table, past, factors], tokens, bytes=2 * factors.bytes)
    c.elementwise(ELEMENTWISE["mul"], [x, factors], c.f32_out())


@rule("cache_append")
def _cache_append(c: Context, op: DataflowOp) -> None:
    cache, new, past = (c.value(v) for v in op.operands)
    if cache.storage.memory != "state" or c.f32(op.operands[1]).dtype != cache.dtype:
        c.fail("appends to what is no f32 cache")
    b, h, length, d = cache.shape
    c.alias(cache)
    # the cache is read as well as written, because most of its bytes stay
    whole = Slice(cache.storage, 0, cache.bytes)
    args = [b * h, length, new.shape[2], d]
    c.emit(CACHE_APPEND, args, [whole, new, past, whole], new.items, bytes=2 * new.bytes)


@rule("cached_attention")
def _cached_attention(c: Context, op: DataflowOp) -> None:
    q, k, v = (c.f32(x) for x in op.operands[:3])
    past, extra = c.value(op.operands[3]), op.operand("sinks")
    sinks = None if extra is None else c.f32(extra)
    b, h, s, d = q.shape
    hkv, length, dv = k.shape[1], k.shape[2], v.shape[3]
    slopes = op.attr("slopes") or ()
    y = c.f32_out()
    args = [
        b, h, s, d, hkv, length, dv, op.attr("window"), int(sinks is not None), len(slopes),
        bits(op.attr("scale")), bits(op.attr("softcap")), op.attr("chunk"), *map(bits, slopes),
    ]  # fmt: skip
    operands = [q, k, v, past, *([] if sinks is None else [sinks]), y]
    c.emit(CACHED_ATTENTION, args, operands, b * h * s * length * (2 * d + 2 * dv + 8))


@rule("attention")
def _attention(c: Context, op: DataflowOp) -> None:
    q, k, v = (c.f32(x) for x in op.operands[:3])
    _masked_attention(c, op, q, k, v)


def _masked_attention(c: Context, op: DataflowOp, q: Value, k: Value, v: Value) -> None:
    """Emit attention with the mask and attributes of `op`."""
    slopes = op.attr("slopes") or () if op.mnemonic == "attention" else ()
    given = op.operand("sinks") if op.mnemonic == "attention" else None
    sinks = None if given is None else c.f32(given)
    mask = c.operand("mask")
    if op.mnemonic == "attention" and op.attr("chunk") and mask is None:
        c.fail("attention in chunks without a mask is not supported")
    b, h, s, d = q.shape
    hkv, t, dv = k.shape[1], k.shape[2], v.shape[3]
    y = c.f32_out()
    walk = (0, 0, 0, 0) if mask is None else broadcast(mask.shape, (b, h, s, t))
    args = [
        b, h, s, d, hkv, t, dv, op.attr("window"), int(op.attr("causal")), int(mask is not None),
        0 if mask is None else mask.code, *walk, int(sinks is not None), len(slopes),
        bits(op.attr("scale")), bits(op.attr("softcap")), *map(bits, slopes),
    ]  # fmt: skip
    operands = [x for x in (q, k, v, mask, sinks, y) if x is not None]
    c.emit(ATTENTION, args, operands, b * h * s * t * (2 * d + 2 * dv + 8))


@rule("latent_attention")
def _latent_attention(c: Context, op: DataflowOp) -> None:
    """Keys and values of all heads are made first; the absorbed form is not built for this target."""
    q, latent, rope_key = (c.f32(x) for x in op.operands[:3])
    b, h, _, d = q.shape
    t, nope = latent.shape[2], op.attr("nope_dim")
    rotated, dv = d - nope, tensor_type(op.results[0]).ints[3]
    both, k, v = (c.temporary(s, "f32") for s in ((b, t, h * (nope + dv)), (b, h, t, d), (b, h, t, dv)))
    linear(c, latent, "weight", op.attr("transposed"), "", both)
    width = nope + dv
    walk = (t * h * width, width, h * width, 1)
    copy(c, both, k, SIZES[k.code], (b, h, t, nope), walk, row_major(k.shape))
    shared = (t * rotated, 0, rotated, 1)
    copy(c, rope_key, k, SIZES[k.code], (b, h, t, rotated), shared, row_major(k.shape), 0, nope)
    copy(c, both, v, SIZES[v.code], (b, h, t, dv), walk, row_major(v.shape), nope)
    _masked_attention(c, op, q, k, v)


@rule("kv_append")
def _kv_append(c: Context, op: DataflowOp) -> None:
    join(c, [c.value(v) for v in op.operands], 2, c.out())


@rule("kv_update")
def _kv_update(c: Context, op: DataflowOp) -> None:
    past, new, rows = (c.value(v) for v in op.operands)
    y, index = c.out(), c.temporary(new.shape, rows.dtype)
    b, s = new.shape[0], new.shape[2]
    copy(c, past, y, SIZES[past.code], (past.items,), (1,), (1,))
    each = s if len(rows.shape) == 2 and rows.shape[0] == b else 0
    copy(c, rows, index, SIZES[rows.code], new.shape, (each, 0, 1, 0), row_major(new.shape))
    args = [y.code, index.code, COMBINATIONS.index("none"), 4, 2, *new.shape, *past.shape]
    c.emit(SCATTER_ELEMENTS, args, [y, index, new, y], new.items)


def join(c: Context, parts: list[Value], axis: int, y: Value) -> None:
    """Emit copies of `parts`, one after the other along `axis` of y."""
    strides = row_major(y.shape)
    at = 0
    for x in parts:
        size = SIZES[x.code]
        copy(
            c,
            x,
            Slice(y.storage, 0, y.bytes),
            size,
            x.shape,
            row_major(x.shape),
            strides,
            0,
            at * strides[axis],
        )
        at += x.shape[axis]


def copy(
    c: Context,
    x: Value,
    y: Slice | Value,
    size: int,
    shape: tuple[int, ...],
    xs: tuple[int, ...],
    ys: tuple[int, ...],
    x0: int = 0,
    y0: int = 0,
) -> None:
    """Emit y[y0 + i * ys] = x[x0 + i * xs] over all i of `shape`, in items of `size` bytes."""
    if 0 in shape:
        return
    walk, (xs, ys) = collapse(shape, [xs, ys])
    items = 1
    for d in walk:
        items *= d
    # slices are cut to what is touched, so that the parts of a join do not seem to write each other's bytes
    low_x, high_x = span(walk, xs)
    low_y, high_y = span(walk, ys)
    a, b = x0 + low_x, y0 + low_y
    args = [size, len(walk), -low_x, -low_y, *walk, *xs, *ys]
    source = Slice(x.storage, a * size, (high_x - low_x) * size)
    target = Slice(y.storage, b * size, (high_y - low_y) * size)
    c.emit(COPY, args, [source, target], items, bytes=2 * items * size)


@rule("activation")
def _activation(c: Context, op: DataflowOp) -> None:
    x = c.f32(op.operands[0])
    c.emit(ACTIVATION, [x.items, ACTIVATIONS[op.attr("kind")]], [x, c.f32_out()], 4 * x.items)


def _inner(c: Context, name: str, transposed: bool) -> int:
    """Columns of what a matrix makes."""
    assert c.op is not None
    symbol = c.graph.weight(c.op, name)
    assert symbol is not None
    return symbol.shape[0 if transposed else 1]


@rule("mlp")
def _mlp(c: Context, op: DataflowOp) -> None:
    x = c.f32(op.operands[0])
    inner = (*x.shape[:-1], _inner(c, "up", op.attr("up_transposed")))
    h, a, y = c.temporary(inner, "f32"), c.temporary(inner, "f32"), c.f32_out()
    linear(c, x, "up", op.attr("up_transposed"), "up_bias", h)
    c.emit(ACTIVATION, [h.items, ACTIVATIONS[op.attr("act")]], [h, a], 4 * h.items)
    linear(c, a, "down", op.attr("down_transposed"), "down_bias", y)


@rule("gated_mlp")
def _gated_mlp(c: Context, op: DataflowOp) -> None:
    x = c.f32(op.operands[0])
    inner = (*x.shape[:-1], _inner(c, "gate", op.attr("gate_transposed")))
    g, u, a = (c.temporary(inner, "f32") for _ in range(3))
    y = c.f32_out()
    if c.serving and not op.attr("round_block"):
        both = [(c.product(n, op.attr(f"{n}_transposed")), c.weight(f"{n}_bias")) for n in ("gate", "up")]
        project(c, x, both, a, op.attr("act"))
    else:
        linear(c, x, "gate", op.attr("gate_transposed"), "gate_bias", g)
        linear(c, x, "up", op.attr("up_transposed"), "up_bias", u)
        c.emit(GATE, [g.items, ACTIVATIONS[op.attr("act")]], [g, u, a], 5 * g.items)
    linear(c, a, "down", op.attr("down_transposed"), "down_bias", y)


@rule("packed_mlp")
def _packed_mlp(c: Context, op: DataflowOp) -> None:
    x = c.f32(op.operands[0])
    width = _inner(c, "gate_up", op.attr("gate_up_transposed"))
    rows, inner = x.items // x.shape[-1], width // 2
    wide = c.temporary((rows, width), "f32")
    g, u, a = (c.temporary((rows, inner), "f32") for _ in range(3))
    y = c.f32_out()
    linear(c, x, "gate_up", op.attr("gate_up_transposed"), "gate_up_bias", wide)
    step, second = (1, inner) if op.attr("packing") == "halves" else (2, 1)
    for target, first in ((g, 0), (u, second)):
        copy(c, wide, target, SIZES[wide.code], (rows, inner), (width, step), (inner, 1), first)
    c.emit(GATE, [g.items, ACTIVATIONS[op.attr("act")]], [g, u, a], 5 * g.items)
    linear(c, a, "down", op.attr("down_transposed"), "down_bias", y)
