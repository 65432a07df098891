"""Mutants of ONNX files: changed bytes, changed protobuf fields, changed graphs, and splices of two files."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from tests.fuzz import wire_tree

NUMBERS = [-(1 << 63), (1 << 63) - 1, -(1 << 31), -7, -2, -1, 0, 1, 2, 3, 5, 255, 1 << 20, 1 << 33, 1 << 40]
FLOATS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 1e38, -1.0, 0.5, 3.0]
SIZES: list[int | str] = [
    0,
    1,
    2,
    3,
    4096,
    1 << 31,
    1 << 40,
    "B",
    "S",
    "P",
    "a+b",
    "a//0",
    "-a",
    "2*x",
    "max(a,b)",
]
SIZES += [
    "batch",
    "past",
    "sequence",
    "~a",
    "x\ny",
    "'",
    "a" * 190,
    "*".join("abcdefgh"),
    "(a+b+c)**8",
    "a%a",
]
OPERATORS = [
    "Add",
    "Mul",
    "MatMul",
    "Gemm",
    "Reshape",
    "Expand",
    "Tile",
    "Range",
    "ConstantOfShape",
    "OneHot",
    "Pad",
    "Gather",
    "GatherND",
    "GatherElements",
    "ScatterND",
    "Slice",
    "Split",
    "Concat",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Shape",
    "Size",
    "Softmax",
    "ReduceMean",
    "ReduceSum",
    "CumSum",
    "TopK",
    "Trilu",
    "Where",
    "Cast",
    "Einsum",
    "LayerNormalization",
    "RMSNormalization",
    "RotaryEmbedding",
    "Attention",
    "If",
    "Loop",
    "Scan",
    "Constant",
    "Identity",
    "Dropout",
    "Clip",
    "Pow",
    "Mod",
    "Equal",
    "ArgMax",
    "EyeLike",
    "Conv",
    "QuantizeLinear",
    "DequantizeLinear",
    "MatMulInteger",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "SkipLayerNormalization",
    "MatMulNBits",
    "MoE",
    "QMoE",
    "EmbedLayerNormalization",
    "TensorScatter",
    "Resize",
    "NonZero",
    "LSTM",
    "Foo",
]


def mutant(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """A changed copy of one of the seeds."""
    data = rng.choice(seeds)
    kind = rng.random()
    if kind < 0.2:
        return bytes_changed(data, rng)
    if kind < 0.5:
        tree = wire_tree.parse(data, onnx.ModelProto.DESCRIPTOR)
        other = wire_tree.parse(rng.choice(seeds), onnx.ModelProto.DESCRIPTOR) if rng.random() < 0.2 else []
        for _ in range(rng.choice([1, 1, 2, 5])):
            wire_tree.change(tree, other, rng)
        try:
            return wire_tree.write(tree)
        except RecursionError:  # a message that was moved into itself
            return data
    model = onnx.ModelProto.FromString(data)
    if kind < 0.58:
        splice(model.graph, onnx.ModelProto.FromString(rng.choice(seeds)).graph, rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        changed_graph(model, rng)
    return bytes(model.SerializeToString())


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes cut, repeated or replaced, the file cut short."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 30])):
        at = rng.randrange(len(out) or 1)
        if rng.random() < 0.5:
            at = rng.randrange(min(len(out), 4096) or 1)
        what = rng.randrange(5)
        size = rng.choice([1, 2, 8, 40])
        if what == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + size] = rng.randbytes(size)
        elif what == 2:
            del out[at : at + size]
        elif what == 3:
            out[at:at] = out[at : at + size]
        elif rng.random() < 0.1:
            del out[at:]
    return bytes(out)


def splice(graph: onnx.GraphProto, other: onnx.GraphProto, rng: random.Random) -> None:
    """Some consecutive nodes of another graph, with their initializers, at a random place."""
    if not other.node:
        return
    at = rng.randrange(len(other.node))
    taken = list(other.node[at : at + rng.choice([1, 3, 10])])
    names = {n for node in taken for n in node.input}
    here = [o for node in graph.node for o in node.output] or ["x"]
    made: dict[str, str] = {}
    for k, node in enumerate(taken):
        copy = graph.node.add()
        copy.CopyFrom(node)
        for i, name in enumerate(copy.input):
            copy.input[i] = made.get(name, name if name in names and rng.random() < 0.5 else rng.choice(here))
        for i, name in enumerate(copy.output):
            made[name] = f"spliced_{k}_{i}"
            copy.output[i] = made[name]
    graph.initializer.extend(t for t in other.initializer if t.name in names)
    if graph.output and made:
        rng.choice(graph.output).name = rng.choice(list(made.values()))


def changed_graph(model: onnx.ModelProto, rng: random.Random) -> None:
    """One change that leaves a readable file."""
    graph = model.graph
    if not graph.node:
        return
    node = rng.choice(graph.node)
    values = [*(o for n in graph.node for o in n.output), *(v.name for v in graph.input)]
    values += [t.name for t in graph.initializer]
    what = rng.randrange(14)
    if what <= 2:
        _attribute(node, graph, rng)
    elif what == 3 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*values, ""])
    elif what == 4:
        node.op_type = rng.choice([rng.choice(graph.node).op_type, rng.choice(OPERATORS)])
    elif what == 5:
        node.domain = rng.choice(["", "ai.onnx", "com.microsoft", "pkg.x", "org.example", "ai.onnx.ml"])
    elif what == 6 and graph.input:
        _input(rng.choice(graph.input), rng)
    elif what <= 9 and graph.initializer:
        _initializer(rng.choice(graph.initializer), rng)
    elif what == 10:
        operands = [rng.choice(values) for _ in range(rng.choice([0, 1, 2, 3, 9]))]
        del node.input[:]
        node.input.extend(operands)
    elif what == 11:
        versions = [-1, 0, 9, 11, 12, 13, 17, 18, 21, 23, 24, 28, 29, 1 << 40]
        model.opset_import[0].version = rng.choice(versions)
    elif what == 12:
        _function(model, node, rng)
    else:
        node.output.extend([f"more_{rng.random()}"] * rng.choice([1, 2]))


def _attribute(node: onnx.NodeProto, graph: onnx.GraphProto, rng: random.Random) -> None:
    if rng.random() < 0.3 or not node.attribute:
        others = [a for n in graph.node for a in n.attribute]
        if others:
            copy = node.attribute.add()
            copy.CopyFrom(rng.choice(others))
            names = [copy.name, "axis", "axes", "perm", "to", "keepdims", "value", "num_heads"]
            copy.name = rng.choice(names)
        return
    attribute = rng.choice(node.attribute)
    what = rng.randrange(6)
    if what == 0:
        node.attribute.remove(attribute)
    elif what == 1:
        attribute.type = rng.choice(list(range(15)))
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(FLOATS)
    elif attribute.type == onnx.AttributeProto.INTS:
        numbers = [*attribute.ints, *rng.sample(NUMBERS, 2)]
        rng.shuffle(numbers)
        del attribute.ints[:]
        attribute.ints.extend(numbers[: rng.randrange(len(numbers) + 1)])
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice(wire_tree.WORDS)
    elif attribute.type == onnx.AttributeProto.TENSOR:
        _initializer(attribute.t, rng)


def _input(value: onnx.ValueInfoProto, rng: random.Random) -> None:
    kind = value.type.tensor_type
    what = rng.randrange(5)
    if what == 0:
        kind.elem_type = rng.choice(list(range(24)))
    elif what == 1:
        value.name = rng.choice([value.name, "", "x\ny", "\x1b[2J"])
    elif what == 2 and kind.shape.dim:
        del kind.shape.dim[rng.randrange(len(kind.shape.dim))]
    else:
        dim = rng.choice(kind.shape.dim) if kind.shape.dim and rng.random() < 0.8 else kind.shape.dim.add()
        size = rng.choice(SIZES)
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size


def _initializer(tensor: onnx.TensorProto, rng: random.Random) -> None:
    what = rng.randrange(7)
    if what == 0:
        tensor.data_type = rng.choice(list(range(26)))
    elif what == 1 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif what == 2:
        tensor.dims.append(rng.choice([0, 1, 1, 2]))
    elif what == 3:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            text = rng.choice(["0", "8", "x.bin", "../x", "/dev/zero", "-1", "1e3", "x" * 200, str(1 << 70)])
            tensor.external_data.add(key=key, value=text)
    elif tensor.data_location != onnx.TensorProto.EXTERNAL:
        _elements(tensor, rng)


def _elements(tensor: onnx.TensorProto, rng: random.Random) -> None:
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:  # an earlier change broke it
        return
    if not array.size or array.dtype.kind not in "iuf":
        return
    numbers = NUMBERS if array.dtype.kind in "iu" else FLOATS
    if rng.random() < 0.3:
        array = np.resize(array, rng.choice([(), (1,), (0,), (2,), (1, 3), (300,)]))
    flat = array.reshape(-1)
    if flat.size:
        with np.errstate(all="ignore"):
            flat[rng.randrange(flat.size)] = np.array(rng.choice(numbers)).astype(array.dtype)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _function(model: onnx.ModelProto, node: onnx.NodeProto, rng: random.Random) -> None:
    """A function around the node, or a call of itself."""
    function = model.functions.add(name="F", domain="pkg.f")
    function.opset_import.extend(model.opset_import)
    function.input.extend(f"i{k}" for k in range(len(node.input)))
    function.output.extend(node.output)
    inner = function.node.add()
    inner.CopyFrom(node)
    del inner.input[:]
    inner.input.extend(function.input)
    if rng.random() < 0.3:
        inner.op_type, inner.domain = "F", "pkg.f"
    node.op_type, node.domain = "F", "pkg.f"
