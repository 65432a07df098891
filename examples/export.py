"""Export the example model to ONNX, with a key-value cache: two graphs that share one file of weights.

* ``tiny-llama-op18.onnx``: opset 18, attention spelled out (MatMul, Softmax, an additive mask);
* ``tiny-llama-op23.onnx``: opset 23, with the operators Attention, RMSNormalization and RotaryEmbedding;
* ``tiny-llama.weights.bin``: the float32 weights of both, each tensor once and at the same place for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from model import AttentionStyle, Config, TinyLlama
from onnx import numpy_helper

#: File name of each graph, by the style of the model that it is exported from.
GRAPHS: dict[AttentionStyle, str] = {"manual": "tiny-llama-op18.onnx", "sdpa": "tiny-llama-op23.onnx"}
OPSETS: dict[AttentionStyle, int] = {"manual": 18, "sdpa": 23}
WEIGHTS = "tiny-llama.weights.bin"

#: The weights start on page boundaries, so that a runtime can map the file.
ALIGNMENT = 4096
#: Dimension of the attention mask, and of the caches that come out.
TOTAL = "past + sequence"


def cache_names(prefix: str, config: Config) -> list[str]:
    """Names of the key and value tensors of every layer."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(config.n_layers) for kind in ("key", "value")]


def export_graph(model: TinyLlama, style: AttentionStyle) -> onnx.ModelProto:
    """The model's graph as PyTorch's exporter writes it, weights included."""
    config = model.config
    batch, sequence, past = 2, 3, 5
    caches = [
        (
            torch.zeros(batch, config.n_kv_heads, past, config.head_dim),
            torch.zeros(batch, config.n_kv_heads, past, config.head_dim),
        )
        for _ in range(config.n_layers)
    ]
    program = torch.onnx.export(
        model,
        (
            torch.zeros(batch, sequence, dtype=torch.int64),
            torch.ones(batch, past + sequence, dtype=torch.int64),
            torch.arange(past, past + sequence).repeat(batch, 1),
            caches,
        ),
        dynamo=True,
        opset_version=OPSETS[style],
        input_names=[
            "input_ids",
            "attention_mask",
            "position_ids",
            *cache_names("past_key_values", config),
        ],
        output_names=["logits", *cache_names("present", config)],
        dynamic_shapes=(
            {0: "batch", 1: "sequence"},
            {0: "batch", 1: "total"},
            {0: "batch", 1: "sequence"},
            [({0: "batch", 2: "past"}, {0: "batch", 2: "past"})] * config.n_layers,
        ),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("the exporter returned no program")
    return program.model_proto


def tidy(proto: onnx.ModelProto) -> None:
    """Name lengths alike, and drop the exporter's notes (they hold paths and stack traces)."""
    graph = proto.graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("total", "sequence + past"):
                dim.dim_param = TOTAL
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for initializer in graph.initializer:
        initializer.doc_string = ""
        del initializer.metadata_props[:]
    graph.doc_string = proto.doc_string = ""
    del graph.metadata_props[:]
    del proto.metadata_props[:]


def rename_weights(proto: onnx.ModelProto, model: TinyLlama) -> None:
    """Give the weights that the exporter transposed (and numbered) the names of their parameters.

    A linear layer's weight appears as the right operand of a MatMul, that is transposed: ``X.weight`` becomes
    ``X.MatMul.weight``.  Both graphs then name their weights alike, whatever the exporter numbered.
    """
    transposed = {
        name: parameter.detach().T for name, parameter in model.named_parameters() if parameter.ndim == 2
    }
    names: dict[str, str] = {}
    for initializer in proto.graph.initializer:
        if len(initializer.dims) != 2 or initializer.name in transposed:
            continue
        array = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        (match,) = [name for name, value in transposed.items() if torch.equal(value, array)]
        names[initializer.name] = match.removesuffix("weight") + "MatMul.weight"
        initializer.name = names[initializer.name]
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for value in proto.graph.value_info:
        value.name = names.get(value.name, value.name)


def is_weight(initializer: onnx.TensorProto) -> bool:
    """Whether an initializer is a parameter: those alone go to the weights file."""
    return initializer.name.endswith(".weight")


def write_partial(path: Path, data: bytes) -> Path:
    """Write a file under a temporary name beside its own."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    return temporary


def externalise(protos: list[onnx.ModelProto]) -> bytes:
    """Move the weights of all graphs into one run of bytes; returns it."""
    blob = bytearray()
    places: dict[str, tuple[int, bytes]] = {}
    for proto in protos:
        for initializer in sorted(filter(is_weight, proto.graph.initializer), key=lambda tensor: tensor.name):
            data = numpy_helper.to_array(initializer).tobytes()
            if initializer.name not in places:
                blob.extend(bytes(-len(blob) % ALIGNMENT))
                places[initializer.name] = len(blob), data
                blob.extend(data)
            offset, stored = places[initializer.name]
            if stored != data:
                raise ValueError(f"the graphs disagree about {initializer.name}")
            initializer.ClearField("raw_data")
            initializer.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", offset), ("length", len(data))):
                initializer.external_data.add(key=key, value=str(value))
    names = {tuple(sorted(t.name for t in filter(is_weight, proto.graph.initializer))) for proto in protos}
    if len(names) != 1:
        raise ValueError("the graphs do not have the same weights")
    return bytes(blob)


def export(load: Callable[[Path, AttentionStyle], TinyLlama], checkpoint: Path, folder: Path) -> None:
    """Export a checkpoint to ``folder``: both graphs and the weights."""
    protos = []
    for style in GRAPHS:
        model = load(checkpoint, style)
        proto = export_graph(model, style)
        tidy(proto)
        rename_weights(proto, model)
        protos.append(proto)
    partial = [(write_partial(folder / WEIGHTS, externalise(protos)), folder / WEIGHTS)]
    for name, proto in zip(GRAPHS.values(), protos, strict=True):
        partial.append((write_partial(folder / name, proto.SerializeToString()), folder / name))
    # All is written before anything is moved in place, so that nobody reads a graph with another's weights.
    for temporary, path in partial:
        os.replace(temporary, path)
    for name in GRAPHS.values():
        onnx.checker.check_model(str(folder / name), full_check=True)
    for path in [folder / WEIGHTS, *(folder / name for name in GRAPHS.values())]:
        print(f"{path.name}: {path.stat().st_size} bytes")


def read_weights(graph: Path, style: AttentionStyle = "sdpa") -> TinyLlama:
    """The PyTorch model with the weights of an exported graph: no checkpoint is needed."""
    proto: Any = onnx.load(str(graph))
    state = {}
    for initializer in filter(is_weight, proto.graph.initializer):
        array = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        if initializer.name.endswith(".MatMul.weight"):
            state[initializer.name.replace(".MatMul.weight", ".weight")] = array.T.contiguous()
        else:
            state[initializer.name] = array
    model = TinyLlama(style=style)
    model.load_state_dict(state)
    return model.eval()
