"""Reference semantics of the transformer ops and their serving forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mapper.ir.reference import Step, meaning
from mapper.ir.reference_compute import erf, round_blocks, sigmoid, softmax
from mapper.ir.types import Array

ACTIVATION_MEANINGS: dict[str, Callable[[Array], Any]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "identity": lambda x: x,
}
"""Activation -> function of an array."""


@meaning("activation")
def _activation(s: Step) -> Array:
    return np.asarray(ACTIVATION_MEANINGS[s.attr("kind")](s.arg("x")))


@meaning("embed")
def _embed(s: Step) -> Array:
    return s.need("table")[s.arg("ids")]


@meaning("embed_at")
def _embed_at(s: Step) -> Array:
    first = int(s.arg("past_length")) + s.attr("offset")
    rows = np.take(s.need("table"), np.arange(first, first + s.attr("seq")), axis=0)
    return np.broadcast_to(rows, (s.attr("batch"), *rows.shape))


def _linear(s: Step, x: Array, name: str, bias: str, flag: str) -> Array:
    weight, offset = s.need(name), s.weight(bias)
    x = round_blocks(x, s.attr("round_block")) if s.attr("round_block") else x
    y = x @ (weight.T if s.attr(flag) else weight)
    return np.asarray(y if offset is None else y + offset)


@meaning("linear", "lm_head")
def _linear_op(s: Step) -> Array:
    return _linear(s, s.arg("x"), "weight", "bias", "transposed")


@meaning("mlp")
def _mlp(s: Step) -> Array:
    inner = _linear(s, s.arg("x"), "up", "up_bias", "up_transposed")
    return _linear(s, ACTIVATION_MEANINGS[s.attr("act")](inner), "down", "down_bias", "down_transposed")


@meaning("gated_mlp")
def _gated_mlp(s: Step) -> Array:
    gate = ACTIVATION_MEANINGS[s.attr("act")](_linear(s, s.arg("x"), "gate", "gate_bias", "gate_transposed"))
    up = _linear(s, s.arg("x"), "up", "up_bias", "up_transposed")
    return _linear(s, gate * up, "down", "down_bias", "down_transposed")


@meaning("packed_mlp")
def _packed_mlp(s: Step) -> Array:
    both = _linear(s, s.arg("x"), "gate_up", "gate_up_bias", "gate_up_transposed")
    half = both.shape[-1] // 2
    halves = s.attr("packing") == "halves"
    gate, up = (both[..., :half], both[..., half:]) if halves else (both[..., 0::2], both[..., 1::2])
    hidden = ACTIVATION_MEANINGS[s.attr("act")](gate) * up
    return _linear(s, hidden, "down", "down_bias", "down_transposed")


@meaning("norm")
def _norm(s: Step) -> Array:
    given = s.arg("x")
    x = given.astype(np.promote_types(given.dtype, np.float32))
    if s.attr("kind") == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(s.attr("eps")))
    weight, bias = s.weight("weight"), s.weight("bias")
    if weight is not None:
        y = y * (weight + s.attr("weight_offset"))
    return np.asarray((y if bias is None else y + bias).astype(given.dtype))


def _rotate(x: Array, cos: Array, sin: Array, style: str) -> Array:
    """x [..., r] rotated; cos and sin [..., r/2] one per pair."""
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if style == "half" else (x[..., 0::2], x[..., 1::2])
    first, second = a * cos - b * sin, b * cos + a * sin
    if style == "half":
        return np.concatenate([first, second], axis=-1)
    return np.stack([first, second], axis=-1).reshape(x.shape)


def _per_head(angles: Array) -> Array:
    return angles[:, None] if angles.ndim == 3 else angles


@meaning("rope")
def _rope(s: Step) -> Array:
    x, cos, sin, width = s.arg("x"), _per_head(s.arg("cos")), _per_head(s.arg("sin")), s.attr("rotary_dim")
    turned, passed = x[..., :width], x[..., width:]
    if cos.shape[-1] == width // 2:
        turned = _rotate(turned, cos, sin, s.attr("style"))
    else:
        quarter = _rotate(turned, np.zeros_like(cos[..., ::2]), np.ones_like(sin[..., ::2]), s.attr("style"))
        turned = turned * cos + quarter * sin
    return np.concatenate([turned, passed], axis=-1)


@meaning("rope_at")
def _rope_at(s: Step) -> Array:
    x, width, first = s.arg("x"), s.attr("rotary_dim"), int(s.arg("past_length"))
    cos, sin = np.take(s.need("table"), np.arange(first, first + x.shape[2]), axis=1)
    return np.concatenate([_rotate(x[..., :width], cos, sin, s.attr("style")), x[..., width:]], axis=-1)


@meaning("scale_at")
def _scale_at(s: Step) -> Array:
    x, axis, first = s.arg("x"), s.attr("axis"), int(s.arg("past_length"))
    factors = np.take(s.need("table"), np.arange(first, first + x.shape[axis]))
    return np.asarray(x * factors.reshape(-1, *[1] * (-axis - 1)).astype(x.dtype))


@meaning("kv_append")
def _kv_append(s: Step) -> Array:
    return np.concatenate([s.arg("past"), s.arg("new")], axis=2)


@meaning("kv_update")
def _kv_update(s: Step) -> Array:
    result, new = s.arg("past").copy(), s.arg("new")
    rows = np.broadcast_to(s.arg("rows"), (result.shape[0], new.shape[2]))
    for b, places in enumerate(rows):
        for token, place in enumerate(places):
            result[b, :, place] = new[b, :, token]
    return np.asarray(result)


@meaning("cache_append")
def _cache_append(s: Step) -> Array:
    cache, new, first = s.arg("cache").copy(), s.arg("new"), int(s.arg("past_length"))
    if first < 0 or first + new.shape[2] > cache.shape[2]:
        raise ValueError(f"rows {first}..{first + new.shape[2]} of a cache of {cache.shape[2]}")
    cache[:, :, first : first + new.shape[2]] = new
    return cache


def _scores(s: Step, q: Array, k: Array) -> Array:
    shared = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = (q @ np.swapaxes(shared, 2, 3)) * q.dtype.type(s.attr("scale"))
    cap = s.attr("softcap")
    return np.asarray(np.tanh(scores / cap) * cap if cap else scores)


def _weighted(s: Step, scores: Array, v: Array) -> Array:
    sinks = s.optional("sinks")
    extra = None if sinks is None else sinks.reshape(1, -1, 1, 1)
    probabilities = softmax(scores, -1, extra)
    return np.asarray(probabilities @ np.repeat(v, scores.shape[1] // v.shape[1], axis=1))


def position_mask(
    queries: Array, keys: int, causal: bool, window: int, slopes: tuple[float, ...] | None, chunk: int = 0
) -> tuple[Array, Array | None]:
    """(allowed [S, keys], bias [H, S, keys] or None) for queries at the given positions."""
    t, position = np.arange(keys)[None, :], queries[:, None]
    allowed = (t <= position) if causal else np.ones((len(queries), keys), bool)
    if window:
        allowed = allowed & (t > position - window)
    if chunk:
        allowed = allowed & (t // chunk == position // chunk)
    if slopes is None:
        return allowed, None
    return allowed, np.array(slopes)[:, None, None] * (t - position)[None]


def _masked(scores: Array, allowed: Array, bias: Array | None) -> Array:
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    return np.where(allowed, scores, scores.dtype.type(-np.inf))


def _attended(
    s: Step, q: Array, k: Array, v: Array, slopes: tuple[float, ...] | None, chunk: int = 0
) -> Array:
    mask, scores = s.optional("mask"), _scores(s, q, k)
    if mask is None:
        queries = np.arange(q.shape[2]) + k.shape[2] - q.shape[2]
        rule = position_mask(queries, k.shape[2], s.attr("causal"), s.attr("window"), slopes, chunk)
        scores = _masked(scores, *rule)
    elif mask.dtype == np.bool_:
        scores = _masked(scores, mask, None)
    else:
        scores = scores + mask
    return _weighted(s, scores, v)


@meaning("attention")
def _attention(s: Step) -> Array:
    return _attended(s, s.arg("q"), s.arg("k"), s.arg("v"), s.attr("slopes"), s.attr("chunk"))


@meaning("latent_attention")
def _latent_attention(s: Step) -> Array:
    q = s.arg("q")
    return _attended(s, q, *_latent_rows(s, q, s.arg("latent"), s.arg("rope_key")), None)


def _latent_rows(s: Step, q: Array, latent: Array, rope_key: Array) -> tuple[Array, Array]:
    """Keys and values of all heads."""
    weight, heads, nope = s.need("weight"), q.shape[1], s.attr("nope_dim")
    batch, _, tokens, _ = latent.shape
    both = latent[:, 0] @ (weight.T if s.attr("transposed") else weight)
    both = both.reshape(batch, tokens, heads, -1).transpose(0, 2, 1, 3)
    shared = np.broadcast_to(rope_key, (batch, heads, tokens, rope_key.shape[3]))
    return np.concatenate([both[..., :nope], shared], -1), both[..., nope:]


@meaning("cached_attention")
def _cached_attention(s: Step) -> Array:
    filled = int(s.arg("past_length")) + s.arg("q").shape[2]
    k, v = s.arg("k")[:, :, :filled], s.arg("v")[:, :, :filled]
    return _over_cache(s, k, v, s.attr("slopes"), s.attr("chunk"))


@meaning("cached_latent_attention")
def _cached_latent_attention(s: Step) -> Array:
    q = s.arg("q")
    filled = int(s.arg("past_length")) + q.shape[2]
    k, v = _latent_rows(s, q, s.arg("latent")[:, :, :filled], s.arg("rope_key")[:, :, :filled])
    return _over_cache(s, k, v, None)


def _over_cache(s: Step, k: Array, v: Array, slopes: tuple[float, ...] | None, chunk: int = 0) -> Array:
    q, first = s.arg("q"), int(s.arg("past_length"))
    queries = np.arange(first, k.shape[2])
    rule = position_mask(queries, k.shape[2], True, s.attr("window"), slopes, chunk)
    return _weighted(s, _masked(_scores(s, q, k), *rule), v)


@meaning("sample")
def _sample(s: Step) -> Array:
    return np.asarray(np.argmax(s.arg("logits"), axis=-1))
