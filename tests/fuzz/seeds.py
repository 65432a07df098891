"""What is mutated: small decoders in several spellings, and the corpus where it is there."""

from __future__ import annotations

import onnx

from tests.frontend.corpus import FOLDER, entries
from tests.frontend.test_experts import mixture
from tests.frontend.tiny import Options, decoder

SMALL = (
    Options(layers=1),
    Options(layers=2, rope="interleaved", norm="layer", act="gelu", mask="where"),
    Options(layers=3, partial=True, scale="both", act="gelu_tanh", gated=False, tied=True),
    Options(layers=4, norm_form="mul", weight_offset=True, scale="query"),
)


def small() -> list[bytes]:
    """Decoders of one to four layers, and a layer of routed experts."""
    return [decoder(o).SerializeToString() for o in SMALL] + [mixture().SerializeToString()]


def corpus() -> list[bytes]:
    """Every file of the corpus, its large initializers left out: their bytes say nothing of the graph."""
    return [skeleton((FOLDER / entry["file"]).read_bytes()) for entry in entries("compile", "refuse")]


def skeleton(data: bytes, largest: int = 2048) -> bytes:
    """The model with initializers above `largest` bytes in a file that is not there."""
    model = onnx.ModelProto.FromString(data)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > largest:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="absent.bin")
    return bytes(model.SerializeToString())
