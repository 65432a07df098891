"""Ops of a decoder layer as nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from mapper.ir.cost import attended_pairs, seen_from
from mapper.ir.op import DataflowOp
from mapper.ir.types import Array
from mapper.ir.weights import WeightSymbol
from mapper_gpu.extract_cut import cut, is_cut
from mapper_gpu.extractor import Extractor, View, rule
from mapper_gpu.hardware import COMPUTE, element_bytes
from mapper_gpu.nodes import Matrix


@rule("embed")
def _embed(c: Extractor, op: DataflowOp) -> None:
    view = c.view(op.operands[0], "rows")
    width = op.result_shape()[-1]
    symbol = op.attr("table")
    rows = c.known(symbol).shape[0]
    c.rows[c.row]["weight_bytes"] = int(width * element_bytes(c.form))
    weight = Matrix(symbol, rows, width, c.form)
    c.views[op.results[0]] = View(c.add("embed", [view.name], c.fresh(width), [weight]), "rows")


@rule("gather")
def _gather(c: Extractor, op: DataflowOp) -> None:
    """Rows of a table that the file has the other way round, as a product takes it."""
    table, ids = c.views[op.operands[0]], c.view(op.operands[1], "rows")
    if table.form != "table" or op.attr("axis") != 0 or c.values[ids.name].width != 1:
        c.fail("a lookup of something else than tokens in a table")
    rows, width = op.operand_shape(0)
    c.rows[c.row]["weight_bytes"] = int(width * element_bytes(c.form))
    weight = Matrix(table.name, rows, width, c.form, turned=table.data)
    c.views[op.results[0]] = View(c.add("embed", [ids.name], c.fresh(width), [weight]), "rows")


@rule("embed_at")
def _embed_at(c: Extractor, op: DataflowOp) -> None:
    width, symbol = op.result_shape()[-1], op.attr("table")
    rows = c.known(symbol).shape[0]
    c.rows[c.row]["weight_bytes"] = int(width * element_bytes(c.form))
    weight = Matrix(symbol, rows, width, c.form)
    made = c.add("positions", [], c.fresh(width), [weight], offset=op.attr("offset"))
    c.views[op.results[0]] = View(made, "rows")


@rule("linear", "lm_head")
def _linear(c: Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "rows")
    symbol, turned = op.attr("weight"), not op.attr("transposed")
    bias = c.vector(op.attr("bias"), "n")
    if is_cut(op):
        c.views[op.results[0]] = cut(c, op, x.name, turned, bias)
        return
    name = "lm_head" if op.mnemonic == "lm_head" else "linear"
    c.views[op.results[0]] = View(c.linear(x.name, c.matrix(symbol, turned), bias, name), "rows")


@rule("norm")
def _norm(c: Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "rows", "heads", "turned")
    value = c.values[x.name]
    attrs = {
        "norm": op.attr("kind"), "eps": op.attr("eps"), "offset": op.attr("weight_offset"),
        "weight": c.vector(op.attr("weight")), "bias": c.vector(op.attr("bias")),
    }  # fmt: skip
    kind = "norm" if x.form == "rows" else "head_norm"
    head = 0 if x.form == "rows" else value.head
    made = c.add(kind, [x.name], c.fresh(value.width, value.head), **attrs, head=head)
    c.views[op.results[0]] = View(made, x.form)


@rule("rope_at")
def _rope(c: Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "turned")
    value, symbol = c.values[x.name], op.attr("table")
    shape = tuple(c.graph.weights[symbol].shape)
    c.rows[c.row]["weight_bytes"] += 4 * c.tokens * op.attr("rotary_dim")
    made = c.add(
        "rope", [x.name], c.fresh(value.width, value.head), table={"symbol": symbol, "shape": shape},
        style=op.attr("style"), rotary=op.attr("rotary_dim"), head=value.head,
    )  # fmt: skip
    c.views[op.results[0]] = View(made, "turned")


@rule("scale_at")
def _scale(c: Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "rows", "heads", "turned")
    value, symbol, axis = c.values[x.name], op.attr("table"), op.attr("axis")
    tokens = -3 if x.form == "heads" else -2
    if op.operand_shape(0)[axis] != c.tokens or (c.tokens > 1 and axis != tokens):
        c.fail(f"factors along axis {axis} of {op.operand_shape(0)}, which is not that of the tokens")
    c.rows[c.row]["weight_bytes"] += 4 * c.tokens
    table = {"symbol": symbol, "length": c.graph.weights[symbol].elements}
    made = c.add("scale", [x.name], c.fresh(value.width, value.head), table=table)
    c.views[op.results[0]] = View(made, x.form)


@rule("cache_append")
def _append(c: Extractor, op: DataflowOp) -> None:
    cache, new = c.view(op.operands[0], "state"), c.view(op.operands[1], "turned")
    head = c.values[new.name].head
    c.values[f"{cache.name}@"] = c.values[cache.name]
    c.add("append", [new.name], f"{cache.name}@", cache=cache.name, head=head)
    c.views[op.results[0]] = View(cache.name, "state")


@rule("cached_attention")
def _attention(c: Extractor, op: DataflowOp) -> None:
    q = c.view(op.operands[0], "turned")
    k, v = (c.view(op.operands[i], "state") for i in (1, 2))
    b, h, s, d = op.operand_shape(0)
    _, hkv, length, dv = op.operand_shape(2)
    sinks = op.operand("sinks")
    vector = None
    if sinks is not None:
        view = c.view(sinks, "vector")
        vector = c.vector(view.name, "n")
    slopes = op.attr("slopes")
    past = length - s if c.phase == "decode" else 0
    window, chunk = op.attr("window"), op.attr("chunk")
    pairs = attended_pairs(op).value if past else sum(i + 1 - seen_from(i, window, chunk) for i in range(s))
    c.rows[c.row]["flops"] = 2 * b * h * pairs * (d + dv)
    made = c.add(
        "attention",
        [q.name, f"{k.name}@", f"{v.name}@"],
        c.fresh(h * dv, dv),
        batch=b,
        heads=h,
        kv_heads=hkv,
        dim=d,
        value_dim=dv,
        all_heads=hkv,
        tokens=s,
        past=past,
        length=length,
        pairs=pairs,
        element=element_bytes(c.form),
        engine=COMPUTE[c.form],
        window=window,
        chunk=chunk,
        scale=op.attr("scale"),
        softcap=op.attr("softcap"),
        sinks=vector,
        slopes=None if slopes is None else constant(c, "alibi.slopes", np.array(slopes, np.float32)),
        caches=(k.name, v.name),
    )
    c.views[op.results[0]] = View(made, "turned")


def constant(c: Extractor, name: str, array: Array) -> dict[str, Any]:
    """A vector per head that the graph has as attributes."""
    held = ((n, w.data) for n, w in c.constants.items())
    known = next((n for n, data in held if data is not None and np.array_equal(data, array)), None)
    symbol = known or f"{name}.{len(c.constants)}"
    c.constants[symbol] = WeightSymbol.of(symbol, array, derived=True)
    return {"symbol": symbol, "length": array.size, "split": "n"}


@rule("gated_mlp", "mlp", "packed_mlp")
def _mlp(c: Extractor, op: DataflowOp) -> None:
    x, act = c.view(op.operands[0], "rows").name, op.attr("act")
    turned = {n: not op.attr(f"{n}_transposed") for n in op.weights() if not n.endswith("bias")}
    if op.mnemonic == "packed_mlp":
        if op.attr("packing") != "halves":
            c.fail("gate and up in alternating columns")
        symbol = op.attr("gate_up")
        whole = c.known(symbol)
        half = whole.elements // whole.shape[0 if turned["gate_up"] else 1] // 2
        bias = c.vector(op.attr("gate_up_bias"), "n")
        gate, up = (
            c.linear(x, c.matrix(symbol, turned["gate_up"], first, half), bias, name, first)
            for name, first in (("gate", 0), ("up", half))
        )
        inner = c.add("gate", [gate, up], c.fresh(half), act=act)
    elif op.mnemonic == "gated_mlp":
        gate, up = (
            c.linear(x, c.matrix(op.attr(n), turned[n]), c.vector(op.attr(f"{n}_bias"), "n"), n)
            for n in ("gate", "up")
        )
        inner = c.add("gate", [gate, up], c.fresh(c.values[up].width), act=act)
    else:
        up = c.linear(x, c.matrix(op.attr("up"), turned["up"]), c.vector(op.attr("up_bias"), "n"), "up")
        inner = c.add("point", [up], c.fresh(c.values[up].width), fn=f"act:{act}", name="act")
    down = c.matrix(op.attr("down"), turned["down"])
    made = c.linear(inner, down, c.vector(op.attr("down_bias"), ""), "down")
    c.views[op.results[0]] = View(made, "rows")


@rule("activation")
def _activation(c: Extractor, op: DataflowOp) -> None:
    _point(c, op, f"act:{op.attr('kind')}", [op.operands[0]])


@rule("tanh", "sigmoid", "relu", "exp", "neg", "softplus", "sqrt", "abs")
def _unary(c: Extractor, op: DataflowOp) -> None:
    _point(c, op, op.mnemonic, [op.operands[0]])


@rule("add", "sub", "mul", "div")
def _binary(c: Extractor, op: DataflowOp) -> None:
    _point(c, op, op.mnemonic, list(op.operands))


def _point(c: Extractor, op: DataflowOp, fn: str, operands: list[SSAValue]) -> None:
    views = [c.view(v) for v in operands]
    found = [v for v in views if v.form in ("rows", "heads", "turned")]
    forms = {v.form for v in found}
    if len(forms) != 1 or len({c.values[v.name].width for v in found}) != 1:
        c.fail("operands of different forms")
    scalar = None
    for i, v in enumerate(views):
        if v.form == "constant":
            if v.data.size != 1:
                c.fail(f"a constant of {v.data.size} elements")
            scalar = (i, float(v.data.reshape(-1)[0]))
        elif v not in found:
            c.fail(f"an operand of form {v.form}")
    value = c.values[found[0].name]
    made = c.add("point", [v.name for v in found], c.fresh(value.width, value.head), fn=fn, scalar=scalar,
                 name=fn.split(":")[0])  # fmt: skip
    c.views[op.results[0]] = View(made, found[0].form)
