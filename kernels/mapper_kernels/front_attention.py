"""Attention for callers with NumPy arrays: see `api`."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.cached import KV_FORMATS, KV_SIZES
from mapper_kernels.flash import attend, merge
from mapper_kernels.jit import entry
from mapper_kernels.memory import f32
from mapper_kernels.sizes import SCORES, up
from mapper_kernels.split import share
from mapper_kernels.weight import F32, Array, checked, positive, scratch_memory

_KV = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint16": "bf16", "int8": "int8"}
_ZERO: Any = np.int64(0)


@entry()
def attend_parts(
    r: Any, a: Any, scale: Any, softcap: Any, scratch: int, first: int, last: int, parts: int
) -> None:
    """`attention` for the parts first..last - 1: shares (batch, key head, query position) triples.

    r: addresses of q, k, v, the scales of k and v, slopes, sinks (0: none), y; a: see `attention`.
    """
    batch, heads, seq, d, kv, length, dv, used, window, causal, splits, code, size = a
    group = heads // kv
    rows = batch * kv * seq
    low, high = share(rows, 1, first, parts)[0], share(rows, 1, last - 1, parts)[1]
    step, partial = 4 * (dv + 2), scratch + SCORES
    for row in range(low, high):
        s, head = row % seq, row // seq  # head: batch and key head in one
        cache, h = head * length, head % kv * group
        last_seen = used - seq + s
        end = last_seen + 1 if causal else used
        begin = max(end - window, 0) if window > 0 else 0
        for split in range(splits):
            attend(
                code, r[0] + 4 * (head * group * seq + s) * d, 4 * seq * d, group,
                r[1] + size * cache * d, size * d, r[3] + 4 * cache,
                r[2] + size * cache * dv, size * dv, r[4] + 4 * cache,
                begin + (end - begin) * split // splits, begin + (end - begin) * (split + 1) // splits, d, dv,
                scale, softcap, r[5] + 4 * h if r[5] else _ZERO, last_seen, scratch, partial + split * step,
                splits * step,
            )  # fmt: skip
        for g in range(group):
            sink = f32(r[6] + 4 * (h + g), 1)[0] if r[6] else np.float32(0)
            y = r[7] + 4 * ((head * group + g) * seq + s) * dv
            merge(partial + g * splits * step, step, splits, dv, r[6] != 0, sink, y)


def attention(
    q: F32,
    k: Array,
    v: Array,
    length: int | None = None,
    scale: float | None = None,
    k_scales: F32 | None = None,
    v_scales: F32 | None = None,
    window: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    slopes: F32 | None = None,
    sinks: F32 | None = None,
    splits: int = 1,
    parts: int = 1,
) -> F32:
    """y [B, H, S, Dv] of queries q [B, H, S, D] at positions length - S .. length - 1 (one new token: S = 1).

    k [B, Hkv, L, D], v [B, Hkv, L, Dv]: caches of which the first `length` rows (None: all) are used,
    float32, float16, bfloat16 (or its bits, uint16), or int8 with scales float32 [B, Hkv, L]. Query head h
    reads key head h // (H / Hkv). Score: scale q.k (None: D^-1/2), capped as c tanh(score / c) where c =
    softcap > 0, plus slopes[h] (position - the query's). Seen are positions up to the query's own where
    `causal`, else all, and of those the last `window` where that is not 0. sinks [H]: one more score in the
    denominator. The range is done in `splits` pieces that are merged by their log-sum-exp: exact but for
    rounding.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.dtype.name not in _KV or k.shape[1] < 1:
        raise ValueError(
            f"q {list(q.shape)}, k {k.dtype} {list(k.shape)}, v {list(v.shape)} are no attention"
        )
    (batch, heads, seq, d), (kv, rows, dv) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    used = rows if length is None else length
    if heads % kv or not 1 <= seq <= used <= rows or d < 1 or window < 0 or splits < 1:
        raise ValueError(
            f"{heads} heads on {kv}, {seq} queries, {used} of {rows} rows of {d}, window {window}, "
            f"{splits} splits"
        )
    kind = _KV[k.dtype.name]
    checked("q", q, ("float32",), q.shape)
    checked("k", k, (k.dtype.name,), (batch, kv, rows, d))
    checked("v", v, (k.dtype.name,), (batch, kv, rows, dv))
    addresses = [q.ctypes.data, k.ctypes.data, v.ctypes.data]
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (scales is None) == (kind == "int8"):
            raise ValueError(f"{name} go with int8 caches, and only with them")
        if scales is not None:
            checked(name, scales, ("float32",), (batch, kv, rows))
        addresses.append(0 if scales is None else scales.ctypes.data)
    for name, per_head in (("slopes", slopes), ("sinks", sinks)):
        if per_head is not None:
            checked(name, per_head, ("float32",), (heads,))
        addresses.append(0 if per_head is None else per_head.ctypes.data)
    y = np.empty((batch, heads, seq, dv), np.float32)
    code = KV_FORMATS.index(kind)
    a = (batch, heads, seq, d, kv, rows, dv, used, window, int(causal), splits, code, KV_SIZES[code])
    memory, scratch = scratch_memory(SCORES + up(4 * (heads // kv) * splits * (dv + 2)))
    attend_parts(
        np.array([*addresses, y.ctypes.data], np.int64), a, np.float32(d**-0.5 if scale is None else scale),
        np.float32(softcap), scratch, 0, positive(parts), parts,
    )  # fmt: skip
    del memory
    return y
