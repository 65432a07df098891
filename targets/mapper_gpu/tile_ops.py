"""The meaning of the instructions of task programs, on float32 registers [rows, columns]. Source of each
formula: the IR op of the same name (mapper/ir/README.md); products accumulate in float32 on operands
rounded to the weight's format, as tensor cores do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mapper.schedule.dtypes import dtype
from mapper_gpu import lowbit_ops

if TYPE_CHECKING:
    from mapper_gpu.execute import Task

Array = npt.NDArray[Any]
Registers = dict[str, Any]
ROUNDED = {"bf16": "bfloat16", "f16": "float16"}
_GELU = math.sqrt(2 / math.pi)


def tokens_of(task: Task) -> int:
    """Tokens per sequence, from the instruction that names them."""
    for i in task.code.code:
        if i[0] == "append":
            return int(i[4])
        if i[0] in ("attend", "attend_latent"):
            return int(i[10])
    task.fail("a cache operand without an instruction that reads or writes it")


def _embed(task: Task, r: Registers, out: str, ids: str, table: str) -> None:
    rows = r[ids][:, 0]
    if rows.min() < 0 or rows.max() >= r[table].shape[0]:
        task.fail("a token is outside of the vocabulary")
    r[out] = r[table][rows]


def _positions(task: Task, r: Registers, out: str, table: str, past: str, tokens: int, offset: int) -> None:
    places = int(r[past][0, 0]) + offset + (np.arange(task.at[0], task.at[1]) % tokens)
    if places.min() < 0 or places.max() >= r[table].shape[0]:
        task.fail("a position is outside of the table of positions")
    r[out] = r[table][places]


def _norm(
    task: Task, r: Registers, out: str, x: str, weight: str | None, bias: str | None, kind: str, eps: float,
    offset: float, head: int,
) -> None:  # fmt: skip
    v = r[x]
    shape = v.shape
    if head:
        v = v.reshape(shape[0], -1, head)
    if kind == "layer":
        v = v - v.mean(-1, keepdims=True, dtype=np.float32)
    scale = np.float32(1) / np.sqrt(np.mean(v * v, -1, keepdims=True, dtype=np.float32) + np.float32(eps))
    y = v * scale
    if weight is not None:
        y = y * (r[weight][0] + np.float32(offset))
    if bias is not None:
        y = y + r[bias][0]
    r[out] = np.asarray(y, np.float32).reshape(shape)


def _rope(
    task: Task, r: Registers, out: str, x: str, table: str, past: str, style: str, rotary: int, head: int,
    tokens: int, length: int,
) -> None:  # fmt: skip
    first = int(r[past][0, 0])
    if not 0 <= first <= length - tokens:
        task.fail("the position is outside of the context that the program was made for")
    places = first + np.arange(task.at[0], task.at[1]) % tokens
    cos, sin = r[table].reshape(2, length, rotary // 2)[:, places][:, :, None, :]
    v = r[x].reshape(r[x].shape[0], -1, head)
    y = v.copy()
    half = rotary // 2
    a, b = (
        (slice(0, half), slice(half, rotary))
        if style == "half"
        else (slice(0, rotary, 2), slice(1, rotary, 2))
    )
    y[..., a] = v[..., a] * cos - v[..., b] * sin
    y[..., b] = v[..., b] * cos + v[..., a] * sin
    r[out] = y.reshape(r[x].shape)


def _columns(task: Task, r: Registers, out: str, x: str) -> None:
    r[out] = r[x][:, task.at[4] : task.at[5]]


def rounded(x: Array, form: str) -> Array:
    """An operand of a product as tensor cores take it."""
    return np.asarray(x.astype(dtype(ROUNDED[form])).astype(np.float32))


def _matmul(task: Task, r: Registers, out: str, x: str, weight: str, form: str) -> None:
    v = r[x]
    if form in ROUNDED:
        v = rounded(v, form)
    r[out] = v @ r[weight].T


def _sum(task: Task, r: Registers, out: str, parts: list[str]) -> None:
    total = r[parts[0]].copy()
    for p in parts[1:]:
        total += r[p]
    r[out] = total


def _rows(task: Task, r: Registers, out: str, parts: list[str]) -> None:
    r[out] = np.concatenate([r[p] for p in parts])


def _concat(task: Task, r: Registers, out: str, parts: list[str]) -> None:
    r[out] = np.concatenate([r[p] for p in parts], axis=1)


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float32])(x), np.float32)


ACTIVATIONS: dict[str, Callable[[Array], Any]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + _erf(x / np.float32(math.sqrt(2)))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.float32(_GELU) * (x + np.float32(0.044715) * x**3))),
    "gelu_quick": lambda x: x / (1 + np.exp(np.float32(-1.702) * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "identity": lambda x: x,
}
_UNARY: dict[str, Callable[[Array], Any]] = {
    "tanh": np.tanh, "sigmoid": ACTIVATIONS["sigmoid"], "relu": ACTIVATIONS["relu"], "exp": np.exp,
    "neg": np.negative, "softplus": lambda x: np.logaddexp(np.float32(0), x), "sqrt": np.sqrt, "abs": np.abs,
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
}  # fmt: skip


def _point(task: Task, r: Registers, out: str, fn: str, inputs: list[str], scalar: list[Any] | None) -> None:
    with np.errstate(all="ignore"):
        values: list[Any] = [r[v] for v in inputs]
        if scalar is not None:
            values.insert(int(scalar[0]), np.float32(scalar[1]))
        if fn.startswith("act:"):
            made = ACTIVATIONS[fn[4:]](values[0])
        elif len(values) == 1:
            made = _UNARY[fn](values[0])
        else:
            made = _BINARY[fn](*values)
        r[out] = np.asarray(made, np.float32)


def _gate(task: Task, r: Registers, out: str, act: str, gate: str, up: str) -> None:
    with np.errstate(all="ignore"):
        r[out] = np.asarray(ACTIVATIONS[act](r[gate]) * r[up], np.float32)


def _attend(
    task: Task, r: Registers, out: str, stats: str, q: str, k: str, v: str, past: str, dim: int, value: int,
    group: int, tokens: int, window: int, scale: float, softcap: float, slopes: str | None = None,
) -> None:  # fmt: skip
    """out [rows, group * value]: unnormalised; stats [rows, 2 * group]: maxima, then sums, of this
    stretch."""
    asked = as_cached(task, r[q].reshape(-1, group, dim))
    slope = None if slopes is None else r[slopes][0]
    made = _stretch(task, asked, r[k], r[v], int(r[past][0, 0]), tokens, window, scale, softcap, slope)
    r[out], r[stats] = made[0].reshape(asked.shape[0], group * value), made[1]


def _attend_latent(
    task: Task, r: Registers, out: str, stats: str, q: str, latent: str, key: str, past: str, dim: int,
    value: int, group: int, tokens: int, window: int, scale: float, softcap: float, rotated: str,
) -> None:  # fmt: skip
    """As `attend`, of queries in two parts on rows in two parts, the first of which are the values."""
    asked = np.concatenate([
        as_cached(task, r[q].reshape(-1, group, value)),
        as_cached(task, r[rotated].reshape(-1, group, dim - value)),
    ], axis=-1)  # fmt: skip
    keys = np.concatenate([r[latent], r[key]], axis=-1)
    made = _stretch(task, asked, keys, r[latent], int(r[past][0, 0]), tokens, window, scale, softcap, None)
    r[out], r[stats] = made[0].reshape(asked.shape[0], group * value), made[1]


def as_cached(task: Task, x: Array) -> Array:
    """Queries rounded to the cache's format, as tensor cores take them."""
    kind = next((o.dtype for o in task.code.reads if o.r == "cache"), np.dtype(np.float32))
    return np.asarray(x.astype(kind).astype(np.float32))


def _stretch(
    task: Task, asked: Array, keys: Array, values: Array, past: int, tokens: int, window: int, scale: float,
    softcap: float, slope: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    """([rows, heads, value] unnormalised, [rows, 2 heads] maxima and sums) of queries [rows, heads, dim]."""
    place = past + np.arange(task.at[0], task.at[1]) % tokens
    at = np.arange(task.at[4], task.at[5])
    seen = at[None, :] <= place[:, None]
    if window:
        seen &= at[None, :] > place[:, None] - window
    known = seen.any(0)
    scores = np.full((*asked.shape[:2], len(at)), -np.inf, np.float32)
    scores[..., known] = (asked @ keys[known].T) * np.float32(scale)
    if softcap:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    if slope is not None:
        scores = scores + slope[None, :, None] * (at[None, :] - place[:, None])[:, None, :]
    scores = np.where(seen[:, None, :], scores, np.float32(-np.inf))
    top = scores.max(-1)
    shares = np.exp(scores - np.where(np.isfinite(top), top, 0)[..., None])
    made = np.asarray(shares[..., known] @ values[known], np.float32)
    return made, np.concatenate([top, shares.sum(-1)], axis=1).astype(np.float32)


def _merge(task: Task, r: Registers, out: str, total: str, parts: list[str], stats: list[str]) -> None:
    group = r[stats[0]].shape[1] // 2
    top = np.max([r[s][:, :group] for s in stats], axis=0)
    safe = np.where(np.isfinite(top), top, 0)
    rows = r[parts[0]].shape[0]
    whole = np.zeros((rows, group, r[parts[0]].shape[1] // group), np.float32)
    sums = np.zeros((rows, group), np.float32)
    for p, s in zip(parts, stats, strict=True):
        factor = np.exp(r[s][:, :group] - safe)
        whole += factor[..., None] * r[p].reshape(whole.shape)
        sums += factor * r[s][:, group:]
    r[out] = whole.reshape(rows, -1)
    r[total] = np.concatenate([top, sums], axis=1)


def _finish(task: Task, r: Registers, out: str, x: str, stats: str, sinks: str | None) -> None:
    """The normalised result; a sink adds exp(sink - maximum) to the sum."""
    group = r[stats].shape[1] // 2
    top, sums = r[stats][:, :group], r[stats][:, group:]
    whole = r[x].reshape(r[x].shape[0], group, -1)
    if sinks is not None:
        high = np.maximum(top, r[sinks])
        factor = np.exp(top - high)
        whole, sums = whole * factor[..., None], sums * factor + np.exp(r[sinks] - high)
    r[out] = np.asarray(whole / sums[..., None], np.float32).reshape(r[x].shape)


MEANINGS: dict[str, Callable[..., None]] = {
    "embed": _embed, "positions": _positions, "norm": _norm, "rope": _rope, "columns": _columns,
    "matmul": _matmul, "sum": _sum, "concat": _concat,
    "rows": _rows, "point": _point, "gate": _gate, "attend": _attend,
    "attend_latent": _attend_latent,
    "merge": _merge, "finish": _finish, "dequantise": lowbit_ops.dequantise,
    "round_blocks": lowbit_ops.round_blocks,
}  # fmt: skip
"""Instruction name -> what it does to a task's registers."""
