"""Serving-form ops: static shapes, a cache of L rows, and the position as data (`past_length`, an i64
scalar).

New token s of a step has position past_length + s.
"""

from __future__ import annotations

from xdsl.irdl import (
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    opt_operand_def,
    result_def,
)

from mapper.ir.op import BOOL, FLOAT, FLOATS, INT, WEIGHT, DataflowOp
from mapper.ir.transformer import ROPE_STYLE
from mapper.ir.types import TensorType


@irdl_op_definition
class RopeAtOp(DataflowOp):
    """Rotary embedding of x [B, H, S, Dh] at its positions, from `table` [2, L, rotary_dim/2] (cosines,
    sines).

    Pairs and formula as in `rope`."""

    name = "dataflow.rope_at"
    x = operand_def(TensorType)
    past_length = operand_def(TensorType)
    y = result_def(TensorType)
    table = attr_def(WEIGHT)
    style = opt_attr_def(ROPE_STYLE, ROPE_STYLE.encode("half"))
    rotary_dim = attr_def(INT)


@irdl_op_definition
class ScaleAtOp(DataflowOp):
    """x with the row of each of the S new tokens times the entry of `table` [L] at its position.

    `axis` of x, counted from the end (negative), is that of the tokens."""

    name = "dataflow.scale_at"
    x = operand_def(TensorType)
    past_length = operand_def(TensorType)
    y = result_def(TensorType)
    table = attr_def(WEIGHT)
    axis = opt_attr_def(INT, INT.encode(-2))


@irdl_op_definition
class EmbedAtOp(DataflowOp):
    """Rows position + `offset` of `table` [P, D] for the `seq` new tokens, the same for each of `batch`: [B,
    S, D]."""

    name = "dataflow.embed_at"
    past_length = operand_def(TensorType)
    y = result_def(TensorType)
    table = attr_def(WEIGHT)
    batch = attr_def(INT)
    seq = attr_def(INT)
    offset = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class CacheAppendOp(DataflowOp):
    """`cache` [B, Hkv, L, Dh] with rows past_length .. past_length+S-1 replaced by `new` [B, Hkv, S, Dh]."""

    name = "dataflow.cache_append"
    cache = operand_def(TensorType)
    new = operand_def(TensorType)
    past_length = operand_def(TensorType)
    y = result_def(TensorType)


@irdl_op_definition
class CachedAttentionOp(DataflowOp):
    """Attention of q [B, H, S, Dh] over caches k [B, Hkv, L, Dh] and v [B, Hkv, L, Dv] -> [B, H, S, Dv].

    Query s sees positions t <= past_length + s, of those only the last `window` where that is not 0, and only
    those of its own run of `chunk` positions where that is not 0; rows beyond are never read. `softcap`,
    `slopes`, `sinks` and head sharing as in `attention`."""

    name = "dataflow.cached_attention"
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    past_length = operand_def(TensorType)
    sinks = opt_operand_def(TensorType)
    y = result_def(TensorType)
    scale = attr_def(FLOAT)
    window = opt_attr_def(INT, INT.encode(0))
    softcap = opt_attr_def(FLOAT, FLOAT.encode(0.0))
    chunk = opt_attr_def(INT, INT.encode(0))
    slopes = opt_attr_def(FLOATS)


@irdl_op_definition
class CachedLatentAttentionOp(DataflowOp):
    """Latent attention of q [B, H, S, Dn + Dr] over caches latent [B, 1, L, R] and rope_key [B, 1, L, Dr]
    -> [B, H, S, Dv].

    `weight`, `nope_dim` and how heads are made of them as in `latent_attention`; which rows a query sees as
    in `cached_attention`."""

    name = "dataflow.cached_latent_attention"
    q = operand_def(TensorType)
    latent = operand_def(TensorType)
    rope_key = operand_def(TensorType)
    past_length = operand_def(TensorType)
    y = result_def(TensorType)
    weight = attr_def(WEIGHT)
    nope_dim = attr_def(INT)
    scale = attr_def(FLOAT)
    transposed = opt_attr_def(BOOL, BOOL.encode(False))
    window = opt_attr_def(INT, INT.encode(0))
    softcap = opt_attr_def(FLOAT, FLOAT.encode(0.0))
