"""Small decoders in standard ONNX operators whose attention and cache are given: builder, loop and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.frontend.tiny import (
    HEAD,
    HEADS,
    KV,
    LOW,
    SHARP,
    VOCAB,
    WIDTH,
    Array,
    Builder,
    Options,
    angles,
    mlp,
    repeat,
    rope,
    split,
)  # fmt: skip

ROOM = 12  # rows of a cache of fixed length
FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
OPTIONS = Options()


@dataclass
class Case(Builder):
    """A decoder being built: its inputs with their shapes, and its outputs."""

    inputs: dict[str, tuple[int, list[Any]]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    opset: int = 18
    layers: int = 2
    known: list[str] = field(default_factory=list)

    def given(self, name: str, dtype: int, *shape: int | str) -> str:
        """Declares an input."""
        self.inputs[name] = (dtype, list(shape))
        return name

    def out(self, value: str, name: str) -> str:
        """Declares an output that is a value."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(name)
        return name

    def ms(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> list[str]:
        """Adds a contrib node and gives its results' names."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain="com.microsoft", **attrs))
        return names

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "cached",
            [info(n, t, s) for n, (t, s) in self.inputs.items()],
            [info(n, FLOAT, None) for n in self.outputs],
            self.tensors,
        )
        sets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        made = helper.make_model(graph, opset_imports=sets, ir_version=10)
        if self.outputs:
            halves = {n for n in self.outputs if n.startswith("half_")}
            for value in made.graph.output:
                if value.name in halves:
                    value.type.tensor_type.elem_type = HALF
        return made


Attend = Callable[[Case, int, str, str, str], str]
"""(case, layer, q, k, v, all [B, H, S, D]) -> [B, H, S, D]."""


def decoder(attend: Attend, opset: int = 18, layers: int = 2, seed: int = 0, positions: bool = True) -> Case:
    """A decoder whose attention and cache are `attend`; rotary positions [B, S] are an input, unless `attend`
    rotates by itself."""
    c = Case(np.random.default_rng(seed), opset=opset, layers=layers)
    c.given("ids", INT, "B", "S")
    table = c.weight(VOCAB, WIDTH, gain=VOCAB**0.5)
    x = c.op("Gather", table, "ids")
    cos, sin = angles(c, OPTIONS, c.given("positions", INT, "B", "S")) if positions else ("", "")
    for i in range(layers):
        x = c.op("Add", x, _block(c, i, _norm(c, x), attend, cos, sin))
        x = c.op("Add", x, mlp(c, OPTIONS, _norm(c, x)))
    c.out(c.op("MatMul", _norm(c, x), c.weight(WIDTH, VOCAB)), "logits")
    return c


def packed() -> Case:
    """A decoder of com.microsoft Attention, which holds keys and values of a layer in one [2, B, H, P, D]."""
    c = Case(np.random.default_rng(0), layers=2)
    c.given("ids", INT, "B", "S")
    c.given("packed_mask", TensorProto.INT32, "B", "T")
    x = c.op("Gather", c.weight(VOCAB, WIDTH, gain=VOCAB**0.5), "ids")
    for i in range(c.layers):
        gains = np.repeat([SHARP, SHARP, 1.0], WIDTH)
        weight = c.const(gains * c.rng.standard_normal((WIDTH, 3 * WIDTH)) / WIDTH**0.5)
        past = c.given(f"past_{i}", FLOAT, 2, "B", HEADS, "P", WIDTH // HEADS)
        operands = [_norm(c, x), weight, c.weight(3 * WIDTH), "packed_mask", past]
        y, made = c.ms("Attention", *operands, outputs=2, num_heads=HEADS, unidirectional=1)
        c.out(made, f"new_{i}")
        x = c.op("Add", x, c.op("MatMul", y, c.weight(WIDTH, WIDTH)))
        x = c.op("Add", x, mlp(c, OPTIONS, _norm(c, x)))
    c.out(c.op("MatMul", _norm(c, x), c.weight(WIDTH, VOCAB)), "logits")
    return c


def _norm(c: Case, x: str) -> str:
    square = c.op("ReduceMean", c.op("Mul", x, x), c.ints(-1))
    root = c.op("Sqrt", c.op("Add", square, c.const(1e-5)))
    return c.op("Mul", c.weight(WIDTH), c.op("Div", x, root))


def _block(c: Case, i: int, x: str, attend: Attend, cos: str, sin: str) -> str:
    q = split(c, c.op("MatMul", x, c.weight(WIDTH, HEADS * HEAD, gain=SHARP)), HEADS)
    k = split(c, c.op("MatMul", x, c.weight(WIDTH, KV * HEAD, gain=SHARP)), KV)
    v = split(c, c.op("MatMul", x, c.weight(WIDTH, KV * HEAD)), KV)
    if cos:
        q, k = rope(c, OPTIONS, q, cos, sin), rope(c, OPTIONS, k, cos, sin)
    y = attend(c, i, q, k, v)
    y = c.op("Reshape", c.op("Transpose", y, perm=[0, 2, 1, 3]), c.ints(0, 0, HEADS * HEAD))
    return c.op("MatMul", y, c.weight(HEADS * HEAD, WIDTH))


def scores(c: Case, q: str, whole: list[str], hidden: str) -> str:
    """Attention of q over whole keys and values; `hidden` [.., S, T] truths are left out."""
    k, v = (repeat(c, x) for x in whole)
    s = c.op("Mul", c.op("MatMul", q, c.op("Transpose", k, perm=[0, 1, 3, 2])), c.const(HEAD**-0.5))
    return c.op("MatMul", c.op("Softmax", c.op("Where", hidden, c.const(LOW), s), axis=-1), v)


def count(c: Case, x: str, axis: int) -> str:
    """One dimension of a value as a scalar."""
    return c.op("Squeeze", c.op("Shape", x, start=axis, end=axis + 1), c.ints(0))


def future(c: Case, k: str) -> str:
    """[S, T]: keys after the query, where queries are the last ones of the keys [B, H, T, D]."""
    zero, one = c.const(0, np.int64), c.const(1, np.int64)
    total = count(c, k, 2)
    first = c.op("Sub", total, count(c, "ids", 1))
    row = c.op("Unsqueeze", c.op("Range", first, total, one), c.ints(1))
    return c.op("Greater", c.op("Range", zero, total, one), row)


def later(c: Case, positions: str) -> str:
    """[.., S, ROOM]: rows of a cache of fixed length after each query, whose `positions` are [.., S]."""
    rows = c.op("Range", c.const(0, np.int64), c.const(ROOM, np.int64), c.const(1, np.int64))
    return c.op("Greater", rows, c.op("Unsqueeze", positions, c.ints(-1)))


def flat(c: Case, x: str) -> str:
    """[B, H, S, D] -> [B, S, H*D]."""
    return c.op("Reshape", c.op("Transpose", x, perm=[0, 2, 1, 3]), c.ints(0, 0, -1))


def heads(c: Case, x: str) -> str:
    """[B, S, H*D] -> [B, H, S, D]."""
    return c.op("Transpose", c.op("Reshape", x, c.ints(0, 0, HEADS, HEAD)), perm=[0, 2, 1, 3])


def inputs(
    case: Case, new: int = 3, past: int = 4, batch: int = 2, room: int = ROOM, seed: int = 1
) -> dict[str, Array]:
    """Inputs for `new` tokens after `past`, no padding; rows of a fixed cache behind the past are noise."""
    rng = np.random.default_rng(seed)
    sizes: dict[Any, int] = {"B": batch, "S": new, "P": past, "M": room, f"B*{KV}": batch * KV}
    sizes |= {"T": past + new, "E": 5, "C": 5 if past else 0}
    known = {
        "ids": rng.integers(0, VOCAB, (batch, new)),
        "positions": np.broadcast_to(np.arange(past, past + new), (batch, new)).copy(),
        "counter": np.array(past),
        "rows": np.arange(past, past + new),
        "starts": np.full(batch, past),
        "lengths": np.full(batch, past + new),
        "beams": rng.permutation(batch),
        "packed_mask": np.ones((batch, past + new)),
        "encoder_mask": (np.arange(5) < 4)[None].repeat(batch, 0),
        "tokens": np.ones((batch, past + new)),
        "last": np.full(batch, past + new - 1),
        "total": np.array([past + new]),
        "used": np.array([past]),
        "use_cache": np.array([past > 0]),
        "mask": (np.arange(ROOM) >= ROOM - past - new).astype(np.int64)[None].repeat(batch, 0),
    }
    out = {}
    for name, (dtype, shape) in case.inputs.items():
        noise = rng.standard_normal([sizes.get(s, s) for s in shape])
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        out[name] = known.get(name, noise).astype(kind)
    return out
