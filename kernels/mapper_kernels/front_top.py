"""The largest logits for callers with NumPy arrays: see `api`."""

from __future__ import annotations

import numpy as np

from mapper_kernels.jit import entry
from mapper_kernels.linear import prepare_rows
from mapper_kernels.memory import i64
from mapper_kernels.sizes import up
from mapper_kernels.top import merge_top, product_top, top_of
from mapper_kernels.weight import F32, I64, Weight, checked, positive, scratch_memory


@entry()
def _top_rows(x: int, rows: int, n: int, k: int, values: int, indices: int) -> None:
    for row in range(rows):
        top_of(x + 4 * row * n, 0, n, k, 0, values + 4 * row * k, indices + 8 * row * k)


@entry()
def _head_top(
    code: int, w: int, s: int, z: int, x: int, rows: int, k: int, n: int, scratch: int, best: int,
    values: int, indices: int, parts: int,
) -> None:  # fmt: skip
    y = scratch + (parts * best * 12 + parts * 8 + 63) // 64 * 64
    prepared = y + (4 * n + 63) // 64 * 64
    held = i64(scratch, parts)
    where, theirs = scratch + 8 * parts, scratch + 8 * parts * (1 + best)
    for row in range(rows):
        prepare_rows(code, x + 4 * row * k, 4 * k, 1, k, prepared)
        for part in range(parts):
            held[part] = product_top(
                code, w, s, z, prepared, k, n, y, best, theirs + 4 * part * best, where + 8 * part * best,
                part, parts,
            )  # fmt: skip
        merge_top(theirs, where, held, best, values + 4 * row * best, indices + 8 * row * best)


def top_k(logits: F32, k: int) -> tuple[F32, I64]:
    """The k largest of every row of logits [M, N], and their indices: [M, k] both; for the order see
    `top`."""
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"the {k} largest of logits {list(logits.shape)}")
    checked("logits", logits, ("float32",), logits.shape)
    values, indices = np.empty((len(logits), k), np.float32), np.empty((len(logits), k), np.int64)
    rows, n = logits.shape
    _top_rows(logits.ctypes.data, rows, n, k, values.ctypes.data, indices.ctypes.data)
    return values, indices


def argmax(logits: F32) -> I64:
    """Where the largest of every row of logits [M, N] is: [M]; the first NaN where there is one."""
    return top_k(logits, 1)[1][:, 0]


def lm_head_top(x: F32, weight: Weight, k: int, parts: int = 1) -> tuple[F32, I64]:
    """`top_k` of x W^T, x [M, K] and W [N, K]: [M, k] both. `parts` shares of W's rows are searched apart and
    merged, which changes nothing."""
    n, columns = weight.shape
    if x.ndim != 2 or not 1 <= k <= n:
        raise ValueError(f"the {k} largest of {n} logits from x {list(x.shape)}")
    checked("x", x, ("float32",), (len(x), columns))
    values, indices = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
    own = up(positive(parts) * (12 * k + 8)) + up(4 * n) + up(weight.layout.prepared_bytes(columns))
    memory, scratch = scratch_memory(own)
    zeros = 0 if weight.zeros is None else weight.zeros.ctypes.data
    scales = 0 if weight.scales is None else weight.scales.ctypes.data
    _head_top(
        weight.layout.code, weight.values.ctypes.data, scales, zeros, x.ctypes.data, len(x), columns, n,
        scratch, k, values.ctypes.data, indices.ctypes.data, parts,
    )  # fmt: skip
    del memory
    return values, indices
