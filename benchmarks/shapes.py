"""The two Llama-shaped decoders that are timed, and the bytes that a decode step of them must read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FORMATS = ("f32", "bf16", "int8", "int4")
CONTEXTS = (128, 2048)
PROBE_TOKENS = 16
"""Length of the token sequence whose logits are compared."""


@dataclass(frozen=True)
class Shape:
    """RMSNorm, rotary embedding of halves, grouped queries, gated MLP (SiLU), a head of its own (untied)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int = 32000
    eps: float = 1e-5
    theta: float = 10000.0
    context: int = 4096

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    def products(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows (outputs) and columns (inputs) of each weight matrix that a step multiplies by."""
        kv = self.kv_heads * self.head_dim
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.self_attn.q_proj.weight", self.hidden, self.hidden
            yield f"{layer}.self_attn.k_proj.weight", kv, self.hidden
            yield f"{layer}.self_attn.v_proj.weight", kv, self.hidden
            yield f"{layer}.self_attn.o_proj.weight", self.hidden, self.hidden
            yield f"{layer}.mlp.gate_proj.weight", self.inner, self.hidden
            yield f"{layer}.mlp.up_proj.weight", self.inner, self.hidden
            yield f"{layer}.mlp.down_proj.weight", self.hidden, self.inner
        yield "lm_head.weight", self.vocab, self.hidden

    def vectors(self) -> Iterator[str]:
        """Names of the norms' weights, [hidden] each."""
        for i in range(self.layers):
            yield f"model.layers.{i}.input_layernorm.weight"
            yield f"model.layers.{i}.post_attention_layernorm.weight"
        yield "model.norm.weight"

    def cache_bytes(self, context: int, element: int) -> int:
        """Bytes of keys and values of `context` positions, `element` bytes each, of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context * element


SHAPES = {
    "125m": Shape("125m", layers=12, hidden=768, heads=12, kv_heads=12, inner=2048),
    "1.1b": Shape("1.1b", layers=22, hidden=2048, heads=32, kv_heads=4, inner=5632),
}
