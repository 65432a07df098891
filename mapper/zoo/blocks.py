"""The parts of a decoder layer: norms, attention, MLPs, experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from mapper.zoo import rope as rotary
from mapper.zoo.config import Config, Experts, Latent, Layer, Rope
from mapper.zoo.writer import Writer

SHARP = 2.0
"""Gain of query and key projections in random weights: attention that is near uniform hides mistakes."""


@dataclass
class Shared:
    """What layers share: positions f32 [batch, sequence, 1], tables by rope, masks by (window, chunk)."""

    positions: str
    tables: dict[str, tuple[str, str]] = field(default_factory=dict)
    masks: dict[tuple[int, int], str] = field(default_factory=dict)
    tuning: str = ""

    def angles(self, w: Writer, rope: Rope) -> tuple[str, str]:
        """The tables of a rope, made once."""
        key = repr(rope)
        if key not in self.tables:
            self.tables[key] = rotary.tables(w, rope, self.positions)
        return self.tables[key]


def norm(w: Writer, c: Config, x: str, name: str, width: int, kind: str | None = None) -> str:
    """Normalisation over the last axis."""
    kind = kind or c.norm
    if kind == "layer":
        scale, bias = (
            w.weight(f"{name}.weight", width, gain=0.1, mean=1.0),
            w.weight(f"{name}.bias", width, gain=0.1),
        )
        return str(w.op("LayerNormalization", x, scale, bias, epsilon=c.eps, axis=-1))
    scale = w.weight(f"{name}.weight", width, gain=0.1, mean=0.0 if kind == "rms1" else 1.0)
    if kind == "rms1":
        scale = str(w.op("Add", scale, w.number(1.0)))
    return str(w.op("RMSNormalization", x, scale, epsilon=c.eps, axis=-1))


def linear(
    w: Writer, x: str, name: str, rows: int, columns: int, bias: bool = False, gain: float = 1.0
) -> str:
    """x times a stored [rows, columns] matrix, plus a bias."""
    y = w.op("MatMul", x, w.weight(f"{name}.weight", rows, columns, gain=gain))
    return str(w.op("Add", y, w.weight(f"{name}.bias", columns, gain=0.1)) if bias else y)


def heads_first(w: Writer, x: str, heads: int, width: int) -> str:
    """[batch, sequence, heads * width] -> [batch, heads, sequence, width]."""
    return w.transpose(w.reshape(x, 0, 0, heads, width), 0, 2, 1, 3)


def _projections(w: Writer, c: Config, x: str, name: str) -> tuple[str, str, str]:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if c.packed or c.family == "gpt":
        both = linear(w, x, f"{name}.qkv_proj", c.hidden, q + 2 * kv, c.qkv_bias, SHARP)
        parts = w.split(both, q, kv, kv)
        return parts[0], parts[1], parts[2]
    made = [
        linear(w, x, f"{name}.{n}_proj", c.hidden, width, c.qkv_bias, gain)
        for n, width, gain in (("q", q, SHARP), ("k", kv, SHARP), ("v", kv, 1.0))
    ]
    return made[0], made[1], made[2]


def attention(w: Writer, c: Config, layer: Layer, shared: Shared, x: str, i: int) -> str:
    """Self-attention with its cache: [batch, sequence, hidden]."""
    name = f"model.layers.{i}.self_attn"
    if c.latent is not None:
        q, k, v = _latent(w, c, c.latent, layer, shared, x, i)
    else:
        q, k, v = _heads(w, c, layer, shared, x, i)
    mask = shared.masks[layer.window, layer.chunk]
    scale = (c.scale or c.head_dim**-0.5) * (rotary.score_factor(layer.rope) if c.latent else 1.0)
    if c.sinks or c.softcap:
        out = _explicit(w, c, q, k, v, mask, scale, name)
    else:
        out = str(w.op("Attention", q, k, v, mask, scale=scale))
    merged = w.reshape(w.transpose(out, 0, 2, 1, 3), 0, 0, c.heads * c.value_dim)
    return linear(w, merged, f"{name}.o_proj", c.heads * c.value_dim, c.hidden, c.bias)


def _heads(w: Writer, c: Config, layer: Layer, shared: Shared, x: str, i: int) -> tuple[str, str, str]:
    """Queries, and keys and values with the cached ones before them."""
    name = f"model.layers.{i}.self_attn"
    flat = _projections(w, c, x, name)
    q, k, v = (
        heads_first(w, y, n, c.head_dim) for y, n in zip(flat, (c.heads, c.kv_heads, c.kv_heads), strict=True)
    )
    if c.qk_norm.startswith("rms"):
        q = norm(w, c, q, f"{name}.q_norm", c.head_dim, c.qk_norm)
        k = norm(w, c, k, f"{name}.k_norm", c.head_dim, c.qk_norm)
    if layer.rope is not None:
        made = shared.angles(w, layer.rope)
        q, k = (rotary.rotate(w, layer.rope, y, made) for y in (q, k))
        if c.qk_norm == "l2":
            ones = w.ones(c.head_dim)
            q, k = (str(w.op("RMSNormalization", y, ones, epsilon=c.eps, axis=-1)) for y in (q, k))
    if layer.tuned:
        q = str(w.op("Mul", q, shared.tuning))
    return (
        q,
        cached(w, c, k, i, "key", c.kv_heads, c.head_dim),
        cached(w, c, v, i, "value", c.kv_heads, c.head_dim),
    )


def cached(w: Writer, c: Config, new: str, i: int, kind: str, heads: int, width: int) -> str:
    """New rows behind the cached ones, which are an input; the result is an output."""
    past = w.input(f"past_key_values.{i}.{kind}", ["batch", heads, "past", width])
    both = str(w.op("Concat", past, new, axis=2))
    w.output(both, f"present.{i}.{kind}", ["batch", heads, "past + sequence", width])
    return both


def _latent(
    w: Writer, c: Config, a: Latent, layer: Layer, shared: Shared, x: str, i: int
) -> tuple[str, str, str]:
    """Queries, keys and values of latent attention; what is cached is the latent row and the turned key."""
    name, rope = f"model.layers.{i}.self_attn", layer.rope
    assert rope is not None
    q = x
    if a.query:
        q = norm(w, c, linear(w, x, f"{name}.q_a_proj", c.hidden, a.query), f"{name}.q_a_layernorm", a.query)
    q = linear(w, q, f"{name}.q_b_proj", a.query or c.hidden, c.heads * (a.nope + a.rope), gain=SHARP)
    plain, turned = w.split(heads_first(w, q, c.heads, a.nope + a.rope), a.nope, a.rope)
    made = shared.angles(w, rope)
    q = str(w.op("Concat", plain, rotary.rotate(w, rope, turned, made), axis=3))
    rows, key = w.split(
        linear(w, x, f"{name}.kv_a_proj_with_mqa", c.hidden, a.rank + a.rope, gain=SHARP), a.rank, a.rope
    )
    rows = norm(w, c, rows, f"{name}.kv_a_layernorm", a.rank)
    rows = cached(w, c, w.reshape(rows, 0, 1, -1, a.rank), i, "key", 1, a.rank)
    key = rotary.rotate(w, rope, w.reshape(key, 0, 1, -1, a.rope), made)
    key = cached(w, c, key, i, "value", 1, a.rope)
    both = linear(w, rows, f"{name}.kv_b_proj", a.rank, c.heads * (a.nope + a.value), gain=1.5)
    both = w.transpose(w.reshape(both, 0, -1, c.heads, a.nope + a.value), 0, 2, 1, 3)
    nope, v = w.split(both, a.nope, a.value)
    each = w.op("Expand", key, w.ints(1, c.heads, 1, 1))
    return q, str(w.op("Concat", nope, each, axis=3)), v


def _explicit(w: Writer, c: Config, q: str, k: str, v: str, mask: str, scale: float, name: str) -> str:
    """softmax(cap(scale q k^T) + mask) v, with one more score per head where there are sinks."""
    k, v = (_repeated(w, c, y) for y in (k, v))
    scores = w.op("Mul", w.op("MatMul", q, w.transpose(k, 0, 1, 3, 2)), w.number(scale))
    if c.softcap:
        capped = w.op("Tanh", w.op("Div", scores, w.number(c.softcap)))
        scores = w.op("Mul", capped, w.number(c.softcap))
    low = {"f32": -3.0e38, "f16": -6.0e4, "bf16": -3.0e38}[w.dtype]
    scores = w.op("Add", scores, w.op("Where", mask, w.number(0.0), w.number(low)))
    if not c.sinks:
        return str(w.op("MatMul", w.op("Softmax", scores, axis=-1), v))
    sinks = w.reshape(w.weight(f"{name}.sinks", c.heads), 1, c.heads, 1, 1)
    shape = w.op("Concat", w.op("Shape", q, start=0, end=3), w.ints(1), axis=0)
    wide = w.op("Concat", scores, w.op("Expand", sinks, shape), axis=-1)
    weights = w.slice(str(w.op("Softmax", wide, axis=-1)), 0, -1, 3)
    return str(w.op("MatMul", weights, v))


def _repeated(w: Writer, c: Config, x: str) -> str:
    group = c.heads // c.kv_heads
    if group == 1:
        return x
    wide = w.op("Expand", w.op("Unsqueeze", x, w.ints(2)), w.ints(1, 1, group, 1, 1))
    return w.reshape(str(wide), 0, c.heads, -1, c.head_dim)


def activation(w: Writer, kind: str, x: str) -> str:
    """An activation function in standard operators."""
    if kind == "silu":
        return str(w.op("Mul", x, w.op("Sigmoid", x)))
    if kind == "gelu_quick":
        return str(w.op("Mul", x, w.op("Sigmoid", w.op("Mul", x, w.number(1.702)))))
    return str(w.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none"))


def mlp(w: Writer, c: Config, x: str, name: str, inner: int) -> str:
    """A gated MLP, packed where the model packs it, or a plain one."""
    if not c.gated:
        hidden = activation(w, c.act, linear(w, x, f"{name}.up_proj", c.hidden, inner, c.bias))
        return linear(w, hidden, f"{name}.down_proj", inner, c.hidden, c.bias)
    if c.packed:
        gate, up = w.split(linear(w, x, f"{name}.gate_up_proj", c.hidden, 2 * inner), inner, inner)
    else:
        gate, up = (linear(w, x, f"{name}.{n}_proj", c.hidden, inner) for n in ("gate", "up"))
    hidden = str(w.op("Mul", activation(w, c.act, gate), up))
    return linear(w, hidden, f"{name}.down_proj", inner, c.hidden)


def moe(w: Writer, c: Config, e: Experts, x: str, i: int) -> str:
    """Routed experts, gathered by the router's choice, and the shared one: [batch, sequence, hidden]."""
    name = f"model.layers.{i}.mlp"
    flat = w.reshape(x, -1, c.hidden)
    index, share = _routed(w, c, e, flat, name)
    chosen = w.reshape(index, -1)
    each = w.op("Expand", w.op("Unsqueeze", flat, w.ints(1)), w.ints(1, e.chosen, 1))
    each = w.reshape(str(each), -1, 1, c.hidden)
    shares = w.reshape(share, -1, 1, 1)
    each = str(w.op("Mul", each, shares)) if e.share_input else each
    both = _looked_up(w, e, each, f"{name}.experts.gate_up_proj", c.hidden, 2 * e.inner, chosen)
    if e.limit:
        gate, up = w.slice(both, 0, 2 * e.inner, 2, 2), w.slice(both, 1, 2 * e.inner, 2, 2)
        high, low = w.number(e.limit), w.number(-e.limit)
        gate, up = str(w.op("Min", gate, high)), str(w.op("Clip", up, low, high))
        up = str(w.op("Add", up, w.number(1.0)))
    else:
        gate, up = w.split(both, e.inner, e.inner)
    hidden = str(w.op("Mul", activation(w, c.act, gate), up))
    out = _looked_up(w, e, hidden, f"{name}.experts.down_proj", e.inner, c.hidden, chosen)
    out = out if e.share_input else str(w.op("Mul", out, shares))
    total = str(w.op("ReduceSum", w.reshape(out, -1, e.chosen, c.hidden), w.ints(1), keepdims=0))
    total = str(w.op("Reshape", total, w.op("Shape", x)))
    if e.shared:
        total = str(w.op("Add", total, mlp(w, c, x, f"{name}.shared_expert", e.shared)))
    return total


def _looked_up(w: Writer, e: Experts, x: str, name: str, rows: int, columns: int, chosen: str) -> str:
    """x [n, 1, rows] times the chosen experts' matrices: [n, 1, columns]."""
    stack = w.weight(name, e.count, rows, columns, fan_in=rows)
    y = w.op("MatMul", x, w.op("Gather", stack, chosen, axis=0))
    if e.biases:
        bias = w.op("Gather", w.weight(f"{name}_bias", e.count, columns, fan_in=1, gain=0.1), chosen, axis=0)
        y = w.op("Add", y, w.op("Unsqueeze", bias, w.ints(1)))
    return str(y)


def _routed(w: Writer, c: Config, e: Experts, x: str, name: str) -> tuple[str, str]:
    """(experts, shares), each [tokens, chosen]."""
    logits = linear(w, x, f"{name}.router", c.hidden, e.count, e.biases, SHARP)
    k = w.ints(e.chosen)
    if e.scoring == "topk_softmax":
        values, index = w.op("TopK", logits, k, outputs=2, axis=-1)
        return index, str(w.op("Softmax", values, axis=-1))
    scores = str(w.op("Sigmoid", logits) if e.scoring == "sigmoid" else w.op("Softmax", logits, axis=-1))
    choice = scores
    if e.correction:
        choice = str(w.op("Add", scores, w.weight(f"{name}.router.correction_bias", e.count, gain=0.3)))
    if e.groups:
        choice = _in_groups(w, e, choice)
    share, index = w.op("TopK", choice, k, outputs=2, axis=-1)
    if choice != scores:
        share = w.op("GatherElements", scores, index, axis=1)
    if e.normalise:
        total = w.op("ReduceSum", share, w.ints(1), keepdims=1)
        share = w.op("Div", share, w.op("Add", total, w.number(1e-20)) if e.correction else total)
    if e.scale != 1.0:
        share = w.op("Mul", share, w.number(e.scale))
    return index, str(share)


def _in_groups(w: Writer, e: Experts, scores: str) -> str:
    """Scores outside of the best groups, by the sum of their best two, become zero."""
    size = e.count // e.groups
    best, _ = w.op("TopK", w.reshape(scores, -1, e.groups, size), w.ints(2), outputs=2, axis=-1)
    value = w.op("ReduceSum", best, w.ints(2), keepdims=0)
    _, index = w.op("TopK", value, w.ints(e.top_groups), outputs=2, axis=-1)
    zeros = w.op("ConstantOfShape", w.op("Shape", value), value=_filled(0.0))
    ones = w.op("ConstantOfShape", w.op("Shape", index), value=_filled(1.0))
    marked = w.op("Unsqueeze", w.op("ScatterElements", zeros, index, ones, axis=1), w.ints(2))
    kept = w.reshape(str(w.op("Expand", marked, w.ints(1, 1, size))), -1, e.count)
    return str(w.op("Where", w.op("Cast", kept, to=TensorProto.BOOL), scores, w.number(0.0)))


def _filled(value: float) -> TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array([value], np.float32))
