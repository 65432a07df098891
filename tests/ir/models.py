"""Small decoders built by hand as the frontend leaves them: recognised ops, masks and positions as
primitives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from xdsl.ir import SSAValue

from mapper.ir.builder import GraphBuilder
from mapper.ir.graph import Graph
from mapper.ir.types import TensorType
from mapper.ir.weights import WeightSymbol

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder; all widths odd-ish on purpose."""

    layers: int = 3
    vocab: int = 61
    width: int = 48
    heads: int = 4
    groups: int = 2
    head: int = 12
    inner: int = 40
    window: int = 0
    interleaved: bool = False
    float_mask: bool = True
    positions: int = 64
    chunk: int = 0
    tuned: str = ""  # a factor by position on: queries, those before their transpose, rows (divided)


class Decoder:
    """Builds one decoder graph; weights are random, fan-in scaled, with sharpened queries and keys."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        self.sizes = sizes
        self.rng = np.random.default_rng(seed)
        self.b = GraphBuilder("decoder")
        self.ids = self.b.input("input_ids", TensorType.of(["batch", "sequence"], "i64"), "token_ids")
        self.padding = self.b.input(
            "attention_mask", TensorType.of(["batch", "past + sequence"], "i64"), "attention_mask"
        )
        self.position_ids = self.b.input(
            "position_ids", TensorType.of(["batch", "sequence"], "i64"), "position_ids"
        )
        self.past: list[tuple[SSAValue, SSAValue]] = []
        for i in range(sizes.layers):
            kind = TensorType.of(["batch", sizes.groups, "past", sizes.head], "f32")
            key = self.b.input(f"past_key_values.{i}.key", kind, f"past.key.{i}")
            value = self.b.input(f"past_key_values.{i}.value", kind, f"past.value.{i}")
            self.past.append((key, value))
        self.outputs: dict[str, SSAValue] = {}

    def weight(self, name: str, *shape: int, gain: float = 1.0, around: float = 0.0) -> str:
        """Declares a random weight of the given shape."""
        fan_in = shape[0] if len(shape) > 1 else 25
        data = around + gain * self.rng.standard_normal(shape) / np.sqrt(fan_in)
        return self.b.weight(WeightSymbol.of(name, data.astype(np.float32)))

    def mask(self) -> SSAValue:
        """The additive or boolean mask [batch, 1, sequence, total], as exporters compute it."""
        b, sizes = self.b, self.sizes
        new = b.add("squeeze", [b.add("shape_of", [self.ids], {"start": 1, "end": 2})], {"axes": [0]})
        past = b.add("shape_of", [self.past[-1][0]], {"start": 2, "end": 3})
        past = b.add("squeeze", [past], {"axes": [0]})
        zero, one = b.constant(0), b.constant(1)
        total = b.add("add", [past, new])
        query = b.add("add", [b.add("range", [zero, new, one]), past])
        query = b.add("unsqueeze", [query], {"axes": [0, 1, 3]})
        key = b.add("unsqueeze", [b.add("range", [zero, total, one])], {"axes": [0, 1, 2]})
        allowed = b.add("le", [key, query])
        if sizes.window:
            oldest = b.add("sub", [query, b.constant(sizes.window)])
            allowed = b.add("and", [allowed, b.add("gt", [key, oldest])])
        if sizes.chunk:
            runs = (b.add("div", [x, b.constant(sizes.chunk)]) for x in (key, query))
            allowed = b.add("and", [allowed, b.add("eq", [*runs])])
        present = b.add("unsqueeze", [b.add("cast", [self.padding], {"dtype": "bool"})], {"axes": [1, 2]})
        allowed = b.add("and", [allowed, present])
        if not sizes.float_mask:
            return allowed
        low = b.constant(np.float32(np.finfo(np.float32).min))
        return b.add("select", [allowed, b.constant(np.float32(0)), low])

    def angles(self) -> tuple[SSAValue, SSAValue]:
        """cos and sin [batch, sequence, head], with every angle twice in the style's order."""
        b, sizes = self.b, self.sizes
        inverse = (1 / 100 ** (np.arange(0, sizes.head, 2) / sizes.head)).astype(np.float32)
        position = b.add("cast", [self.position_ids], {"dtype": "f32"})
        angle = b.add("mul", [b.add("unsqueeze", [position], {"axes": [2]}), b.constant(inverse)])
        if sizes.interleaved:
            angle = b.add("unsqueeze", [angle], {"axes": [3]})
            pair = b.add("concat", [angle, angle], {"axis": 3})
            both = b.add("reshape", [pair], {"dims": ["batch", "sequence", sizes.head]})
        else:
            both = b.add("concat", [angle, angle], {"axis": -1})
        return b.add("cos", [both]), b.add("sin", [both])

    def factor(self, *axes: int) -> SSAValue:
        """1 + 0.5 log(1 + floor((position + 1) / 3)) of [batch, sequence], with axes of 1 inserted."""
        b = self.b
        position = b.add("cast", [self.position_ids], {"dtype": "f32"})
        one, half = b.constant(np.float32(1)), b.constant(np.float32(0.5))
        steps = b.add("floor", [b.add("div", [b.add("add", [position, one]), b.constant(np.float32(3))])])
        grown = b.add("add", [b.add("mul", [b.add("log", [b.add("add", [steps, one])]), half]), one])
        return b.add("unsqueeze", [grown], {"axes": list(axes)})

    def heads(self, x: SSAValue, count: int, factor: SSAValue | None = None) -> SSAValue:
        """[batch, sequence, count * head] split and transposed, through a shape tensor as exporters do;
        multiplied by `factor` in between."""
        b = self.b
        lead = b.add("shape_of", [self.ids], {"start": 0, "end": 2})
        shape = b.add("concat", [lead, b.constant([count, self.sizes.head])], {"axis": 0})
        split = b.add("reshape", [x, shape])
        split = split if factor is None else b.add("mul", [factor, split])
        return b.add("transpose", [split], {"perm": [0, 2, 1, 3]})

    def merge(self, x: SSAValue) -> SSAValue:
        """The inverse of `heads`."""
        b = self.b
        back = b.add("transpose", [x], {"perm": [0, 2, 1, 3]})
        lead = b.add("shape_of", [self.ids], {"start": 0, "end": 2})
        return b.add("reshape", [back, b.add("concat", [lead, b.constant([-1])], {"axis": 0})])

    def attend(self, i: int, q: SSAValue, k: SSAValue, v: SSAValue, mask: SSAValue) -> SSAValue:
        """Cache append and attention of layer `i`, merged back to [batch, sequence, width]."""
        b, sizes = self.b, self.sizes
        past_key, past_value = self.past[i]
        key = b.add("kv_append", [past_key, k])
        value = b.add("kv_append", [past_value, v])
        self.outputs[f"present.{i}.key"] = key
        self.outputs[f"present.{i}.value"] = value
        attrs = {
            "scale": sizes.head**-0.5, "causal": True, "window": sizes.window, "chunk": sizes.chunk,
        }  # fmt: skip
        return self.merge(b.add("attention", [q, key, value, mask], attrs, node=f"/layers.{i}/attention"))

    def finish(self, logits: SSAValue) -> Graph:
        """The verified graph."""
        outputs = {"logits": logits, **self.outputs}
        roles = {"logits": "logits"}
        for name in self.outputs:
            _, layer, what = name.split(".")
            roles[name] = f"present.{what}.{layer}"
        return self.b.finish(outputs, roles, kv_layout="BHLD")


def llama(sizes: Sizes | None = None, seed: int = 0) -> Graph:
    """RMSNorm, RoPE, grouped heads, gated MLP, untied head."""
    sizes = sizes or Sizes()
    m = Decoder(sizes, seed)
    b, d, w = m.b, sizes.width, sizes.heads * sizes.head
    x = b.add("embed", [m.ids], {"table": m.weight("embed", sizes.vocab, d, gain=6.0)})
    mask, (cos, sin) = m.mask(), m.angles()
    turn = {"rotary_dim": sizes.head, "style": "interleaved" if sizes.interleaved else "half"}
    for i in range(sizes.layers):
        p = f"layers.{i}."
        g = sizes.groups * sizes.head
        n = b.add("norm", [x], {"kind": "rms", "eps": 1e-6, "weight": m.weight(p + "n1", d, around=1)})
        rows = b.add("div", [n, m.factor(2)]) if sizes.tuned == "rows" else n
        q = b.add("linear", [rows], {"weight": m.weight(p + "q", d, w, gain=3.0)})
        k = b.add("linear", [n], {"weight": m.weight(p + "k", g, d, gain=2.0), "transposed": True})
        v = b.add("linear", [n], {"weight": m.weight(p + "v", d, g)})
        early = m.factor(2, 3) if sizes.tuned == "before" else None
        turned = b.add("rope", [m.heads(q, sizes.heads, early), cos, sin], turn)
        if sizes.tuned == "queries":
            turned = b.add("mul", [turned, m.factor(1, 3)])
        key = b.add("rope", [m.heads(k, sizes.groups), cos, sin], turn)
        mixed = m.attend(i, turned, key, m.heads(v, sizes.groups), mask)
        x = b.add("add", [x, b.add("linear", [mixed], {"weight": m.weight(p + "o", w, d)})])
        n = b.add("norm", [x], {"kind": "rms", "eps": 1e-6, "weight": m.weight(p + "n2", d, around=1)})
        names = {a: m.weight(p + a, d, sizes.inner) for a in ("gate", "up")}
        names["down"] = m.weight(p + "down", sizes.inner, d)
        x = b.add("add", [x, b.add("gated_mlp", [n], {"act": "silu", **names})])
    x = b.add("norm", [x], {"kind": "rms", "eps": 1e-6, "weight": m.weight("norm", d, around=1)})
    return m.finish(b.add("lm_head", [x], {"weight": m.weight("head", d, sizes.vocab)}))


def gpt2(sizes: Sizes | None = None, seed: int = 0) -> Graph:
    """LayerNorm with bias, learned positions, packed QKV through split, tied head."""
    sizes = sizes or Sizes(groups=4)
    m = Decoder(sizes, seed)
    b, d, w = m.b, sizes.width, sizes.heads * sizes.head
    wte = m.weight("wte", sizes.vocab, d, gain=6.0)
    x = b.add("embed", [m.ids], {"table": wte})
    x = b.add(
        "add", [x, b.add("embed", [m.position_ids], {"table": m.weight("wpe", sizes.positions, d, gain=6.0)})]
    )
    mask = m.mask()
    for i in range(sizes.layers):
        p = f"h.{i}."

        def norm(value: SSAValue, name: str) -> SSAValue:
            scale, shift = m.weight(name + ".g", d, around=1), m.weight(name + ".b", d)
            return b.add("norm", [value], {"kind": "layer", "eps": 1e-5, "weight": scale, "bias": shift})

        packed = {"weight": m.weight(p + "qkv", d, 3 * w, gain=2.0), "bias": m.weight(p + "qkv.b", 3 * w)}
        qkv = b.add("linear", [norm(x, p + "n1")], packed)
        parts = b.add_op("split", [qkv], {"axis": 2, "sizes": [w, w, w]}).results
        q, k, v = (m.heads(part, sizes.heads) for part in parts)
        mixed = m.attend(i, q, k, v, mask)
        out = {"weight": m.weight(p + "o", w, d), "bias": m.weight(p + "o.b", d)}
        x = b.add("add", [b.add("linear", [mixed], out), x])
        up = {"weight": m.weight(p + "up", d, sizes.inner), "bias": m.weight(p + "up.b", sizes.inner)}
        inner = b.add("linear", [norm(x, p + "n2")], up)
        inner = b.add("activation", [inner], {"kind": "gelu_tanh"})
        down = {"weight": m.weight(p + "down", sizes.inner, d), "bias": m.weight(p + "down.b", d)}
        x = b.add("add", [x, b.add("linear", [inner], down)])
    x = norm(x, "nf")
    return m.finish(b.add("lm_head", [x], {"weight": wte, "transposed": True}))


def run_inputs(graph: Graph, ids: Array, caches: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Inputs of a dynamic decoder for `ids` after `caches` (present.<i>.key -> array), nothing padded."""
    batch, tokens = ids.shape
    past = 0 if not caches else next(iter(caches.values())).shape[2]
    made: dict[str, Array] = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
    }
    for name, kind in graph.inputs:
        if name.startswith("past_key_values."):
            _, layer, what = name.split(".")
            empty = np.zeros((batch, kind.shape[1].value, 0, kind.shape[3].value), np.float32)
            made[name] = caches[f"present.{layer}.{what}"] if caches else empty
    return made
