"""What the lowering needs to know of a decoder: read from the serving form by `extract.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Matrix:
    """Columns begin..end of a weight matrix with `k` inputs. `slot`: a symbol, or a slot of the layers'
    table.

    Stored [k, columns], or [columns, k] with `transposed`. `op` is the row of the ops table that it belongs
    to.
    """

    slot: str
    transposed: bool
    k: int
    begin: int
    end: int
    op: int

    @property
    def n(self) -> int:
        """Outputs."""
        return self.end - self.begin


@dataclass(frozen=True)
class Norm:
    """An RMS norm: gain slot (None: no gain), gain offset, eps."""

    gain: str | None
    offset: float
    eps: float
    op: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `table` is the symbol of cosines and sines [2, L, rotary/2]."""

    table: str
    style: Literal["half", "interleaved"]
    rotary: int
    op: int


@dataclass(frozen=True)
class Attention:
    """Attention of one layer. `rope` None: no rotary embedding."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    op: int
    k_rope_op: int  # that of the keys' rotary embedding; `rope.op` is the queries'
    k_append_op: int
    v_append_op: int
    residual_op: int


@dataclass(frozen=True)
class Mlp:
    """A gated MLP with silu."""

    gate: Matrix
    up: Matrix
    down: Matrix
    op: int
    residual_op: int


@dataclass(frozen=True)
class Decoder:
    """A pre-norm decoder: embed, layers x (norm, attention, +, norm, gated mlp, +), norm, head.

    `table[slot][i]` is the symbol that stands for `slot` in layer i; a name outside the table is itself a
    symbol.
    `norm_offset` is added to gains. Shapes: batch B, tokens per run S, cache rows L.
    """

    batch: int
    tokens: int
    context: int
    width: int
    vocabulary: int
    layers: int
    embedding: str
    embed_op: int
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    final_norm: Norm
    head: Matrix
    table: dict[str, tuple[str, ...]]

    def symbol(self, slot: str, layer: int) -> str:
        """The weight symbol of `slot` in layer `layer`."""
        return self.table[slot][layer] if slot in self.table else slot
