"""A small Llama-style decoder in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The parameter names follow Hugging Face's Llama, so that the exported graphs read like any other export.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = list[tuple[Tensor, Tensor]]
AttentionStyle = Literal["manual", "sdpa"]


@dataclass(frozen=True)
class Config:
    """The model's dimensions."""

    vocab_size: int = 2048
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 32
    ffn_dim: int = 704
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, dim: int, eps: float, style: AttentionStyle) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``."""
        if self.style == "sdpa":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate_half(x: Tensor) -> Tensor:
    """Half-rotation of Llama's rotary embedding: ``(a, b)`` becomes ``(-b, a)``."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((-second, first), dim=-1)


class Attention(nn.Module):
    """Grouped-query self-attention over a cache of keys and values."""

    def __init__(self, config: Config, style: AttentionStyle) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.style = style
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from ``x`` to itself and to ``past``; without a mask, causally."""
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        # This spelling, Hugging Face's, is the one that exporters recognise as a rotary embedding.
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
        if past is not None:
            key = torch.cat((past[0], key), dim=-2)
            value = torch.cat((past[1], value), dim=-2)
        present = (key, value)
        if mask is None or self.style == "sdpa":
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        else:
            key, value = self._repeat(key), self._repeat(value)
            scores = torch.matmul(query, key.transpose(2, 3)) * (1.0 / math.sqrt(self.head_dim)) + mask
            out = torch.matmul(F.softmax(scores, dim=-1), value)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), present

    def _repeat(self, x: Tensor) -> Tensor:
        """Give each query head its own copy of the key or value head that its group shares."""
        batch, heads, length, dim = x.shape
        groups = self.n_heads // self.n_kv_heads
        copies = x[:, :, None].expand(batch, heads, groups, length, dim)
        return copies.reshape(batch, heads * groups, length, dim)


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: Config, style: AttentionStyle) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps, style)
        self.self_attn = Attention(config, style)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps, style)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Apply the layer; also returns its keys and values, those of ``past`` included."""
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """The decoder without its output head."""

    inv_freq: Tensor

    def __init__(self, config: Config, style: AttentionStyle) -> None:
        super().__init__()
        self.style = style
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, style) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, style)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-exponents, persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """Hidden states after the last norm, and the keys and values of every layer."""
        x: Tensor = self.embed_tokens(input_ids)
        mask = None if attention_mask is None else self._mask(attention_mask, x)
        angles = position_ids.unsqueeze(-1).to(x.dtype) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        presents: Past = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, mask, None if past is None else past[index])
            presents.append(present)
        return self.norm(x), presents

    def _mask(self, attention_mask: Tensor, x: Tensor) -> Tensor:
        """Causal mask joined with the padding mask: boolean for the fused attention, else additive."""
        total, length = attention_mask.shape[1], x.shape[1]
        keys = torch.arange(total, device=x.device)
        queries = torch.arange(length, device=x.device) + (total - length)
        causal = keys[None, :] <= queries[:, None]
        allowed = causal[None, None] & attention_mask.to(torch.bool)[:, None, None, :]
        if self.style == "sdpa":
            return allowed
        # The least float instead of -inf keeps a row that may see nothing (padding) finite.
        return torch.where(allowed, 0.0, torch.finfo(x.dtype).min)


class TinyLlama(nn.Module):
    """The language model; the output head is the embedding itself (tied).

    ``style`` picks between two spellings of the same function: ``"manual"`` (matrix products, softmax and an
    additive mask) and ``"sdpa"`` (PyTorch's fused attention and RMS norm).
    """

    def __init__(self, config: Config | None = None, style: AttentionStyle = "sdpa") -> None:
        super().__init__()
        self.config = config or Config()
        self.model = Decoder(self.config, style)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Layer):
            residual = 0.02 / math.sqrt(2 * self.config.n_layers)
            nn.init.normal_(module.self_attn.o_proj.weight, std=residual)
            nn.init.normal_(module.mlp.down_proj.weight, std=residual)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Past]:
        """Logits for every position, and the keys and values of every layer.

        ``attention_mask`` covers the past and the new tokens; it is required wherever there is a past.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden, presents = self.model(input_ids, attention_mask, position_ids, past)
        return F.linear(hidden, self.model.embed_tokens.weight), presents
