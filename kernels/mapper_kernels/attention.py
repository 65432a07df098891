"""Attention in float32: one query row over a range of cached keys and values, and loops over heads and
rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import fast
from mapper_kernels.memory import load_f, load_i
from mapper_kernels.scalar import exp32, tanh32
from mapper_kernels.split import share

_SMALLEST = np.float32(-87.0)
_NEVER = np.float32(-np.inf)


@fast
def scores(q: Any, k: Any, s: Any, low: int, high: int, scale: float, softcap: float) -> None:
    """s[t] = scale * (q . k[t]) for low <= t < high, capped as c tanh(s/c) where softcap c > 0.

    q [D], k [T, D], s [>= T]; float32.
    """
    factor = np.float32(scale)
    d = q.shape[0]
    t = low
    while t + 4 <= high:
        a0 = np.float32(0)
        a1 = np.float32(0)
        a2 = np.float32(0)
        a3 = np.float32(0)
        for i in range(d):
            v = q[i]
            a0 += v * k[t, i]
            a1 += v * k[t + 1, i]
            a2 += v * k[t + 2, i]
            a3 += v * k[t + 3, i]
        s[t] = a0 * factor
        s[t + 1] = a1 * factor
        s[t + 2] = a2 * factor
        s[t + 3] = a3 * factor
        t += 4
    while t < high:
        a0 = np.float32(0)
        for i in range(d):
            a0 += q[i] * k[t, i]
        s[t] = a0 * factor
        t += 1
    if softcap > 0.0:
        cap = np.float32(softcap)
        for t in range(low, high):
            s[t] = cap * tanh32(s[t] / cap)


@fast
def weigh(s: Any, v: Any, y: Any, low: int, high: int, has_sink: bool, sink: Any) -> None:
    """y = softmax(s[low:high]) @ v[low:high]; a sink is one more score in the denominator. s is overwritten.

    s [>= T], v [T, D], y [D]; float32. Without a single finite score the result is NaN, as it is in NumPy.
    """
    top = sink if has_sink else _NEVER
    for t in range(low, high):
        top = max(top, s[t])
    total = 0.0
    for t in range(low, high):
        difference = s[t] - top
        e = exp32(difference)
        s[t] = np.float32(0) if difference < _SMALLEST else e
    for t in range(low, high):
        total += s[t]
    if has_sink:
        total += np.exp(np.float64(sink - top))
    d = y.shape[0]
    for i in range(d):
        y[i] = np.float32(0)
    t = low
    while t + 4 <= high:
        a, b, c, e = s[t], s[t + 1], s[t + 2], s[t + 3]
        for i in range(d):
            y[i] += (a * v[t, i] + b * v[t + 1, i]) + (c * v[t + 2, i] + e * v[t + 3, i])
        t += 4
    while t < high:
        a = s[t]
        for i in range(d):
            y[i] += a * v[t, i]
        t += 1
    factor = np.float32(np.nan) if top == _NEVER else np.float32(1.0 / total)
    for i in range(d):
        y[i] *= factor


@fast
def cached_attention(
    q: Any, k: Any, v: Any, sinks: Any, slopes: Any, y: Any,
    past: int, scale: float, window: int, chunk: int, softcap: float, part: int, parts: int,
) -> None:  # fmt: skip
    """Query s of S sees cache rows t <= past + s, of those the last `window` where that is not 0, and
    those of its own run of `chunk` rows where that is not 0.

    q [B, H, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], y [B, H, S, Dv]; query head h reads key/value head
    h // (H / Hkv); sinks and slopes (ALiBi: slope (t - position) is added) [H] or of length 0; past + S <= L;
    float32. Shares (batch, head, query) triples.
    """
    batch, heads, seq = q.shape[0], q.shape[1], q.shape[2]
    group = heads // k.shape[1]
    s = np.empty(k.shape[2], np.float32)
    first, last = share(batch * heads * seq, 1, part, parts)
    for item in range(first, last):
        row = item % seq
        h = item // seq % heads
        b = item // (seq * heads)
        high = past + row + 1
        low = max(0, high - window) if window > 0 else 0
        if chunk > 0:
            low = max(low, high - 1 - (high - 1) % chunk)
        scores(q[b, h, row], k[b, h // group], s, low, high, scale, softcap)
        if slopes.shape[0] > 0:
            for t in range(low, high):
                s[t] += np.float32(slopes[h]) * np.float32(t - high + 1)
        has_sink = sinks.shape[0] > 0
        sink = sinks[h] if has_sink else np.float32(0)
        weigh(s, v[b, h // group], y[b, h, row], low, high, has_sink, sink)


@fast
def masked_attention(
    q: Any, k: Any, v: Any, mask: int, mask_code: int, mask_strides: Any, sinks: Any, slopes: Any, y: Any,
    scale: float, causal: bool, window: int, softcap: float, part: int, parts: int,
) -> None:  # fmt: skip
    """Attention over all T keys, with an explicit mask or the causal one.

    Shapes as in `cached_attention` with L = T. `mask` is the address of elements of type `mask_code` (bool:
    false is excluded; else added) with element strides for [B, H, S, T]; 0 where there is none, and then
    `causal` and `window` mask by position (query s stands at T - S + s). Shares (batch, head, query) triples.
    """
    batch, heads, seq = q.shape[0], q.shape[1], q.shape[2]
    keys = k.shape[2]
    group = heads // k.shape[1]
    s = np.empty(keys, np.float32)
    first, last = share(batch * heads * seq, 1, part, parts)
    for item in range(first, last):
        row = item % seq
        h = item // seq % heads
        b = item // (seq * heads)
        position = keys - seq + row
        plain = mask == 0
        high = position + 1 if plain and causal else keys
        low = max(0, position + 1 - window) if plain and window > 0 else 0
        scores(q[b, h, row], k[b, h // group], s, low, high, scale, softcap)
        if plain and slopes.shape[0] > 0:
            for t in range(low, high):
                s[t] += np.float32(slopes[h]) * np.float32(t - position)
        if not plain:
            base = b * mask_strides[0] + h * mask_strides[1] + row * mask_strides[2]
            add_mask(s, mask, mask_code, base, mask_strides[3])
        has_sink = sinks.shape[0] > 0
        sink = sinks[h] if has_sink else np.float32(0)
        weigh(s, v[b, h // group], y[b, h, row], low, high, has_sink, sink)


@fast
def add_mask(s: Any, mask: int, code: int, base: int, stride: int) -> None:
    """Apply mask elements base, base + stride, ... to the scores s [T]: excluded where bool false, else
    added."""
    boolean = code == 14
    for t in range(s.shape[0]):
        at = base + t * stride
        if boolean:
            if load_i(mask, code, at) == 0:
                s[t] = _NEVER
        else:
            s[t] = np.float32(s[t] + load_f(mask, code, at))
