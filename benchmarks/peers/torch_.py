"""PyTorch: a Llama decoder in plain operators with static caches; Q/K/V and gate/up are one product each.

Variants: `compiled` (torch.compile of a layer, which all layers share), `eager`; for int8 `dynamic` is
PyTorch's dynamic quantisation (eager, float32 between products). f32: float32 all through. bf16:
weights, activations, keys and values. int8 (compiled, eager): a scale per output, bf16 activations
(_weight_int8pack_mm). int4: blocks of 32, bf16 activations (_weight_int4pack_mm_for_cpu).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.peers import torch_weights
from benchmarks.peers.harness import Job, Peer, main
from benchmarks.weights import EMBEDDING, Weights

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, in float32 inside."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves; x [heads, width]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def make_layer(job: Job, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One layer as a function of its weights, caches and the position; all layers share it."""
    s = job.shape
    q, kv = s.hidden, s.kv_heads * s.head_dim

    def layer(x: Tensor, w: Any, k: Tensor, v: Tensor, at: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        flat = product(norm(x, w["attn_norm"], s.eps), w["qkv"])
        cos, sin = turn[0].index_select(0, at), turn[1].index_select(0, at)
        queries = rotate(flat[:, :q].view(s.heads, s.head_dim), cos, sin)
        keys = rotate(flat[:, q : q + kv].view(s.kv_heads, s.head_dim), cos, sin)
        k.index_copy_(2, at, keys.view(1, s.kv_heads, 1, s.head_dim))
        v.index_copy_(2, at, flat[:, q + kv :].view(1, s.kv_heads, 1, s.head_dim))
        seen = F.scaled_dot_product_attention(
            queries.view(1, s.heads, 1, s.head_dim), k, v, mask, enable_gqa=s.heads != s.kv_heads
        )
        x = x + product(seen.view(1, s.hidden), w["o"])
        gate, up = product(norm(x, w["ffn_norm"], s.eps), w["gate_up"]).chunk(2, -1)
        return x + product(F.silu(gate) * up, w["down"])

    return layer


class Torch:
    """The whole decoder."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        s, source = job.shape, Weights.of(job.shape)
        self.shape, self.room, self.past = s, job.room, 0
        pack, product, self.dtype = torch_weights.form(job)
        self.product = product
        self.table = torch.tensor(source(EMBEDDING), dtype=self.dtype)
        self.layers = [torch_weights.layer(source, s, i, pack, self.dtype) for i in range(s.layers)]
        self.head = pack(source("lm_head.weight"))
        self.final = torch.tensor(source("model.norm.weight"), dtype=self.dtype)
        angle = np.arange(job.room)[:, None] * s.theta ** (-np.arange(s.head_dim // 2) / (s.head_dim // 2))
        self.turn = torch.tensor(np.stack([np.cos(angle), np.sin(angle)]), dtype=torch.float32)
        size = (s.layers, 2, 1, s.kv_heads, job.room, s.head_dim)
        self.caches = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=self.dtype)
        self.mask = torch.full((1, 1, 1, job.room), -torch.inf, dtype=self.dtype)
        self.layer = make_layer(job, product)
        if compiled(job):
            self.layer = torch.compile(self.layer, dynamic=False, fullgraph=True)

    def fill(self, context: int) -> None:
        """The caches hold random content already."""
        self.past = context
        self.mask[..., :context] = 0

    def step(self, token: int) -> Any:
        """Logits [vocab]."""
        at = torch.tensor([self.past])
        self.mask[..., self.past] = 0
        self.past += 1
        x = self.table[token : token + 1]
        for weights, cache in zip(self.layers, self.caches, strict=True):
            x = self.layer(x, weights, cache[0], cache[1], at, self.mask, self.turn)
        return self.product(norm(x, self.final, self.shape.eps), self.head).float().numpy()[0]


def compiled(job: Job) -> bool:
    """Whether layers are compiled."""
    return job.variant == "compiled"


def describe(job: Job) -> dict[str, Any]:
    """Versions and what precision means here."""
    kv = "f32" if torch_weights.form(job)[2] == torch.float32 else "bf16"
    return {"versions": {"torch": torch.__version__}, "kv": kv, "precision": torch_weights.said(job)}


PEER = Peer(
    "torch",
    ("f32", "bf16", "int8", "int4"),
    Torch,
    describe,
    torch_weights.stored,
    ("compiled", "eager", "dynamic"),
)

if __name__ == "__main__":
    main(PEER)
