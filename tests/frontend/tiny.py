"""A small decoder in standard ONNX operators, with switches for spellings and for near-misses.

Weights are random and scaled by fan-in; queries and keys are sharpened so that attention is far from uniform.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
HEADS, KV, HEAD, WIDTH, INNER, VOCAB = 4, 2, 8, 24, 40, 50
SHARP = 3.0
LOW = float(np.finfo(np.float32).min)


@dataclass
class Options:
    """How the decoder is spelled (first block), and what is wrong with it (second block)."""

    layers: int = 2
    rope: str = "half"  # half, interleaved
    partial: bool = False
    scale: str = "scores"  # scores, query, both, divide
    mask: str = "add"  # add, where
    norm: str = "rms"  # rms, layer
    norm_form: str = "pow"  # pow, mul, div
    act: str = "silu"  # silu, gelu, gelu_tanh, relu
    gated: bool = True
    tied: bool = False
    weight_offset: bool = False
    tokens_first: bool = False  # queries and keys are turned as [B, S, H, D], before their transposition
    alibi: bool = False  # a bias per head and key, [H, 1, T], on the scores
    clip: tuple[float, float] | None = None  # of the projected values
    clamp: float | None = None  # the least score, after the mask
    head_weight: bool = False  # queries are normalised with a weight per head
    residual: str = "plain"  # plain, scaled, layer_scale

    negate: bool = True
    swapped: bool = False
    softmax_axis: int = -1
    norm_reduce: str = "ReduceMean"
    norm_axis: int = -1
    act_factor: float = 1.0
    uneven_scale: bool = False


@dataclass
class Builder:
    """Collects nodes and initializers."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, **attrs: Any) -> str:
        """Adds a node and gives its result's name."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n{len(self.nodes)}", **attrs))
        return name

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        """Adds an initializer."""
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.const(list(values), np.int64)

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        """A random matrix scaled by its fan-in, or a vector near one."""
        if len(shape) == 1:
            return self.const(1 + 0.1 * self.rng.standard_normal(shape))
        return self.const(gain * self.rng.standard_normal(shape) / np.sqrt(shape[0]))


def norm(b: Builder, o: Options, x: str) -> str:
    """A norm over the last axis in the chosen spelling."""
    if o.norm == "layer":
        x = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    square = b.op("Mul", x, x) if o.norm_form == "mul" else b.op("Pow", x, b.const(2.0))
    if o.norm_reduce == "ReduceSum":
        mean = b.op("ReduceSum", square, b.ints(o.norm_axis))
    else:
        mean = b.op(o.norm_reduce, square, axes=[o.norm_axis])
    root = b.op("Sqrt", b.op("Add", mean, b.const(1e-5)))
    y = b.op("Div", x, root) if o.norm_form == "div" else b.op("Mul", x, b.op("Reciprocal", root))
    w = b.weight(WIDTH)
    y = b.op("Mul", b.op("Add", w, b.const(1.0)) if o.weight_offset else w, y)
    return b.op("Add", y, b.weight(WIDTH)) if o.norm == "layer" else y


def rope(b: Builder, o: Options, x: str, cos: str, sin: str) -> str:
    """Rotation of [B, H, S, D] in the chosen style."""
    width = HEAD // 2 if o.partial else HEAD
    whole, half = x, width // 2
    axes, step = b.ints(3), b.ints(1)
    if o.tokens_first:
        x = b.op("Transpose", x, perm=[0, 2, 1, 3])
        whole = x
    if o.partial:
        x = b.op("Slice", x, b.ints(0), b.ints(width), axes, step)
    if o.rope == "half":
        first = b.op("Slice", x, b.ints(0), b.ints(half), axes, step)
        second = b.op("Slice", x, b.ints(half), b.ints(width), axes, step)
        turned = b.op("Concat", b.op("Neg", second) if o.negate else second, first, axis=-1)
    else:
        even = b.op("Slice", x, b.ints(0), b.ints(width), axes, b.ints(2))
        odd = b.op("Slice", x, b.ints(1), b.ints(width), axes, b.ints(2))
        last = b.ints(-1)
        parts = [
            b.op("Unsqueeze", b.op("Neg", odd) if o.negate else odd, last),
            b.op("Unsqueeze", even, last),
        ]
        turned = b.op("Reshape", b.op("Concat", *parts, axis=-1), b.op("Shape", x))
    if o.swapped:
        cos, sin = sin, cos
    out = b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))
    if o.partial:
        rest = b.op("Slice", whole, b.ints(width), b.ints(HEAD), axes, step)
        out = b.op("Concat", out, rest, axis=-1)
    return b.op("Transpose", out, perm=[0, 2, 1, 3]) if o.tokens_first else out


def angles(b: Builder, o: Options, positions: str) -> tuple[str, str]:
    """Cosines and sines [B, 1, S, rotary width]."""
    width = HEAD // 2 if o.partial else HEAD
    frequency = b.const(10000.0 ** (-np.arange(0, width, 2) / width))
    angle = b.op(
        "Mul", b.op("Unsqueeze", b.op("Cast", positions, to=TensorProto.FLOAT), b.ints(-1)), frequency
    )
    if o.rope == "half":
        angle = b.op("Concat", angle, angle, axis=-1)
    else:
        pair = b.op("Unsqueeze", angle, b.ints(-1))
        angle = b.op("Reshape", b.op("Concat", pair, pair, axis=-1), b.ints(0, 0, width))
    angle = b.op("Unsqueeze", angle, b.ints(2 if o.tokens_first else 1))
    return b.op("Cos", angle), b.op("Sin", angle)


def split(b: Builder, x: str, heads: int) -> str:
    """[B, S, H*D] -> [B, H, S, D]."""
    return b.op("Transpose", b.op("Reshape", x, b.ints(0, 0, heads, HEAD)), perm=[0, 2, 1, 3])


def repeat(b: Builder, x: str) -> str:
    """Each key-value head for HEADS // KV query heads."""
    wide = b.op("Expand", b.op("Unsqueeze", x, b.ints(2)), b.ints(1, 1, HEADS // KV, 1, 1))
    batch, length = (b.op("Shape", x, start=i, end=i + 1) for i in (0, 2))
    return b.op("Reshape", wide, b.op("Concat", batch, b.ints(HEADS), length, b.ints(HEAD), axis=0))


def attention(b: Builder, o: Options, x: str, i: int, cos: str, sin: str, hidden: str) -> str:
    """Self-attention with a key-value cache, sharpened."""
    q = split(b, b.op("MatMul", x, b.weight(WIDTH, HEADS * HEAD, gain=SHARP)), HEADS)
    k = split(b, b.op("MatMul", x, b.weight(WIDTH, KV * HEAD, gain=SHARP)), KV)
    v = b.op("MatMul", x, b.weight(WIDTH, KV * HEAD))
    if o.clip is not None:
        v = b.op("Clip", v, b.const(o.clip[0]), b.const(o.clip[1]))
    v = split(b, v, KV)
    if o.head_weight:
        square = b.op("ReduceMean", b.op("Mul", q, q), axes=[-1])
        q = b.op("Div", q, b.op("Sqrt", b.op("Add", square, b.const(1e-5))))
        q = b.op("Mul", q, b.const(1 + 0.1 * b.rng.standard_normal((1, HEADS, 1, HEAD))))
    q, k = rope(b, o, q, cos, sin), rope(b, o, k, cos, sin)
    joined = []
    for name, value in (("k", k), ("v", v)):
        b.nodes.append(helper.make_node("Concat", [f"past_{name}{i}", value], [f"new_{name}{i}"], axis=2))
        joined.append(repeat(b, f"new_{name}{i}"))
    factor = HEAD**-0.5
    if o.scale in ("query", "both"):
        q = b.op("Mul", q, b.const(factor if o.scale == "query" else factor**0.5))
    if o.scale == "both":
        joined[0] = b.op("Mul", joined[0], b.const(factor**0.5))
    scores = b.op("MatMul", q, b.op("Transpose", joined[0], perm=[0, 1, 3, 2]))
    if o.scale == "scores":
        scale = np.linspace(0.2, 0.5, HEADS).reshape(1, HEADS, 1, 1) if o.uneven_scale else factor
        scores = b.op("Mul", scores, b.const(scale))
    elif o.scale == "divide":
        scores = b.op("Div", scores, b.const(HEAD**0.5))
    if o.alibi:
        total = b.op("Squeeze", b.op("Shape", "mask", start=1, end=2), b.ints(0))
        keys = b.op("Range", b.const(0, np.int64), total, b.const(1, np.int64))
        slopes = b.const(np.linspace(0.1, 0.4, HEADS).reshape(HEADS, 1, 1))
        scores = b.op("Add", scores, b.op("Mul", slopes, b.op("Cast", keys, to=TensorProto.FLOAT)))
    if o.mask == "add":
        scores = b.op("Add", scores, b.op("Where", hidden, b.const(LOW), b.const(0.0)))
    else:
        scores = b.op("Where", hidden, b.const(LOW), scores)
    if o.clamp is not None:
        scores = b.op("Max", scores, b.const(o.clamp))
    y = b.op("MatMul", b.op("Softmax", scores, axis=o.softmax_axis), joined[1])
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, HEADS * HEAD))
    return b.op("MatMul", y, b.weight(HEADS * HEAD, WIDTH))


def activation(b: Builder, o: Options, x: str) -> str:
    """The activation function, spelled in primitives."""
    if o.act == "relu":
        return b.op("Relu", x)
    if o.act == "silu":
        return b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, b.const(o.act_factor))))
    if o.act == "gelu":
        inner = b.op("Erf", b.op("Div", x, b.const(o.act_factor * 2.0**0.5)))
        return b.op("Mul", b.op("Mul", x, b.op("Add", inner, b.const(1.0))), b.const(0.5))
    cube = b.op("Mul", b.op("Pow", x, b.const(3.0)), b.const(o.act_factor * 0.044715))
    inner = b.op("Tanh", b.op("Mul", b.op("Add", x, cube), b.const((2 / np.pi) ** 0.5)))
    return b.op("Mul", b.op("Mul", b.const(0.5), x), b.op("Add", b.const(1.0), inner))


def mlp(b: Builder, o: Options, x: str) -> str:
    """Gated or plain MLP."""
    first = activation(b, o, b.op("MatMul", x, b.weight(WIDTH, INNER)))
    if o.gated:
        first = b.op("Mul", first, b.op("MatMul", x, b.weight(WIDTH, INNER)))
    return b.op("MatMul", first, b.weight(INNER, WIDTH))


def residual(b: Builder, o: Options, x: str) -> str:
    """What a block adds to the hidden state."""
    if o.residual == "plain":
        return x
    return b.op("Mul", x, b.const(0.5) if o.residual == "scaled" else b.weight(WIDTH))


def decoder(options: Options | None = None, seed: int = 0) -> onnx.ModelProto:
    """The model: inputs ids, mask, positions, past_k*, past_v*; outputs logits, new_k*, new_v*."""
    o = options or Options()
    b = Builder(np.random.default_rng(seed))
    table = b.weight(VOCAB, WIDTH, gain=VOCAB**0.5)
    x = b.op("Gather", table, "ids")
    cos, sin = angles(b, o, "positions")
    total, new = b.op("Shape", "mask", start=1, end=2), b.op("Shape", "ids", start=1, end=2)
    zero, one = b.const(0, np.int64), b.const(1, np.int64)
    keys = b.op("Range", zero, b.op("Squeeze", total, b.ints(0)), one)
    queries = b.op(
        "Range", b.op("Squeeze", b.op("Sub", total, new), b.ints(0)), b.op("Squeeze", total, b.ints(0)), one
    )
    future = b.op("Greater", keys, b.op("Unsqueeze", queries, b.ints(1)))
    padding = b.op("Not", b.op("Cast", b.op("Unsqueeze", "mask", b.ints(1, 2)), to=TensorProto.BOOL))
    hidden = b.op("Or", future, padding)
    for i in range(o.layers):
        x = b.op("Add", x, residual(b, o, attention(b, o, norm(b, o, x), i, cos, sin, hidden)))
        x = b.op("Add", x, residual(b, o, mlp(b, o, norm(b, o, x))))
    x = norm(b, o, x)
    head = b.op("Transpose", table, perm=[1, 0]) if o.tied else b.weight(WIDTH, VOCAB)
    b.nodes.append(helper.make_node("MatMul", [x, head], ["logits"]))
    return assemble(b, o)


def assemble(b: Builder, o: Options) -> onnx.ModelProto:
    """The ModelProto around the nodes."""
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    value = helper.make_tensor_value_info
    past: list[str | int | None] = ["B", KV, "P", HEAD]
    inputs = [
        value("ids", ints, ["B", "S"]),
        value("mask", ints, ["M", "T"]),
        value("positions", ints, ["B", "S"]),
    ]
    outputs = [value("logits", floats, None)]
    for i in range(o.layers):
        inputs += [value(f"past_{n}{i}", floats, past) for n in "kv"]
        outputs += [value(f"new_{n}{i}", floats, None) for n in "kv"]
    graph = helper.make_graph(b.nodes, "tiny", inputs, outputs, b.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def feeds(layers: int = 2, batch: int = 2, new: int = 3, past: int = 4, seed: int = 1) -> dict[str, Array]:
    """Inputs of the decoder, the first sequence left-padded by one."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, past + new), np.int64)
    mask[0, 0] = 0 if past else 1
    out: dict[str, Array] = {
        "ids": rng.integers(0, VOCAB, (batch, new)),
        "mask": mask,
        "positions": np.broadcast_to(np.arange(past, past + new), (batch, new)).copy(),
    }
    for i in range(layers):
        for n in "kv":
            out[f"past_{n}{i}"] = rng.standard_normal((batch, KV, past, HEAD)).astype(np.float32)
    return out


def oracle(model: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """What onnxruntime computes, without graph optimisation."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    given = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in given}), strict=True))


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """The model as a file."""
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def worst(got: dict[str, Array], want: dict[str, Array]) -> float:
    """The largest difference of finite values, relative to max(1, largest expected magnitude)."""
    out = 0.0
    for name, expected in want.items():
        finite = np.isfinite(expected)
        assert got[name].shape == expected.shape, name
        if finite.any():
            scale = max(1.0, float(np.abs(expected[finite]).max()))
            difference = np.abs(got[name].astype(np.float64) - expected)[finite]
            out = max(out, float(np.nan_to_num(difference, nan=np.inf).max()) / scale)
    return out
