"""A whole decoder as an ONNX graph: embedding, layers, head; masks and positions made from its inputs."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from mapper.zoo import blocks
from mapper.zoo.config import Config, Layer
from mapper.zoo.writer import Writer


def decoder(c: Config, dtype: str, data_file: str) -> Writer:
    """The graph of a model. Inputs: input_ids, attention_mask, position_ids, caches; outputs: logits, caches.

    `data_file` is where it says that its weights are."""
    w = Writer(c.name, dtype, data_file)
    ids = w.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    seen = w.input("attention_mask", ["batch", "past + sequence"], TensorProto.INT64)
    places = w.input("position_ids", ["batch", "sequence"], TensorProto.INT64)
    table = w.weight("model.embed_tokens.weight", c.vocab, c.hidden, fan_in=1)
    x = str(w.op("Gather", table, ids, axis=0))
    if c.embedding_scale != 1.0:
        x = str(w.op("Mul", x, w.number(c.embedding_scale)))
    if c.positions:
        learned = w.weight("model.position_embeddings.weight", c.positions, c.hidden, fan_in=4)
        x = str(w.op("Add", x, w.op("Gather", learned, places, axis=0)))
    shared = _shared(w, c, places, seen, ids)
    for i, layer in enumerate(c.layers):
        w.prefix = f"layers.{i}/"
        x = _layer(w, c, layer, shared, x, i)
    w.prefix = ""
    x = blocks.norm(w, c, x, "model.norm", c.hidden)
    head = w.transpose(table, 1, 0) if c.tied else w.weight("lm_head.weight", c.hidden, c.vocab)
    logits = str(w.op("MatMul", x, head))
    if c.final_softcap:
        capped = w.op("Tanh", w.op("Div", logits, w.number(c.final_softcap)))
        logits = str(w.op("Mul", capped, w.number(c.final_softcap)))
    w.output(logits, "logits", ["batch", "sequence", c.vocab])
    w.outputs.insert(0, w.outputs.pop())
    return w


def _layer(w: Writer, c: Config, layer: Layer, shared: blocks.Shared, x: str, i: int) -> str:
    name = f"model.layers.{i}"
    y = blocks.attention(w, c, layer, shared, blocks.norm(w, c, x, f"{name}.input_layernorm", c.hidden), i)
    if c.post_norms:
        y = blocks.norm(w, c, y, f"{name}.attention_out_layernorm", c.hidden)
    x = str(w.op("Add", x, y))
    y = blocks.norm(w, c, x, f"{name}.post_attention_layernorm", c.hidden)
    if layer.experts is not None:
        y = blocks.moe(w, c, layer.experts, y, i)
    else:
        y = blocks.mlp(w, c, y, f"{name}.mlp", layer.inner)
    if c.post_norms:
        y = blocks.norm(w, c, y, f"{name}.mlp_out_layernorm", c.hidden)
    return str(w.op("Add", x, y))


def _shared(w: Writer, c: Config, places: str, seen: str, ids: str) -> blocks.Shared:
    """Positions and the mask of every kind of layer, bool [batch, 1, sequence, past + sequence]."""
    whole = w.op("Cast", w.op("Unsqueeze", places, w.ints(2)), to=TensorProto.FLOAT)
    shared = blocks.Shared(str(whole))
    total = w.op("Squeeze", w.op("Shape", seen, start=1, end=2))
    new = w.op("Squeeze", w.op("Shape", ids, start=1, end=2))
    past = w.op("Sub", total, new)
    zero, one = w.constant(np.array(0, np.int64)), w.constant(np.array(1, np.int64))
    key = w.op("Range", zero, total, one)
    query = w.op("Unsqueeze", w.op("Range", past, total, one), w.ints(1))
    causal = w.op("LessOrEqual", key, query)
    real = w.op("Unsqueeze", w.op("Cast", seen, to=TensorProto.BOOL), w.ints(1, 2))
    for window, chunk in sorted({(layer.window, layer.chunk) for layer in c.layers}):
        rule = causal
        if window:
            oldest = w.op("Sub", query, w.constant(np.array(window, np.int64)))
            rule = w.op("And", rule, w.op("Greater", key, oldest))
        if chunk:
            size = w.constant(np.array(chunk, np.int64))
            rule = w.op("And", rule, w.op("Equal", w.op("Div", key, size), w.op("Div", query, size)))
        shared.masks[window, chunk] = str(w.op("And", rule, real))
    if any(layer.tuned for layer in c.layers):
        shared.tuning = _tuning(w, str(whole), *c.tuning)
    return shared


def _tuning(w: Writer, positions: str, floor_scale: float, scale: float) -> str:
    """1 + scale log(1 + floor((position + 1) / floor_scale)), [batch, 1, sequence, 1]."""
    steps = w.op("Div", w.op("Add", positions, w.number(1.0, "f32")), w.number(floor_scale, "f32"))
    grown = w.op("Log", w.op("Add", w.op("Floor", steps), w.number(1.0, "f32")))
    grown = w.op("Add", w.op("Mul", grown, w.number(scale, "f32")), w.number(1.0, "f32"))
    return w.cast(str(w.op("Unsqueeze", grown, w.ints(1))))
