"""The meaning of the instructions of routing and experts, on float32 registers. Source of each formula: the
IR ops `route` and `moe` (mapper/ir/README.md).

Blocks of rows: a register [blocks, 1 + tile], the expert (-1: the block is not there), then the numbers of
its (token, choice) pairs (-1: padding)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mapper_gpu.tile_ops import ACTIVATIONS, ROUNDED, Array, Registers, rounded

if TYPE_CHECKING:
    from mapper_gpu.execute import Stack, Task


def _top_k(
    task: Task, r: Registers, out: str, logits: str, correction: str | None, chosen: int, scoring: str,
    groups: int, top_groups: int, group_score: str, fill: float | None, normalise: bool, epsilon: float,
    scale: float,
) -> None:  # fmt: skip
    scores = _scores(r[logits], scoring)
    choice = scores if correction is None else scores + r[correction]
    if groups:
        runs = choice.reshape(len(choice), groups, -1)
        best = -np.sort(-runs, axis=-1)
        value = best[..., 0] if group_score == "max" else best[..., :2].sum(-1)
        kept = np.zeros(value.shape, bool)
        np.put_along_axis(kept, np.argsort(-value, axis=-1, kind="stable")[:, :top_groups], True, axis=-1)
        out_of_it = np.float32(-np.inf if fill is None else fill)
        choice = np.where(kept[..., None], runs, out_of_it).reshape(choice.shape)
    index = np.argsort(-choice, axis=-1, kind="stable")[:, :chosen]
    share = np.take_along_axis(scores, index, -1)
    if scoring == "topk_softmax":
        share = _scores(share, "softmax")
    if normalise:
        share = share / (share.sum(-1, keepdims=True) + np.float32(epsilon))
    r[out] = np.concatenate([index, share * np.float32(scale)], axis=1).astype(np.float32)


def _scores(x: Array, scoring: str) -> Array:
    with np.errstate(over="ignore"):
        if scoring == "softmax":
            made = np.exp(x - x.max(-1, keepdims=True))
            return np.asarray(made / made.sum(-1, keepdims=True), np.float32)
        return np.asarray(1 / (1 + np.exp(-x)), np.float32) if scoring == "sigmoid" else x


def _sorted(
    task: Task, routing: Array, count: int, chosen: int, tile: int, first: int, owned: int
) -> tuple[Array, Array]:
    """(expert of each block, pair of each row of each block) in order of experts, of the `owned` experts from
    `first` on (0: of all); an expert's number is that in its stack."""
    expert = routing[:, :chosen].astype(np.int64).reshape(-1)
    if expert.min() < 0 or expert.max() >= count:
        task.fail(f"a choice that is none of {count} experts")
    experts: list[int] = []
    rows: list[Array] = []
    last = first + owned if owned else count
    if not 0 <= first < last <= count:
        task.fail(f"experts {first} .. {last} of {count}")
    for e in np.unique(expert[(expert >= first) & (expert < last)]).tolist():
        pairs = np.flatnonzero(expert == e)
        for at in range(0, len(pairs), tile):
            block = np.full(tile, -1, np.int64)
            block[: len(pairs) - at] = pairs[at : at + tile]
            experts.append(e - first)
            rows.append(block)
    return np.array(experts, np.int64), np.array(rows, np.int64).reshape(-1, tile)


def _align(
    task: Task, r: Registers, out: str, routing: str, count: int, chosen: int, tile: int, blocks: int,
    first: int = 0, owned: int = 0,
) -> None:  # fmt: skip
    experts, pairs = _sorted(task, r[routing], count, chosen, tile, first, owned)
    if len(experts) > blocks:
        task.fail(f"{len(experts)} blocks of experts, the schedule has {blocks}")
    made = np.full((blocks, 1 + tile), -1, np.float32)
    made[: len(experts), 0], made[: len(experts), 1:] = experts, pairs
    r[out] = made


def _places(
    task: Task, r: Registers, out: str, routing: str, count: int, chosen: int, tile: int, blocks: int,
    first: int = 0, owned: int = 0,
) -> None:  # fmt: skip
    _, pairs = _sorted(task, r[routing], count, chosen, tile, first, owned)
    flat = pairs.reshape(-1)
    made = np.full(r[routing].shape[0] * chosen, -1, np.float32)
    made[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    r[out] = made.reshape(-1, chosen)


def _gather(
    task: Task, r: Registers, out: str, x: str, blocks: str, chosen: int, routing: str | None
) -> None:
    pairs = r[blocks][:, 1:].astype(np.int64).reshape(-1)
    token = np.maximum(pairs, 0) // chosen
    if token.max() >= len(r[x]):
        task.fail("a block has a row of no token")
    made = r[x][token]
    if routing is not None:
        made = made * r[routing][token, chosen + np.maximum(pairs, 0) % chosen][:, None]
    r[out] = np.where(pairs[:, None] >= 0, made, np.float32(0))


def _expert_matmul(task: Task, r: Registers, out: str, x: str, blocks: str, stack: str, form: str) -> None:
    weights: Stack = r[stack]
    rows = rounded(r[x], form) if form in ROUNDED else r[x]
    experts = r[blocks][:, 0].astype(np.int64)
    tile = r[blocks].shape[1] - 1
    made = np.zeros((len(rows), weights.columns), np.float32)
    for i, e in enumerate(experts.tolist()):
        if e >= 0:
            made[i * tile : (i + 1) * tile] = rows[i * tile : (i + 1) * tile] @ weights.read(task, e).T
    r[out] = made


def _expert_bias(task: Task, r: Registers, out: str, x: str, blocks: str, table: str) -> None:
    expert = np.repeat(r[blocks][:, 0].astype(np.int64), r[blocks].shape[1] - 1)
    if expert.max() >= len(r[table]):
        task.fail("a block of no expert")
    r[out] = r[x] + np.where(expert[:, None] >= 0, r[table][np.maximum(expert, 0)], np.float32(0))


def _expert_gate(
    task: Task, r: Registers, out: str, act: str, made: list[str], limit: float, offset: float
) -> None:
    with np.errstate(all="ignore"):
        if len(made) == 1:
            r[out] = np.asarray(ACTIVATIONS[act](r[made[0]]), np.float32)
            return
        gate, up = (r[m] for m in made)
        if limit:
            gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
        r[out] = np.asarray(ACTIVATIONS[act](gate) * (up + np.float32(offset)), np.float32)


def _weighted_sum(
    task: Task, r: Registers, out: str, x: str, routing: str, places: str, weighted: bool, parts: bool = False
) -> None:
    """With `parts` the rows of other chips' experts are at no place (-1) and count nothing."""
    at = r[places].astype(np.int64)
    there = at[at >= 0]
    if there.size != at.size and not parts:
        task.fail("the rows of a token's experts are not there")
    if at.min() < -1 or at.max() >= len(r[x]) or len(np.unique(there)) != there.size:
        task.fail("the rows of a token's experts are not there, or are taken twice")
    share = r[routing][:, at.shape[1] :] if weighted else np.ones(at.shape, np.float32)
    total = np.zeros((len(at), r[x].shape[1]), np.float32)
    for j in range(at.shape[1]):
        total += np.where(at[:, j : j + 1] >= 0, share[:, j : j + 1] * r[x][at[:, j]], np.float32(0))
    r[out] = total


def _share_bias(task: Task, r: Registers, out: str, x: str, routing: str, table: str, weighted: bool) -> None:
    chosen = r[routing].shape[1] // 2
    expert = r[routing][:, :chosen].astype(np.int64)
    share = r[routing][:, chosen:] if weighted else np.ones(expert.shape, np.float32)
    r[out] = r[x] + np.einsum("tj,tjd->td", share, r[table][expert], dtype=np.float32)


MEANINGS: dict[str, Callable[..., None]] = {
    "top_k": _top_k, "align": _align, "places": _places, "gather": _gather, "expert_matmul": _expert_matmul,
    "expert_bias": _expert_bias, "expert_gate": _expert_gate, "weighted_sum": _weighted_sum,
    "share_bias": _share_bias,
}  # fmt: skip
"""Instruction name -> what it does to a task's registers."""
