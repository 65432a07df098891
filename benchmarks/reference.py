"""Logits in float64 from a function that gives the weights: what every decoder's logits are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.shapes import Shape
from benchmarks.weights import EMBEDDING, Matrix, Weights, folder, probe_tokens

F64 = npt.NDArray[np.float64]


def _norm(x: F64, weight: Any, eps: float) -> F64:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight, np.float64)


def _rotate(x: F64, theta: float) -> F64:
    """Rotary embedding of halves; x [heads, positions, width], positions from 0."""
    half = x.shape[2] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def _attention(shape: Shape, x: F64, product: Any, layer: str) -> F64:
    def heads(name: str, count: int) -> F64:
        flat = product(f"{layer}.self_attn.{name}_proj.weight", x)
        return np.asarray(flat.reshape(len(x), count, shape.head_dim).transpose(1, 0, 2))

    group = shape.heads // shape.kv_heads
    q = _rotate(heads("q", shape.heads), shape.theta)
    k = np.repeat(_rotate(heads("k", shape.kv_heads), shape.theta), group, axis=0)
    v = np.repeat(heads("v", shape.kv_heads), group, axis=0)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(shape.head_dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    merged = (share @ v).transpose(1, 0, 2).reshape(len(x), -1)
    return np.asarray(product(f"{layer}.self_attn.o_proj.weight", merged))


def logits(shape: Shape, tokens: list[int], weight: Matrix) -> F64:
    """Logits [positions, vocab] of a sequence from an empty cache."""

    def product(name: str, x: F64) -> F64:
        return np.asarray(x @ weight(name).astype(np.float64).T)

    x = np.asarray(weight(EMBEDDING)[tokens], np.float64)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        y = _norm(x, weight(f"{layer}.input_layernorm.weight"), shape.eps)
        x = x + _attention(shape, y, product, layer)
        y = _norm(x, weight(f"{layer}.post_attention_layernorm.weight"), shape.eps)
        gate = product(f"{layer}.mlp.gate_proj.weight", y)
        hidden = gate / (1 + np.exp(-gate)) * product(f"{layer}.mlp.up_proj.weight", y)
        x = x + product(f"{layer}.mlp.down_proj.weight", hidden)
    return product("lm_head.weight", _norm(x, weight("model.norm.weight"), shape.eps))


def cached_logits(shape: Shape, name: str, weight: Matrix | None = None) -> F64:
    """Logits of the probe sequence, kept in the cache as NAME.npy; on the original weights by default."""
    path: Path = folder(shape) / "reference" / f"{name}.npy"
    if not path.is_file():
        found = logits(shape, probe_tokens(shape), weight or Weights.of(shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(".part.npy")
        np.save(made, found)
        made.rename(path)
    return np.asarray(np.load(path), np.float64)


def relative_error(found: Any, expected: F64) -> float:
    """|found - expected| / |expected|, L2 norms over all positions and logits."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))
