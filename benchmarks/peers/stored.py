"""Weights read back, dequantised, from the model builder's ONNX files. Q, K and V are one matrix there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import Shape
from benchmarks.weights import F32, Matrix, Weights

Rows = Callable[[str], Any]
"""Name of a product in the file -> [outputs, inputs]."""


def nbits_weights(shape: Shape, model: Path) -> Matrix:
    """Of MatMulNBits: symmetric blocks along the inputs, low nibble first, the middle of the range is 0."""
    tensor = _tensors(model)

    def rows(name: str) -> Any:
        packed = next(p for p in (f"{name}.MatMul.weight_Q4", f"{name}.MatMul.weight_Q8") if tensor.has(p))
        values, scales = tensor(packed), tensor(f"{name}.MatMul.weight_scales")
        zero = 128
        if packed.endswith("_Q4"):
            values, zero = np.stack([values & 15, values >> 4], axis=-1), 8
        values = values.reshape(*scales.shape, -1).astype(np.float32) - zero
        return (values * scales[..., None]).reshape(len(scales), -1)

    return _named(shape, rows)


def dynamic_weights(shape: Shape, model: Path) -> Matrix:
    """Of onnxruntime's dynamic quantisation: [inputs, outputs], a scale and zero per output."""
    tensor = _tensors(model)

    def rows(name: str) -> Any:
        values = tensor(f"{name}.MatMul.weight_quantized").astype(np.float32)
        zero = tensor(f"{name}.MatMul.weight_zero_point").astype(np.float32)
        return ((values - zero) * tensor(f"{name}.MatMul.weight_scale")).T

    return _named(shape, rows)


def _named(shape: Shape, rows: Rows) -> Matrix:
    products, original = {name for name, _, _ in shape.products()}, Weights.of(shape)
    kept = cache(rows)
    kv = shape.kv_heads * shape.head_dim
    bounds = {"q": (0, shape.hidden), "k": (shape.hidden, shape.hidden + kv)}
    bounds["v"] = (shape.hidden + kv, shape.hidden + 2 * kv)

    def weight(name: str) -> F32:
        if name not in products:
            return original(name)
        if name == "lm_head.weight":
            return np.asarray(rows("lm_head"), np.float32)
        _, _, layer, part, kind, _ = name.split(".")
        if part == "mlp":
            return np.asarray(rows(f"model.layers.{layer}.mlp.{kind}"), np.float32)
        if kind == "o_proj":
            return np.asarray(rows(f"model.layers.{layer}.attn.o_proj"), np.float32)
        if kind == "q_proj":
            kept.cache_clear()
        low, high = bounds[kind[0]]
        return np.asarray(kept(f"model.layers.{layer}.attn.qkv_proj")[low:high], np.float32)

    return weight


class _tensors:
    """Initializers of a model by name, read when asked for."""

    def __init__(self, model: Path) -> None:
        import onnx

        graph = onnx.load(str(model), load_external_data=False).graph
        self.found, self.folder = {t.name: t for t in graph.initializer}, model.parent

    def has(self, name: str) -> bool:
        """Whether there is one."""
        return name in self.found

    def __call__(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.found[name], str(self.folder))
