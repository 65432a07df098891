"""Inference rules of the transformer ops and their serving forms."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.ir.dims import Dim
from mapper.ir.infer import Call, rule
from mapper.ir.infer_primitives import same
from mapper.ir.serving import (
    CacheAppendOp,
    CachedAttentionOp,
    CachedLatentAttentionOp,
    EmbedAtOp,
    RopeAtOp,
    ScaleAtOp,
)
from mapper.ir.transformer import (
    ActivationOp,
    AttentionOp,
    EmbedOp,
    GatedMlpOp,
    KvAppendOp,
    KvUpdateOp,
    LatentAttentionOp,
    LinearOp,
    LmHeadOp,
    MlpOp,
    NormOp,
    PackedMlpOp,
    RopeOp,
    SampleOp,
)
from mapper.ir.types import TensorType

Types = Sequence[TensorType]


def matrix(call: Call, name: str, flag: str = "transposed") -> tuple[Dim, Dim]:
    """(inputs K, outputs N) of the matrix that weight attribute `name` points to."""
    weight = call.weight(name)
    call.need(weight.rank == 2, f"{name} is {weight}, not a matrix")
    first, second = weight.shape
    return (second, first) if call.attrs.get(flag) else (first, second)


def _vector(call: Call, name: str, size: Dim) -> None:
    if call.attrs.get(name) is not None:
        vector = call.weight(name)
        call.need(vector.rank == 1, f"{name} is {vector}, not a vector")
        same(call, vector.shape[0], size, f"{name} has another length")


@rule(EmbedOp)
def _embed(call: Call) -> Types:
    table = call.weight("table")
    call.need(table.rank == 2, f"table is {table}, not a matrix")
    return [TensorType.of([*call.type("ids").shape, table.shape[1]], table.dtype)]


@rule(LinearOp, LmHeadOp)
def _linear(call: Call) -> Types:
    x = call.type("x")
    inputs, outputs = matrix(call, "weight")
    call.need(x.rank > 0, "a scalar operand")
    same(call, x.shape[-1], inputs, "inner dimensions differ")
    _vector(call, "bias", outputs)
    return [TensorType.of([*x.shape[:-1], outputs], x.dtype)]


@rule(NormOp)
def _norm(call: Call) -> Types:
    x = call.type("x")
    _vector(call, "weight", x.shape[-1])
    _vector(call, "bias", x.shape[-1])
    return [x]


@rule(RopeOp)
def _rope(call: Call) -> Types:
    x, cos, sin = call.type("x"), call.type("cos"), call.type("sin")
    call.need(
        x.rank == 4 and 2 <= cos.rank <= 4 and cos.rank == sin.rank, f"ranks {x.rank}, {cos.rank}, {sin.rank}"
    )
    width = call.attrs["rotary_dim"]
    call.need(width % 2 == 0 and cos.shape[-1] in (Dim.of(width), Dim.of(width // 2)), f"cos is {cos}")
    return [x]


@rule(RopeAtOp)
def _rope_at(call: Call) -> Types:
    x, table = call.type("x"), call.weight("table")
    call.need(x.rank == 4, f"x is {x}")
    call.need(table.rank == 3 and table.shape[2] * 2 == Dim.of(call.attrs["rotary_dim"]), f"table is {table}")
    return [x]


@rule(ScaleAtOp)
def _scale_at(call: Call) -> Types:
    x, table, axis = call.type("x"), call.weight("table"), call.attrs.get("axis", -2)
    call.need(-x.rank <= axis < 0, f"axis {axis} of {x}")
    call.need(table.rank == 1, f"table is {table}, not a vector")
    return [x]


@rule(AttentionOp, CachedAttentionOp)
def _attention(call: Call) -> Types:
    q, k, v = call.type("q"), call.type("k"), call.type("v")
    call.need(q.rank == k.rank == v.rank == 4, f"q {q}, k {k}, v {v}")
    same(call, q.shape[3], k.shape[3], "head widths differ")
    same(call, k.shape[1], v.shape[1], "key and value heads differ")
    if q.shape[1].is_const and k.shape[1].is_const:
        heads, groups = q.shape[1].value, k.shape[1].value
        call.need(groups > 0 and heads % groups == 0, f"{groups} key/value heads for {heads} heads")
    return [TensorType.of([*q.shape[:3], v.shape[3]], q.dtype)]


@rule(LatentAttentionOp, CachedLatentAttentionOp)
def _latent_attention(call: Call) -> Types:
    q, latent, rope_key = call.type("q"), call.type("latent"), call.type("rope_key")
    call.need(q.rank == latent.rank == rope_key.rank == 4, f"q {q}, latent {latent}, rope_key {rope_key}")
    inputs, outputs = matrix(call, "weight")
    same(call, latent.shape[3], inputs, "latent and weight differ in width")
    same(call, latent.shape[2], rope_key.shape[2], "latent and rope_key differ in tokens")
    nope = Dim.of(call.attrs["nope_dim"])
    same(call, q.shape[3], nope + rope_key.shape[3], "q is not as wide as keys")
    call.need(q.shape[1].is_const and outputs.is_const, f"q {q}")
    call.need(outputs.value % q.shape[1].value == 0, f"{outputs} columns for {q.shape[1]} heads")
    value_dim = outputs // q.shape[1] - nope
    call.need(value_dim.value > 0, f"{outputs} columns leave no values")
    return [TensorType.of([*q.shape[:3], value_dim], q.dtype)]


@rule(KvAppendOp)
def _kv_append(call: Call) -> Types:
    past, new = call.type("past"), call.type("new")
    call.need(past.rank == new.rank == 4 and past.dtype == new.dtype, f"past {past}, new {new}")
    same(call, past.shape[1], new.shape[1], "heads differ")
    return [
        TensorType.of([new.shape[0], past.shape[1], past.shape[2] + new.shape[2], past.shape[3]], past.dtype)
    ]


@rule(KvUpdateOp)
def _kv_update(call: Call) -> Types:
    past, new, rows = call.type("past"), call.type("new"), call.type("rows")
    call.need(past.rank == new.rank == 4 and past.dtype == new.dtype, f"past {past}, new {new}")
    call.need(rows.rank in (1, 2), f"rows {rows}")
    for axis in (0, 1, 3):
        same(call, past.shape[axis], new.shape[axis], f"past {past}, new {new}")
    same(call, rows.shape[-1], new.shape[2], "as many rows as new tokens are needed")
    return [past]


@rule(CacheAppendOp)
def _cache_append(call: Call) -> Types:
    cache, new = call.type("cache"), call.type("new")
    call.need(cache.rank == new.rank == 4 and cache.dtype == new.dtype, f"cache {cache}, new {new}")
    for axis in (0, 1, 3):
        same(call, cache.shape[axis], new.shape[axis], f"cache {cache}, new {new}")
    return [cache]


@rule(EmbedAtOp)
def _embed_at(call: Call) -> Types:
    table = call.weight("table")
    call.need(table.rank == 2, f"table is {table}, not a matrix")
    return [TensorType.of([call.attrs["batch"], call.attrs["seq"], table.shape[1]], table.dtype)]


@rule(ActivationOp)
def _activation(call: Call) -> Types:
    return [call.type("x")]


@rule(MlpOp, GatedMlpOp)
def _mlp(call: Call) -> Types:
    x = call.type("x")
    inner = Dim.of(0)
    for name in ("gate", "up"):
        if name in call.attrs:
            inputs, inner = matrix(call, name, f"{name}_transposed")
            same(call, x.shape[-1], inputs, f"inner dimensions of {name} differ")
            _vector(call, f"{name}_bias", inner)
    inputs, outputs = matrix(call, "down", "down_transposed")
    same(call, inner, inputs, "inner dimensions of down differ")
    _vector(call, "down_bias", outputs)
    return [TensorType.of([*x.shape[:-1], outputs], x.dtype)]


@rule(PackedMlpOp)
def _packed_mlp(call: Call) -> Types:
    x = call.type("x")
    inputs, both = matrix(call, "gate_up", "gate_up_transposed")
    same(call, x.shape[-1], inputs, "inner dimensions of gate_up differ")
    _vector(call, "gate_up_bias", both)
    inner, outputs = matrix(call, "down", "down_transposed")
    same(call, both, inner * 2, "gate_up is not twice as wide as down")
    _vector(call, "down_bias", outputs)
    return [TensorType.of([*x.shape[:-1], outputs], x.dtype)]


@rule(SampleOp)
def _sample(call: Call) -> Types:
    return [TensorType.of(call.type("logits").shape[:-1], "i64")]
