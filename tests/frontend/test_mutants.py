"""Well-formed files with nonsense in them (attributes, operands, operators, sizes) never crash or hang."""

from __future__ import annotations

import random
import time
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from mapper.errors import MapperError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from tests.frontend.tiny import Options, decoder

NUMBERS = [-(1 << 63), -7, -1, 0, 1, 2, 5, 1 << 33]
MODEL = decoder(Options(layers=1))


def mutated(rng: random.Random) -> onnx.ModelProto:
    """The small decoder with one to three changes that keep it a readable file."""
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    graph = model.graph
    for _ in range(rng.randint(1, 3)):
        node, value = rng.choice(graph.node), rng.choice(graph.input)
        change = rng.randrange(6)
        if change == 0 and node.attribute:
            attribute = rng.choice(node.attribute)
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = rng.choice(NUMBERS)
            elif attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
        elif change == 1:
            node.input[rng.randrange(len(node.input))] = rng.choice([t.name for t in graph.initializer])
        elif change == 2:
            node.op_type = rng.choice(graph.node).op_type
        elif change == 3:
            dims = value.type.tensor_type.shape.dim
            rng.choice(dims).dim_value = rng.choice([0, 1, 2, 1 << 40])
        elif change == 4:
            value.type.tensor_type.elem_type = rng.choice([1, 6, 7, 9, 10, 11])
        else:
            tensor = rng.choice([t for t in graph.initializer if t.data_type == onnx.TensorProto.INT64])
            array = numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice(NUMBERS)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


@pytest.mark.parametrize("seed", range(60))
def test_nonsense_is_loaded_or_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "mutant.onnx"
    path.write_bytes(mutated(random.Random(seed)).SerializeToString())
    start = time.process_time()
    try:
        inspect(load(path))
    except MapperError as error:
        assert "\n" not in str(error)
    assert time.process_time() - start < 60, "as good as a hang"
