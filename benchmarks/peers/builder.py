"""ONNX models of onnxruntime-genai's model builder, and what onnxruntime quantises to dynamic int8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import hf
from benchmarks.shapes import Shape
from benchmarks.weights import folder, making

PRECISIONS = {"f32": "fp32", "int8": "int8", "int4": "int4"}
BLOCK, ACCURACY = 32, 4
"""Weights per scale, and the accuracy level (4: activations in int8) of int8 and int4."""


def model(shape: Shape, weights: str) -> Path:
    """The builder's folder (model.onnx, genai_config.json); made if it is not there yet."""
    base = folder(shape) / f"genai-{weights}"
    if not base.is_dir():
        source = hf.model(shape)
        with making(base) as made:
            _build(source, PRECISIONS[weights], made)
    return base


def _build(source: Path, precision: str, into: Path) -> None:
    asked = ["-i", source, "-o", into, "-p", precision, "-e", "cpu", "-c", into / ".cache"]
    if precision != "fp32":
        asked += ["--extra_options", f"block_size={BLOCK}", f"accuracy_level={ACCURACY}"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, asked)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the model builder failed: {done.stderr.strip()[-600:]}")


def dynamic(shape: Shape) -> Path:
    """The builder's float32 model with products in dynamic int8, a scale per output; made if not there."""
    base = folder(shape) / "ort-int8"
    if not base.is_dir():
        source = model(shape, "f32") / "model.onnx"
        with making(base) as made:
            _quantise(source, made / "model.onnx")
    return base / "model.onnx"


def _quantise(source: Path, into: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source, into, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
