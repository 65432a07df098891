"""Transformer ops: what recognition finds in an exported graph, with the model's own dynamic shapes.

B batch, S new tokens, T all tokens (past and new), D model width, H heads, Hkv key/value heads, Dh head
width. Weights are symbols. A matrix is [K, N] and multiplies from the right, or [N, K] where its
`transposed` flag is set.
"""

from __future__ import annotations

from xdsl.irdl import (
    AttrSizedOperandSegments,
    attr_def,
    irdl_op_definition,
    operand_def,
    opt_attr_def,
    opt_operand_def,
    result_def,
)

from mapper.ir.op import BOOL, FLOAT, FLOATS, INT, TEXT, WEIGHT, DataflowOp, TextKind
from mapper.ir.types import TensorType

ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_tanh",
    "gelu_quick",
    "relu",
    "relu_squared",
    "sigmoid",
    "tanh",
    "identity",
)
ACTIVATION = TextKind(ACTIVATIONS)
NORM = TextKind(("rms", "layer"))
PACKING = TextKind(("halves", "interleaved"))
ROPE_STYLE = TextKind(("half", "interleaved"))
_FALSE, _TRUE = BOOL.encode(False), BOOL.encode(True)


@irdl_op_definition
class EmbedOp(DataflowOp):
    """Rows of `table` [V, D] at `ids` [...]: [..., D]."""

    name = "dataflow.embed"
    ids = operand_def(TensorType)
    y = result_def(TensorType)
    table = attr_def(WEIGHT)


@irdl_op_definition
class LinearOp(DataflowOp):
    """y = x @ W + bias over the last axis of x [..., K]; W [K, N], or [N, K] with `transposed`.

    `round_block` > 0: x is rounded first, as `round_blocks` does; in MLPs the operand of each product."""

    name = "dataflow.linear"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    weight = attr_def(WEIGHT)
    bias = opt_attr_def(WEIGHT)
    transposed = opt_attr_def(BOOL, _FALSE)
    format = opt_attr_def(TEXT, TEXT.encode("f32"))
    round_block = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class LmHeadOp(DataflowOp):
    """The linear layer that makes the logits [..., V]; the same meaning as `linear`, its own name for
    targets."""

    name = "dataflow.lm_head"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    weight = attr_def(WEIGHT)
    bias = opt_attr_def(WEIGHT)
    transposed = opt_attr_def(BOOL, _FALSE)
    format = opt_attr_def(TEXT, TEXT.encode("f32"))
    round_block = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class NormOp(DataflowOp):
    """Normalisation over the last axis: `rms` is x / sqrt(mean(x^2) + eps), `layer` subtracts the mean first.

    Then times (weight + weight_offset), plus bias. Without `weight` the factor is 1."""

    name = "dataflow.norm"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    kind = attr_def(NORM)
    eps = attr_def(FLOAT)
    weight = opt_attr_def(WEIGHT)
    bias = opt_attr_def(WEIGHT)
    weight_offset = opt_attr_def(FLOAT, FLOAT.encode(0.0))


@irdl_op_definition
class RopeOp(DataflowOp):
    """Rotary embedding of x [B, H, S, Dh] on its first `rotary_dim` columns (the others pass).

    cos and sin: [S, r], [B|1, S, r] or [B|1, 1, S, r] with r = rotary_dim/2 or rotary_dim (each angle
    twice, in the style's order). `half` pairs column i with i + rotary_dim/2, `interleaved` pairs 2i with
    2i + 1; a pair (a, b) becomes (a cos - b sin, b cos + a sin)."""

    name = "dataflow.rope"
    x = operand_def(TensorType)
    cos = operand_def(TensorType)
    sin = operand_def(TensorType)
    y = result_def(TensorType)
    style = opt_attr_def(ROPE_STYLE, ROPE_STYLE.encode("half"))
    rotary_dim = attr_def(INT)


@irdl_op_definition
class AttentionOp(DataflowOp):
    """softmax(scale q k^T, masked) v: q [B, H, S, Dh], k [B, Hkv, T, Dh], v [B, Hkv, T, Dv] -> [B, H, S, Dv].

    Query head h reads key/value head h // (H/Hkv). `softcap` c > 0 makes scores c tanh(score/c) before
    masking. `mask` broadcasts to [B, H, S, T]: added where float, and where bool false positions are
    excluded. `sinks` [H] adds one score per head to the softmax's denominator. `causal`, `window` (0: none;
    else a query sees only the last `window` positions, itself included), `chunk` (0: none; else only
    those of its own run of `chunk` positions) and `slopes` (ALiBi: slope_h * (t -
    position) is added) say what the mask is when no token is padding; where there is no mask operand they
    are the mask themselves."""

    name = "dataflow.attention"
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    mask = opt_operand_def(TensorType)
    sinks = opt_operand_def(TensorType)
    y = result_def(TensorType)
    scale = attr_def(FLOAT)
    causal = opt_attr_def(BOOL, _FALSE)
    window = opt_attr_def(INT, INT.encode(0))
    softcap = opt_attr_def(FLOAT, FLOAT.encode(0.0))
    chunk = opt_attr_def(INT, INT.encode(0))
    slopes = opt_attr_def(FLOATS)
    irdl_options = (AttrSizedOperandSegments(as_property=False),)


@irdl_op_definition
class LatentAttentionOp(DataflowOp):
    """Multi-head latent attention: keys and values of all heads are made from one latent row per token.

    q [B, H, S, Dn + Dr]; latent [B, 1, T, R] and rope_key [B, 1, T, Dr] are what is cached; `weight`
    [R, H (Dn + Dv)], or transposed. Head h has keys (latent W_h[:, :Dn], rope_key) and values
    latent W_h[:, Dn:]; the rest is `attention` with as many key/value heads as heads: [B, H, S, Dv].
    `nope_dim` is Dn. Source: DeepSeek-V2 technical report, section 2.1."""

    name = "dataflow.latent_attention"
    q = operand_def(TensorType)
    latent = operand_def(TensorType)
    rope_key = operand_def(TensorType)
    mask = opt_operand_def(TensorType)
    y = result_def(TensorType)
    weight = attr_def(WEIGHT)
    nope_dim = attr_def(INT)
    scale = attr_def(FLOAT)
    transposed = opt_attr_def(BOOL, _FALSE)
    causal = opt_attr_def(BOOL, _FALSE)
    window = opt_attr_def(INT, INT.encode(0))
    softcap = opt_attr_def(FLOAT, FLOAT.encode(0.0))


@irdl_op_definition
class KvAppendOp(DataflowOp):
    """past [B, Hkv, P, Dh] and new [B, Hkv, S, Dh] joined along the token axis: [B, Hkv, P + S, Dh]."""

    name = "dataflow.kv_append"
    past = operand_def(TensorType)
    new = operand_def(TensorType)
    y = result_def(TensorType)


@irdl_op_definition
class KvUpdateOp(DataflowOp):
    """past [B, Hkv, M, Dh] with row rows[b, s] of every head replaced by new [B, Hkv, S, Dh]'s row s.

    `rows`: i64, [S] or [B|1, S]; negative ones count from the end."""

    name = "dataflow.kv_update"
    past = operand_def(TensorType)
    new = operand_def(TensorType)
    rows = operand_def(TensorType)
    y = result_def(TensorType)


@irdl_op_definition
class ActivationOp(DataflowOp):
    """A recognised activation function: gelu is exact (erf), gelu_tanh the tanh form, gelu_quick x
    sigmoid(1.702 x)."""

    name = "dataflow.activation"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    kind = attr_def(ACTIVATION)


@irdl_op_definition
class MlpOp(DataflowOp):
    """down(act(up(x))) with biases; up [D, F], down [F, D], each [out, in] where `transposed`."""

    name = "dataflow.mlp"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    act = attr_def(ACTIVATION)
    up = attr_def(WEIGHT)
    down = attr_def(WEIGHT)
    up_bias = opt_attr_def(WEIGHT)
    down_bias = opt_attr_def(WEIGHT)
    up_transposed = opt_attr_def(BOOL, _FALSE)
    down_transposed = opt_attr_def(BOOL, _FALSE)
    round_block = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class GatedMlpOp(DataflowOp):
    """down(act(gate(x)) * up(x)) with biases; gate and up [D, F], down [F, D], each [out, in] where
    transposed."""

    name = "dataflow.gated_mlp"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    act = attr_def(ACTIVATION)
    gate = attr_def(WEIGHT)
    up = attr_def(WEIGHT)
    down = attr_def(WEIGHT)
    gate_bias = opt_attr_def(WEIGHT)
    up_bias = opt_attr_def(WEIGHT)
    down_bias = opt_attr_def(WEIGHT)
    gate_transposed = opt_attr_def(BOOL, _FALSE)
    up_transposed = opt_attr_def(BOOL, _FALSE)
    down_transposed = opt_attr_def(BOOL, _FALSE)
    round_block = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class PackedMlpOp(DataflowOp):
    """down(act(gate) * up) where one matrix makes gate and up: gate_up [D, 2F], down [F, D], each with its
    axes exchanged where transposed; biases.

    `packing`: the gate is the first half of the 2F columns, or every other one from the first."""

    name = "dataflow.packed_mlp"
    x = operand_def(TensorType)
    y = result_def(TensorType)
    act = attr_def(ACTIVATION)
    gate_up = attr_def(WEIGHT)
    down = attr_def(WEIGHT)
    gate_up_bias = opt_attr_def(WEIGHT)
    down_bias = opt_attr_def(WEIGHT)
    gate_up_transposed = opt_attr_def(BOOL, _FALSE)
    down_transposed = opt_attr_def(BOOL, _FALSE)
    packing = opt_attr_def(PACKING, PACKING.encode("halves"))
    round_block = opt_attr_def(INT, INT.encode(0))


@irdl_op_definition
class SampleOp(DataflowOp):
    """The greedy token: index (i64) of the largest logit along the last axis."""

    name = "dataflow.sample"
    logits = operand_def(TensorType)
    y = result_def(TensorType)
