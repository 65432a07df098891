"""Whole decoders in half precision: loaded, recognised, and run close to the same decoder in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mapper.driver import run
from mapper.frontend.load import load
from mapper.ir.reference import evaluate
from mapper.ir.types import numpy_dtype
from tests.frontend.tiny import Array, Options, decoder, feeds, oracle, saved, worst

CODES = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LIMITS = {"f16": 1e-2, "bf16": 8e-2}  # some rounding steps of 2^-11 and of 2^-8


def halved(model: onnx.ModelProto, dtype: str, islands: bool) -> onnx.ModelProto:
    """The model with every float32 tensor in half precision; `islands`: softmax alone stays in f32."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    code = CODES[dtype]
    for tensor in out.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(_half(numpy_helper.to_array(tensor), dtype, tensor.name))
    for value in [*out.graph.input, *out.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = code
    nodes: list[onnx.NodeProto] = []
    for node in out.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = code
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_half(numpy_helper.to_array(attribute.t), dtype, ""))
        if node.op_type == "Softmax" and islands:
            before, after = f"{node.output[0]}.wide", node.output[0]
            nodes.append(helper.make_node("Cast", [node.input[0]], [before], to=TensorProto.FLOAT))
            node.input[0], node.output[0] = before, f"{after}.float"
            nodes += [node, helper.make_node("Cast", [f"{after}.float"], [after], to=code)]
        else:
            nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    return out


def _half(array: Array, dtype: str, name: str) -> onnx.TensorProto:
    with np.errstate(over="ignore"):
        clipped = np.clip(array, -6e4, 6e4) if dtype == "f16" else np.clip(array, -3e38, 3e38)
    return numpy_helper.from_array(clipped.astype(numpy_dtype(dtype)), name)


def rounded(tensors: dict[str, Array], dtype: str) -> dict[str, Array]:
    """Float32 tensors in half precision."""
    return {k: v.astype(numpy_dtype(dtype)) if v.dtype == np.float32 else v for k, v in tensors.items()}


def widened(tensors: dict[str, npt.NDArray[np.generic]]) -> dict[str, Array]:
    """All tensors in float32."""
    return {k: v.astype(np.float32) for k, v in tensors.items()}


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("islands", [False, True])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_decoder_in_half_precision(dtype: str, islands: bool, norm: str, tmp_path: Path) -> None:
    model = decoder(Options(norm=norm))
    given = rounded(feeds(), dtype)
    exact = oracle(
        model,
        widened({k: v for k, v in given.items()})
        | {k: v for k, v in feeds().items() if v.dtype != np.float32},
    )
    graph = load(saved(halved(model, dtype, islands), tmp_path))
    made = [op.mnemonic for op in graph.ops()]
    for kind in ("attention", "norm", "rope", "gated_mlp"):
        assert kind in made
    for got in (evaluate(graph, given), run(graph, given)):
        assert all(v.dtype == numpy_dtype(dtype) for v in got.values())
        assert worst(widened(got), exact) < LIMITS[dtype]
