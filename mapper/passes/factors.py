"""Factors on rows that depend on the token's position alone, found by what they compute.

Llama 4 scales the queries of its layers without rotary embedding in this way, by 1 + attn_scale log(1 +
floor((position + 1) / floor_scale)). Source: Hugging Face transformers, Llama4TextAttention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mapper.errors import UnsupportedModelError
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.types import Array, is_float
from mapper.passes.probe import Probe, place

_PAST, _TOKENS = 3, 4


@dataclass(frozen=True)
class Factor:
    """Operand `x` of a product or quotient is multiplied by what operand `by` says of the position, or
    divided by it; `axis` of x, counted from the end (negative), is that of the tokens."""

    x: int
    by: int
    axis: int


def factor_of(probe: Probe, op: DataflowOp) -> Factor | None:
    """The factor by position that an op of the dynamic graph applies, None where it applies none."""
    if op.mnemonic not in ("mul", "div"):
        return None
    for x, by in ((0, 1),) if op.mnemonic == "div" else ((0, 1), (1, 0)):
        if op.operands[by] not in probe.from_positions or op.operands[x] not in probe.from_tokens:
            continue
        try:
            (found,) = probe.values(op, [op.operands[by]], _PAST, _TOKENS)
        except UnsupportedModelError:
            continue
        long = [i for i, n in enumerate(found.shape) if n != 1]
        if len(long) != 1 or found.size != _TOKENS or not is_float(tensor_type(op.results[0]).dtype):
            continue
        axis, rank = long[0] - found.ndim, tensor_type(op.operands[x]).rank
        if found.ndim <= rank == tensor_type(op.results[0]).rank:
            return Factor(x, by, axis)
    return None


def factor_table(probe: Probe, op: DataflowOp, factor: Factor, context: int) -> Array:
    """[context] f32: what `op` multiplies rows by at positions 0..context-1. Raises UnsupportedModelError
    where that depends on more than the position."""
    table = _factors(probe, op, factor, 0, context)
    past = context // 2 if probe.cached else 0
    later = _factors(probe, op, factor, past, min(context - past, _TOKENS))
    if not np.allclose(later, table[past : past + later.size], rtol=1e-5, atol=1e-6):
        raise UnsupportedModelError(f"{place(op)}: its factors depend on more than the token's position")
    return np.asarray(1 / table if op.mnemonic == "div" else table).astype(np.float32)


def _factors(probe: Probe, op: DataflowOp, factor: Factor, past: int, tokens: int) -> Array:
    (found,) = probe.values(op, [op.operands[factor.by]], past, tokens)
    if found.size != tokens:
        raise UnsupportedModelError(f"{place(op)}: factors of shape {list(found.shape)}")
    return np.asarray(found.reshape(-1), np.float32)
