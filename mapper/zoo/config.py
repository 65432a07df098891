"""Public model configurations, read into one form.

`configs.json` holds the published fields under their usual names (those of a Hugging Face config.json) with
their source, and the published number of parameters with its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mapper.errors import UsageError
from mapper.hints import did_you_mean

_FILE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `width` columns of a head; `scaling` as published."""

    theta: float
    width: int
    interleaved: bool = False
    scaling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: ranks of queries (0: none) and of keys and values, widths per head."""

    query: int
    rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many, how many are chosen, their inner width, and how they are chosen."""

    count: int
    chosen: int
    inner: int
    scoring: str = "softmax"  # softmax, sigmoid, topk_softmax
    normalise: bool = False
    correction: bool = False
    groups: int = 0
    top_groups: int = 0
    scale: float = 1.0
    shared: int = 0  # inner width of the shared expert, 0: none
    biases: bool = False
    limit: float = 0.0  # of the clamped, interleaved gate of gpt-oss; 0: plain gate and up
    share_input: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer: window and chunk of its attention (0: all), rotary embedding, experts or MLP."""

    window: int = 0
    chunk: int = 0
    rope: Rope | None = None
    experts: Experts | None = None
    inner: int = 0
    tuned: bool = False  # queries grow with the position's logarithm (Llama 4, layers without rope)


@dataclass(frozen=True)
class Config:
    """A decoder. `norm`: rms, rms1 (1 + weight) or layer; `qk_norm`: none, rms, rms1, l2 (after rope).

    `tuning`: floor_scale and attn_scale of Llama 4's config.json, of its layers that are `tuned`."""

    name: str
    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    layers: tuple[Layer, ...]
    act: str = "silu"
    gated: bool = True
    packed: bool = False
    norm: str = "rms"
    eps: float = 1e-5
    post_norms: bool = False
    qk_norm: str = "none"
    qkv_bias: bool = False
    bias: bool = False
    sinks: bool = False
    tied: bool = False
    positions: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    latent: Latent | None = None
    tuning: tuple[float, float] = (8192.0, 0.1)
    note: str = ""

    @property
    def value_dim(self) -> int:
        """Width of one head's values."""
        return self.latent.value if self.latent else self.head_dim

    def cache_bytes(self, element: int = 2) -> int:
        """Bytes of key-value cache per token, all layers, at `element` bytes each."""
        if self.latent:
            return len(self.layers) * (self.latent.rank + self.latent.rope) * element
        return len(self.layers) * 2 * self.kv_heads * self.head_dim * element


@dataclass(frozen=True)
class Published:
    """The published number of parameters, its source, and what it counts differently."""

    params: int
    source: str
    note: str = ""


@cache
def _document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return loaded


def names() -> tuple[str, ...]:
    """All models of the zoo."""
    return tuple(_document()["models"])


def raw(name: str) -> Mapping[str, Any]:
    """The published fields of a model. Raises UsageError with close names where there is none."""
    models: dict[str, Any] = _document()["models"]
    if name not in models:
        hint = did_you_mean(name, models) or "; see `mapper zoo list`"
        raise UsageError(f"no model called {name[:60]!r} in the zoo{hint}")
    found: Mapping[str, Any] = models[name]
    return found


def published(name: str) -> Published:
    """The published number of parameters."""
    entry = raw(name)["published_params"]
    return Published(entry["value"], entry["source"], entry.get("note", ""))
