"""Rotary tables: frequencies with their published scalings, and the nodes that make cosines and sines.

Sources: RoFormer (base), Llama 3.1's model card (llama3), the YaRN paper, section 3.2 (yarn), position
interpolation (linear).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mapper.zoo.config import Rope
from mapper.zoo.writer import Writer

Array = npt.NDArray[np.float64]


def frequencies(rope: Rope) -> Array:
    """[width / 2] radians per position."""
    base = rope.theta ** (-np.arange(0, rope.width, 2) / rope.width)
    kind = rope.scaling.get("rope_type") or rope.scaling.get("type") or "default"
    if kind == "linear":
        return np.asarray(base / rope.scaling["factor"])
    if kind == "llama3":
        return _by_wavelength(rope, base)
    if kind == "yarn":
        return _by_number(rope, base)
    return np.asarray(base)


def _by_wavelength(rope: Rope, base: Array) -> Array:
    s = rope.scaling
    original, low, high = (
        s[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = original * base / (2 * math.pi)
    if high == low:
        return np.where(turns < low, base / s["factor"], base)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - smooth) * base / s["factor"] + smooth * base)


def _by_number(rope: Rope, base: Array) -> Array:
    s, half = rope.scaling, rope.width // 2
    original = s["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        return rope.width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(float(s["beta_fast"])), pair(float(s["beta_slow"]))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return np.asarray(ramp * base / s["factor"] + (1 - ramp) * base)


def _growth(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def magnitude(rope: Rope) -> float:
    """The factor of cosines and sines: yarn's attention factor."""
    s = rope.scaling
    if (s.get("rope_type") or s.get("type")) != "yarn":
        return 1.0
    if "mscale" in s and "mscale_all_dim" in s:
        return _growth(s["factor"], s["mscale"]) / _growth(s["factor"], s["mscale_all_dim"])
    return _growth(s["factor"], 1.0)


def score_factor(rope: Rope | None) -> float:
    """The factor of attention scores that latent attention with yarn has."""
    if rope is None or "mscale_all_dim" not in rope.scaling:
        return 1.0
    return _growth(rope.scaling["factor"], rope.scaling["mscale_all_dim"]) ** 2


def tables(w: Writer, rope: Rope, positions: str) -> tuple[str, str]:
    """(cosines, sines) [batch, sequence, width / 2] in the activations' type; `positions` is f32 [batch,
    sequence, 1]."""
    angle = w.op("Mul", positions, w.constant(frequencies(rope).astype(np.float32)))
    made = []
    for kind in ("Cos", "Sin"):
        table = w.op(kind, angle)
        if (factor := magnitude(rope)) != 1.0:
            table = w.op("Mul", table, w.number(factor, "f32"))
        made.append(w.cast(str(table)))
    return made[0], made[1]


def rotate(w: Writer, rope: Rope, x: str, made: tuple[str, str]) -> str:
    """x [batch, heads, sequence, head] with its first columns turned."""
    attrs = {"interleaved": int(rope.interleaved), "rotary_embedding_dim": rope.width}
    return str(w.op("RotaryEmbedding", x, *made, **attrs))
