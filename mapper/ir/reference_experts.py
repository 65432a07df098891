"""Reference semantics of routing and experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper.errors import ModelError
from mapper.ir.op import DataflowOp
from mapper.ir.reference import Step, meaning
from mapper.ir.reference_compute import round_blocks, sigmoid, softmax
from mapper.ir.reference_transformer import ACTIVATION_MEANINGS
from mapper.ir.types import Array


def choice_of(s: Step) -> tuple[Array, Array]:
    """Scores [..., experts] of a `route`, and those that it chooses by."""
    logits, scoring = s.arg("logits"), s.attr("scoring")
    scores = logits
    if scoring == "softmax":
        scores = softmax(logits, -1)
    elif scoring == "sigmoid":
        scores = np.asarray(sigmoid(logits))
    correction = s.weight("correction")
    return scores, scores if correction is None else scores + correction


def shares_of(s: Step, scores: Array, index: Array) -> Array:
    """Shares [..., chosen] of the chosen experts."""
    share = np.take_along_axis(scores, index, -1)
    if s.attr("scoring") == "topk_softmax":
        share = softmax(share, -1)
    if s.attr("normalise"):
        share = share / (share.sum(-1, keepdims=True) + s.attr("epsilon"))
    return np.asarray(share * s.attr("scale"), s.arg("logits").dtype)


def eligible(op: DataflowOp, choice: Array) -> Array:
    """Scores [..., experts] to choose by, those outside of the best groups replaced."""
    groups = op.attr("groups")
    if not groups:
        return choice
    runs = choice.reshape(*choice.shape[:-1], groups, -1)
    best = np.sort(runs, axis=-1)[..., ::-1]
    value = best[..., 0] if op.attr("group_score") == "max" else best[..., :2].sum(-1)
    order = np.argsort(-value, axis=-1, kind="stable")[..., : op.attr("top_groups")]
    kept = np.zeros(value.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return np.where(kept[..., None], runs, op.attr("group_fill")).reshape(choice.shape)


def best_of(op: DataflowOp, choice: Array) -> Array:
    """The experts [..., chosen] that a `route` takes by scores [..., experts]."""
    return np.argsort(-eligible(op, choice), axis=-1, kind="stable")[..., : op.attr("top_k")]


@meaning("route")
def _route(s: Step) -> tuple[Array, Array]:
    scores, choice = choice_of(s)
    index = best_of(s.op, choice)
    return index, shares_of(s, scores, index)


class _Stacks(dict[str, Array | None]):
    """The weights of all experts by attribute, as they are stored: they are fetched once per op, and one
    expert's at a time put into the precision asked for."""

    def __init__(self, s: Step) -> None:
        self.step = s

    def __missing__(self, name: str) -> Array | None:
        symbol = self.step.op.attr(name)
        self[name] = None if symbol is None else self.step.weights(symbol)
        return self[name]

    def of(self, name: str, expert: int) -> Array | None:
        """One expert's weight, None where the op has none."""
        stack = self[name]
        return None if stack is None else self.step.cast(stack[expert])


def _product(s: Step, x: Array, name: str, expert: int, stacks: _Stacks) -> Array:
    matrix, bias = stacks.of(name, expert), stacks.of(f"{name}_bias", expert)
    if matrix is None:
        raise ModelError(f"{s.op.name} has no {name}")
    x = round_blocks(x, s.attr("round_block")) if s.attr("round_block") else x
    y = x @ (matrix.T if s.attr(f"{name}_transposed") else matrix)
    return np.asarray(y if bias is None else y + bias)


def _hidden(s: Step, x: Array, expert: int, stacks: _Stacks) -> Any:
    act = ACTIVATION_MEANINGS[s.attr("act")]
    up, packing, limit = _product(s, x, "up", expert, stacks), s.attr("packing"), s.attr("limit")
    if packing == "none" and s.attr("gate") is None:
        return act(up)
    if packing == "halves":
        gate, up = np.split(up, 2)
    elif packing == "interleaved":
        gate, up = up[0::2], up[1::2]
    else:
        gate = _product(s, x, "gate", expert, stacks)
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return act(gate) * (up + s.attr("up_offset"))


@meaning("moe")
def _moe(s: Step) -> Array:
    x, index, share = s.arg("x"), s.arg("index"), s.arg("share")
    rows = x.reshape(-1, x.shape[-1])
    chosen, shares = (a.reshape(-1, a.shape[-1]) for a in (index, share))
    made, stacks = [], _Stacks(s)
    for row, experts, weights in zip(rows, chosen, shares, strict=True):
        total: Any = 0.0
        for e, w in zip(experts, weights, strict=True):
            if s.attr("share_input"):
                total = total + _product(s, _hidden(s, row * w, e, stacks), "down", e, stacks)
            else:
                total = total + w * _product(s, _hidden(s, row, e, stacks), "down", e, stacks)
        made.append(total)
    width = s.need("down").shape[-2 if s.attr("down_transposed") else -1]
    return np.asarray(made, x.dtype).reshape(*x.shape[:-1], width)
