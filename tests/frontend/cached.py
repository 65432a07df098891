"""Small decoders in standard ONNX operators, one per convention of the key-value cache.

Attention, norms and MLPs are those of `tiny`, the cache is added here: where it comes from, how new rows get
into it, and what of it is an output.
"""

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
PERMS = {"BHLD": (0, 1, 2, 3), "BLHD": (0, 2, 1, 3), "BHDL": (0, 1, 3, 2), "LBHD": (2, 0, 1, 3)}


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


def _count(c: Case, x: str, axis: int) -> str:
    return c.op("Squeeze", c.op("Shape", x, start=axis, end=axis + 1), c.ints(0))


def future(c: Case, k: str) -> str:
    """[S, T]: keys after the query, where queries are the last ones of the keys [B, H, T, D]."""
    zero, one = c.const(0, np.int64), c.const(1, np.int64)
    total = _count(c, k, 2)
    first = c.op("Sub", total, _count(c, "ids", 1))
    row = c.op("Unsqueeze", c.op("Range", first, total, one), c.ints(1))
    return c.op("Greater", c.op("Range", zero, total, one), row)


def growing(layout: str) -> Attend:
    """Caches of some layout that new rows are joined to."""
    perm = PERMS[layout]
    back = [perm.index(i) for i in range(4)]
    sizes: dict[str, int | str] = {"B": "B", "H": KV, "L": "P", "D": HEAD}
    shape = [sizes[a] for a in layout]

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, *shape)
            new = new if layout == "BHLD" else c.op("Transpose", new, perm=list(perm))
            joined = c.out(c.op("Concat", past, new, axis=layout.index("L")), f"new_{n}{i}")
            whole.append(joined if layout == "BHLD" else c.op("Transpose", joined, perm=back))
        return scores(c, q, whole, future(c, whole[0]))

    return attend


def merged_heads(c: Case, i: int, q: str, k: str, v: str) -> str:
    """Keys [B*H, D, P] and values [B*H, P, D], as older BLOOM exports have them."""
    whole = []
    for n, new, order in (("k", k, [0, 1, 3, 2]), ("v", v, [0, 1, 2, 3])):
        axis = 2 if n == "k" else 1
        past = c.given(f"past_{n}{i}", FLOAT, f"B*{KV}", *((HEAD, "P") if n == "k" else ("P", HEAD)))
        rows = c.op("Transpose", new, perm=order)
        size = [c.op("Shape", rows, start=j, end=j + 1) for j in (2, 3)]
        flat = c.op("Reshape", rows, c.op("Concat", c.ints(-1), *size, axis=0))
        joined = c.out(c.op("Concat", past, flat, axis=axis), f"new_{n}{i}")
        size = [c.op("Shape", joined, start=j, end=j + 1) for j in (1, 2)]
        wide = c.op("Reshape", joined, c.op("Concat", c.ints(-1, KV), *size, axis=0))
        whole.append(c.op("Transpose", wide, perm=order))
    return scores(c, q, whole, future(c, whole[0]))


def flat_rows(axis: int, written: bool = False) -> Attend:
    """Caches [B, P, Hkv*D], joined before the heads are split; or (`written`, opset 24) [B, M, Hkv*D]."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, "B", "M" if written else "P", KV * HEAD)
            if written:
                rows = c.op("TensorScatter", past, flat(c, new), c.given("starts", INT, "B"), axis=axis)
            else:
                rows = c.op("Concat", past, flat(c, new), axis=axis)
            wide = c.op("Reshape", c.out(rows, f"new_{n}{i}"), c.ints(0, 0, KV, HEAD))
            whole.append(c.op("Transpose", wide, perm=[0, 2, 1, 3]))
        if not written:
            return scores(c, q, whole, future(c, whole[0]))
        return c.op("Attention", q, *whole, "", "", "", c.given("lengths", INT, "B"), is_causal=1)

    return attend


def layer_stack(c: Case, i: int, q: str, k: str, v: str) -> str:
    """One [2, B, H, P, D] tensor per layer."""
    past = c.given(f"past_{i}", FLOAT, 2, "B", KV, "P", HEAD)
    whole = [
        c.op("Concat", c.op("Gather", past, c.const(j, np.int64), axis=0), new, axis=2)
        for j, new in enumerate((k, v))
    ]
    parts = [c.op("Unsqueeze", x, c.ints(0)) for x in whole]
    c.out(c.op("Concat", *parts, axis=0), f"new_{i}")
    return scores(c, q, whole, future(c, whole[0]))


def full_stack(kinds: bool, layers: int = 2) -> Attend:
    """One [N, 2, B, H, P, D] tensor for all layers, or (`kinds`) one [N, B, H, P, D] tensor for keys and one
    for values."""
    held: dict[str, list[str]] = {"k": [], "v": []}

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        whole = []
        for j, (n, new) in enumerate((("k", k), ("v", v))):
            shape: list[int | str] = ["B", KV, "P", HEAD]
            if kinds:
                past = c.op(
                    "Gather", c.given(f"past_{n}", FLOAT, layers, *shape), c.const(i, np.int64), axis=0
                )
            else:
                layer = c.op(
                    "Slice", c.given("past", FLOAT, layers, 2, *shape), c.ints(i), c.ints(i + 1), c.ints(0)
                )
                part = c.op("Split", c.op("Squeeze", layer, c.ints(0)), c.ints(1, 1), axis=0)
                c.nodes[-1].output.append(part + "b")
                past = c.op("Squeeze", part + ("b" if j else ""), c.ints(0))
            whole.append(c.op("Concat", past, new, axis=2))
            held[n].append(c.op("Unsqueeze", whole[-1], c.ints(0)))
        if i == layers - 1:
            stacks = {n: c.op("Concat", *held[n], axis=0) for n in "kv"}
            if kinds:
                for n in "kv":
                    c.out(stacks[n], f"new_{n}")
            else:
                c.out(c.op("Concat", *(c.op("Unsqueeze", stacks[n], c.ints(1)) for n in "kv"), axis=1), "new")
        return scores(c, q, whole, future(c, whole[0]))

    return attend


def half(c: Case, i: int, q: str, k: str, v: str) -> str:
    """Caches in f16 under f32 arithmetic."""
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", HALF, "B", KV, "P", HEAD)
        joined = c.op("Concat", past, c.op("Cast", new, to=HALF), axis=2)
        whole.append(c.op("Cast", c.out(joined, f"half_{n}{i}"), to=FLOAT))
    return scores(c, q, whole, future(c, whole[0]))


def beams(c: Case, i: int, q: str, k: str, v: str) -> str:
    """The batch of every cache is chosen by beam indices first."""
    if "beams" not in c.inputs:
        c.given("beams", INT, "B")
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.op("Gather", c.given(f"past_{n}{i}", FLOAT, "B", KV, "P", HEAD), "beams", axis=0)
        whole.append(c.out(c.op("Concat", past, new, axis=2), f"new_{n}{i}"))
    return scores(c, q, whole, future(c, whole[0]))


def rolling(c: Case, i: int, q: str, k: str, v: str) -> str:
    """The oldest rows leave as new ones come; a mask [B, ROOM] says which rows hold tokens."""
    if "mask" not in c.inputs:
        c.given("mask", INT, "B", ROOM)
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", FLOAT, "B", KV, ROOM, HEAD)
        rest = c.op("Slice", past, c.op("Shape", "ids", start=1, end=2), c.ints(ROOM), c.ints(2))
        whole.append(c.out(c.op("Concat", rest, new, axis=2), f"new_{n}{i}"))
    padding = c.op("Not", c.op("Cast", c.op("Unsqueeze", "mask", c.ints(1, 2)), to=TensorProto.BOOL))
    return scores(c, q, whole, c.op("Or", future(c, whole[0]), padding))


def later(c: Case, positions: str) -> str:
    """[.., S, ROOM]: rows of a cache of fixed length after each query, whose `positions` are [.., S]."""
    rows = c.op("Range", c.const(0, np.int64), c.const(ROOM, np.int64), c.const(1, np.int64))
    return c.op("Greater", rows, c.op("Unsqueeze", positions, c.ints(-1)))


def counter(c: Case, i: int, q: str, k: str, v: str) -> str:
    """Static caches written from a counter `used` [] on; rotary tables are cut there, too."""
    if not i:
        at = c.given("counter", INT)
        end = c.op("Add", at, _count(c, "ids", 1))
        c.known = [c.op("Range", at, end, c.const(1, np.int64))]
        angle = np.arange(64)[:, None] * 10.0 ** (-np.arange(HEAD // 2) / 2)
        ends = [c.op("Unsqueeze", x, c.ints(0)) for x in (at, end)]
        c.known += [c.op("Slice", c.const(f(np.tile(angle, 2))), *ends, c.ints(0)) for f in (np.cos, np.sin)]
    rows, cos, sin = c.known
    q, k = rope(c, OPTIONS, q, cos, sin), rope(c, OPTIONS, k, cos, sin)
    whole = []
    for n, new in (("k", k), ("v", v)):
        past = c.given(f"past_{n}{i}", FLOAT, "B", KV, ROOM, HEAD)
        index = c.op("Expand", c.op("Reshape", rows, c.ints(1, 1, -1, 1)), c.op("Shape", new))
        whole.append(c.out(c.op("ScatterElements", past, index, new, axis=2), f"new_{n}{i}"))
    return scores(c, q, whole, later(c, rows))


def static(kind: str) -> Attend:
    """Caches of fixed length, written at an input of row numbers [S] by `kind` (ScatterND or
    ScatterElements)."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if "rows" not in c.inputs:
            c.given("rows", INT, "S")
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, "B", KV, ROOM, HEAD)
            if kind == "ScatterND":
                first, back = [2, 0, 1, 3], [1, 2, 0, 3]
                index = c.op("Unsqueeze", "rows", c.ints(1))
                operands = [c.op("Transpose", x, perm=first) for x in (past, new)]
                made = c.op("Transpose", c.op("ScatterND", operands[0], index, operands[1]), perm=back)
            else:
                index = c.op("Expand", c.op("Reshape", "rows", c.ints(1, 1, -1, 1)), c.op("Shape", new))
                made = c.op("ScatterElements", past, index, new, axis=2)
            whole.append(c.out(made, f"new_{n}{i}"))
        return scores(c, q, whole, later(c, "rows"))

    return attend


def tensor_scatter(mode: str, fused: bool) -> Attend:
    """Opset 24: TensorScatter at write indices [B]; attention fused with lengths [B], or in primitives."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if "starts" not in c.inputs:
            c.given("starts", INT, "B")
        whole = []
        for n, new in (("k", k), ("v", v)):
            past = c.given(f"past_{n}{i}", FLOAT, "B", KV, "M", HEAD)
            whole.append(c.out(c.op("TensorScatter", past, new, "starts", axis=2, mode=mode), f"new_{n}{i}"))
        if fused:
            if "lengths" not in c.inputs:
                c.given("lengths", INT, "B")
            return c.op("Attention", q, *whole, "", "", "", "lengths", is_causal=1)
        zero, one = c.const(0, np.int64), c.const(1, np.int64)
        steps = c.op("Range", zero, _count(c, "ids", 1), one)
        places = c.op("Add", c.op("Unsqueeze", "starts", c.ints(1)), steps)
        rows = c.op("Range", zero, _count(c, "past_k0", 2), one)
        hidden = c.op("Greater", rows, c.op("Unsqueeze", places, c.ints(1, 3)))
        return scores(c, q, whole, hidden)

    return attend


def crossed(first: bool) -> Attend:
    """Self-attention with a cache and cross-attention to encoder keys and values [B, Hkv, E, D]: projected
    from `encoder` [B, E, W] and handed out (`first`), or given and passed on."""
    own = starting if first else growing("BHLD")

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if not i:
            padding = c.op("Cast", c.given("encoder_mask", INT, "B", "E"), to=TensorProto.BOOL)
            c.known = [c.op("Unsqueeze", c.op("Not", padding), c.ints(1, 2))]
            c.given("encoder", FLOAT, "B", "E", WIDTH)
        whole = []
        for n in "kv":
            weight = c.weight(WIDTH, KV * HEAD, gain=SHARP)
            given = c.given(f"cross_{n}{i}", FLOAT, "B", KV, "C", HEAD)
            made = split(c, c.op("MatMul", "encoder", weight), KV) if first else given
            whole.append(made)
            c.out(made, f"new_cross_{n}{i}")
        y = own(c, i, q, k, v)
        return c.op("Add", y, scores(c, q, whole, c.known[0]))

    return attend


def flat(c: Case, x: str) -> str:
    """[B, H, S, D] -> [B, S, H*D]."""
    return c.op("Reshape", c.op("Transpose", x, perm=[0, 2, 1, 3]), c.ints(0, 0, -1))


def heads(c: Case, x: str) -> str:
    """[B, S, H*D] -> [B, H, S, D]."""
    return c.op("Transpose", c.op("Reshape", x, c.ints(0, 0, HEADS, HEAD)), perm=[0, 2, 1, 3])


def grouped(lengths: str = "mask", rows: str = "P") -> Attend:
    """GroupQueryAttention, its lengths computed from a mask [B, T] or inputs; caches of `rows` rows."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if not i:
            if lengths == "mask":
                mask = c.given("tokens", INT, "B", "T")
                last = c.op("Sub", c.op("ReduceSum", mask, c.ints(1), keepdims=0), c.ints(1))
                c.known = [c.op("Cast", last, to=TensorProto.INT32)]
                c.known += [c.op("Cast", _count(c, "tokens", 1), to=TensorProto.INT32)]
            else:
                c.known = [c.given("last", TensorProto.INT32, "B"), c.given("total", TensorProto.INT32, 1)]
        past = [c.given(f"past_{n}{i}", FLOAT, "B", KV, rows, HEAD) for n in "kv"]
        operands = [*(flat(c, x) for x in (q, k, v)), *past, *c.known]
        y = c.ms("GroupQueryAttention", *operands, outputs=3, num_heads=HEADS, kv_num_heads=KV)[0]
        c.nodes[-1].output[1:] = [f"new_{n}{i}" for n in "kv"]
        c.outputs += [f"new_{n}{i}" for n in "kv"]
        return heads(c, y)

    return attend


def buffered(kind: str) -> Attend:
    """MultiHeadAttention (or its decoder form) with a buffer of fixed length, of which an input says how much
    is valid."""

    def attend(c: Case, i: int, q: str, k: str, v: str) -> str:
        if not i:
            c.given("used", TensorProto.INT32, 1)
        past = [c.given(f"past_{n}{i}", FLOAT, "B", HEADS, "M", HEAD) for n in "kv"]
        operands = [flat(c, q), *(flat(c, repeat(c, x)) for x in (k, v))]
        if kind == "MultiHeadAttention":
            operands += ["", "", "", *past, "used"]
            attrs = {"unidirectional": 1}
        else:
            operands += ["", "", *past, "used"]
            attrs = {"past_present_share_buffer": 1}
        y, *made = c.ms(kind, *operands, outputs=3, num_heads=HEADS, **attrs)
        for n, value in zip("kv", made, strict=True):
            c.out(value, f"new_{n}{i}")
        return heads(c, y)

    return attend


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


def starting(c: Case, i: int, q: str, k: str, v: str) -> str:
    """No cache yet: its first rows are outputs."""
    whole = [c.out(new, f"new_{n}{i}") for n, new in (("k", k), ("v", v))]
    return scores(c, q, whole, future(c, whole[0]))


def merged(
    negated: bool = False, first: Attend = starting, then: Attend | None = None
) -> tuple[onnx.ModelProto, Case]:
    """A merged decoder: an If on `use_cache` [1] holds the graph that starts a cache and the one that grows
    it; both read the weights of the graph around them."""
    cases = [decoder(first), decoder(then or growing("BHLD"))]
    outer: dict[bytes, onnx.TensorProto] = {}
    branches = [_branch(case, f"b{i}_", outer) for i, case in enumerate(cases)]
    info = helper.make_tensor_value_info
    case = cases[1]
    case.given("use_cache", TensorProto.BOOL, 1)
    condition = "not_use_cache" if negated else "use_cache"
    taken, other = branches if negated else branches[::-1]
    nodes = [helper.make_node("Not", ["use_cache"], [condition])] if negated else []
    nodes.append(
        helper.make_node("If", [condition], case.outputs, "split", then_branch=taken, else_branch=other)
    )
    given = [info(n, t, s) for n, (t, s) in case.inputs.items()]
    made = [info(n, FLOAT, None) for n in case.outputs]
    graph = helper.make_graph(nodes, "merged", given, made, list(outer.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), case


def _branch(case: Case, tag: str, outer: dict[bytes, onnx.TensorProto]) -> onnx.GraphProto:
    """The graph of a case without inputs, its names tagged; float tensors go to `outer`, equal ones once."""
    names = {n: n for n in (*case.inputs, "")}
    own = []
    for tensor in case.tensors:
        if tensor.dims and tensor.data_type == FLOAT:
            key = tensor.SerializeToString()[-len(tensor.raw_data) :]
            if key not in outer:
                outer[key] = onnx.TensorProto()
                outer[key].CopyFrom(tensor)
                outer[key].name = f"w{len(outer)}"
            names[tensor.name] = outer[key].name
        else:
            own.append(tensor)
            names[tensor.name] = tensor.name = tag + tensor.name
    for node in case.nodes:
        node.name = tag + node.name if node.name else ""
        node.input[:] = [names.get(n, tag + n) for n in node.input]
        node.output[:] = [tag + n for n in node.output]
    order = ["logits", *sorted(o for o in case.outputs if o != "logits")]
    case.outputs = order
    outputs = [helper.make_tensor_value_info(tag + n, FLOAT, None) for n in order]
    return helper.make_graph(case.nodes, tag, [], outputs, own)
