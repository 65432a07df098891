"""Weights in the forms that PyTorch's products for the CPU take, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.peers.harness import Job
from benchmarks.shapes import Shape
from benchmarks.weights import F32, Matrix, Weights

Tensor = torch.Tensor
Pack = Callable[[Any], Any]
Product = Callable[..., Tensor]
BLOCK = 32


def form(job: Job) -> tuple[Pack, Product, torch.dtype]:
    """How a matrix [outputs, inputs] is packed, the product with a packed one, the type of activations."""
    if job.weights == "int8" and job.variant == "dynamic":
        torch.backends.quantized.engine = "x86"
        return _dynamic, lambda x, w: torch.ops.quantized.linear_dynamic(x, w), torch.float32
    if job.weights == "int8":
        return _int8, lambda x, w: torch.ops.aten._weight_int8pack_mm(x, *w), torch.bfloat16
    if job.weights == "int4":
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return _int4, lambda x, w: multiply(x, w[0], BLOCK, w[1]), torch.bfloat16
    kind = torch.float32 if job.weights == "f32" else torch.bfloat16
    return lambda array: torch.tensor(np.ascontiguousarray(array)).to(kind), F.linear, kind


def said(job: Job) -> str:
    """The precision in words."""
    if job.weights == "int8":
        if job.variant == "dynamic":
            return "dynamic int8 (x86), scale per output, activations per tensor"
        return "int8 weights, scale per output, bf16 activations"
    words = {
        "f32": "float32",
        "bf16": "bf16 weights and activations",
        "int4": "int4 blocks of 32, bf16 activations",
    }
    return words[job.weights]


def layer(source: Weights, shape: Shape, i: int, pack: Pack, kind: torch.dtype) -> dict[str, Any]:
    """The packed weights of a layer."""
    name = f"model.layers.{i}"

    def joined(*parts: str) -> Any:
        return pack(np.concatenate([source(f"{name}.{p}_proj.weight") for p in parts]))

    return {
        "attn_norm": torch.tensor(source(f"{name}.input_layernorm.weight"), dtype=kind),
        "ffn_norm": torch.tensor(source(f"{name}.post_attention_layernorm.weight"), dtype=kind),
        "qkv": joined("self_attn.q", "self_attn.k", "self_attn.v"),
        "o": joined("self_attn.o"),
        "gate_up": joined("mlp.gate", "mlp.up"),
        "down": joined("mlp.down"),
    }


def _rows(array: Any) -> tuple[Tensor, Tensor]:
    weight = torch.tensor(np.ascontiguousarray(array))
    scale = weight.abs().amax(dim=1) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def _dynamic(array: Any) -> Any:
    values, scale = _rows(array)
    zero = torch.zeros(len(scale), dtype=torch.int64)
    made = torch._make_per_channel_quantized_tensor(values, scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(made, None)


def _int8(array: Any) -> tuple[Tensor, Tensor]:
    values, scale = _rows(array)
    return values, scale.to(torch.bfloat16)


def _blocks(array: Any) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [N, K] of 0 to 15, and bf16 scales and zeros [N, K / 32]; weight = (q - 8) scale + zero."""
    weight = torch.tensor(np.ascontiguousarray(array)).unflatten(1, (-1, BLOCK))
    low, high = weight.amin(-1), weight.amax(-1)
    scale = ((high - low) / 15).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    values = torch.round((weight - zero.float()[..., None]) / scale.float()[..., None]) + 8
    return values.clamp(0, 15).to(torch.int32).flatten(1), scale, zero


def _int4(array: Any) -> tuple[Tensor, Tensor]:
    values, scale, zero = _blocks(array)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    return packed, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def stored(job: Job) -> Matrix:
    """The weights that the products take, dequantised; the embedding in the type of activations."""
    source, products = Weights.of(job.shape), {name for name, _, _ in job.shape.products()}

    def weight(name: str) -> F32:
        array = source(name)
        if job.weights == "bf16" or name not in products:
            kind = torch.float32 if job.weights == "int8" and job.variant == "dynamic" else torch.bfloat16
            return np.asarray(torch.tensor(np.ascontiguousarray(array)).to(kind).float().numpy())
        if job.weights == "int8":
            values, scale = _rows(array)
            scale = scale if job.variant == "dynamic" else scale.to(torch.bfloat16).float()
            return np.asarray((values.float() * scale[:, None]).numpy())
        codes, scales, zeros = (t.float() for t in _blocks(array))
        blocks = (codes.unflatten(1, (-1, BLOCK)) - 8) * scales[..., None] + zeros[..., None]
        return np.asarray(blocks.flatten(1).numpy())

    return weight
