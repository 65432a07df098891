"""The NumPy front: arrays in, arrays out. Results are new float32 arrays; sums are in float32 (see `formats`).

    linear gated     products with weights in their stored format, with what comes before and after them
    attention        rows of queries against cached keys and values
    argmax top_k lm_head_top     the largest logits

All raise ValueError where shapes or types do not fit. The first call of each compiles; later processes find the
code in a cache on disk. Every call runs on the calling thread, without Python's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_kernels import fused
from mapper_kernels.flash import KV_FORMATS, KV_SIZES, attend, merge
from mapper_kernels.jit import entry
from mapper_kernels.linear import prepare_rows
from mapper_kernels.memory import f32, i64
from mapper_kernels.names import ACTIVATIONS
from mapper_kernels.sizes import SCORES, project_scratch, up
from mapper_kernels.split import share
from mapper_kernels.top import merge_top, product_top, top_of
from mapper_kernels.weight import Norm, Weight, checked

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
_KV = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint16": "bf16", "int8": "int8"}
_NONE: F32 = np.zeros(0, np.float32)


@entry()
def project_parts(r: Any, a: Any, f: Any, scratch: int, first: int, last: int, parts: int) -> None:
    """`fused.project`, parts first..last - 1 of `parts`."""
    for part in range(first, last):
        fused.project(r, a, f, scratch, part, parts)


def scratch_memory(size: int) -> tuple[Array, int]:
    """Memory and the address of its first cache line."""
    memory = np.empty(size + 64, np.uint8)
    return memory, -(-memory.ctypes.data // 64) * 64


def project_arguments(
    x: F32, weights: Sequence[tuple[Weight, F32 | None]], norm: Norm | None, kind: int, activation: str
) -> tuple[list[int], I64, npt.NDArray[np.float64]]:
    """Arguments of `fused.project`: addresses up to the matrices', and what it takes as `a` and `f`."""
    if x.ndim != 2:
        raise ValueError(f"x has {x.ndim} axes; wanted: [M, K]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    m, k = x.shape
    n = weights[0][0].shape[0]
    given = norm or Norm()
    kind_of_norm = fused.NO_NORM if norm is None else fused.LAYER_NORM if norm.centred else fused.RMS_NORM
    checked("x", x, ("float32",), (m, k))
    head = [m, k, kind_of_norm, given.weight is not None, given.bias is not None, 0, 0, kind]
    a, r = [*head, ACTIVATIONS[activation], len(weights)], [x.ctypes.data]
    for name, vector in (("norm weight", given.weight), ("norm bias", given.bias)):
        if vector is not None:
            checked(name, vector, ("float32",), (k,))
            r.append(vector.ctypes.data)
    for weight, bias in weights:
        if weight.shape != (n, k):
            raise ValueError(f"a weight {list(weight.shape)} for x {list(x.shape)}; wanted: {[n, k]}")
        if bias is not None:
            checked("bias", bias, ("float32",), (n,))
        a += [n, weight.layout.code, weight.zeros is not None, bias is not None]
        r += weight.addresses() + ([] if bias is None else [bias.ctypes.data])
    f = np.zeros(len(a))
    f[5], f[6] = given.epsilon, given.offset
    return r, np.array(a, np.int64), f


def _project(
    x: F32, weights: Sequence[tuple[Weight, F32 | None]], norm: Norm | None, residual: F32 | None, kind: int,
    activation: str, parts: int,
) -> F32:  # fmt: skip
    r, a, f = project_arguments(x, weights, norm, kind, activation)
    m, n = x.shape[0], weights[0][0].shape[0]
    if residual is not None:
        checked("residual", residual, ("float32",), (m, n))
        r.append(residual.ctypes.data)
    y = np.empty((m, n), np.float32)
    memory, scratch = scratch_memory(project_scratch(m, x.shape[1], n, len(weights)))
    project_parts(np.array([*r, y.ctypes.data], np.int64), a, f, scratch, 0, _parts(parts), parts)
    del memory
    return y


def _parts(parts: int) -> int:
    if parts < 1:
        raise ValueError(f"{parts} parts")
    return parts


def linear(
    x: F32,
    weight: Weight,
    bias: F32 | None = None,
    norm: Norm | None = None,
    residual: F32 | None = None,
    activation: str | None = None,
    parts: int = 1,
) -> F32:
    """y [M, N] = activation(norm(x) W^T + bias) or norm(x) W^T + bias + residual; x [M, K], residual [M, N].

    `parts`: cut N into as many shares, one after the other. The result does not depend on it but for rounding.
    """
    if residual is not None and activation is not None:
        raise ValueError("either a residual or an activation follows a product")
    kind = fused.RESIDUAL if residual is not None else fused.ACTIVATION if activation else fused.PLAIN
    return _project(x, [(weight, bias)], norm, residual, kind, activation or "identity", parts)


def gated(
    x: F32,
    gate: Weight,
    up_weight: Weight,
    activation: str = "silu",
    gate_bias: F32 | None = None,
    up_bias: F32 | None = None,
    norm: Norm | None = None,
    parts: int = 1,
) -> F32:
    """y [M, N] = activation(norm(x) G^T + gate_bias) (norm(x) U^T + up_bias); x [M, K], G and U [N, K]."""
    both = [(gate, gate_bias), (up_weight, up_bias)]
    return _project(x, both, norm, None, fused.GATE, activation, parts)


@entry()
def _attend_parts(
    r: Any, a: Any, scale: Any, softcap: Any, slopes: Any, sinks: Any, scratch: int, first: int, last: int,
    parts: int,
) -> None:  # fmt: skip
    batch, heads, seq, d, kv, length, dv, used, window, causal, splits, code, size = a
    low, high = share(batch * heads * seq, 1, first, parts)[0], share(batch * heads * seq, 1, last - 1, parts)[1]
    step = 4 * (dv + 2)
    for row in range(low, high):
        s, h, b = row % seq, row // seq % heads, row // (seq * heads)
        cache = (b * kv + h // (heads // kv)) * length
        last_seen = used - seq + s
        end = last_seen + 1 if causal else used
        begin = max(end - window, 0) if window > 0 else 0
        slope = slopes[h] if slopes.shape[0] > 0 else np.float32(0)
        for split in range(splits):
            to = scratch + SCORES + split * step
            top, total = attend(
                code, r[0] + 4 * row * d, r[1] + size * cache * d, size * d, r[3] + 4 * cache,
                r[2] + size * cache * dv, size * dv, r[4] + 4 * cache,
                begin + (end - begin) * split // splits, begin + (end - begin) * (split + 1) // splits,
                d, dv, scale, softcap, slope, last_seen, scratch, to + 8,
            )  # fmt: skip
            state = f32(to, 2)
            state[0], state[1] = top, total
        sink = sinks[h] if sinks.shape[0] > 0 else np.float32(0)
        merge(scratch + SCORES, step, splits, dv, sinks.shape[0] > 0, sink, r[5] + 4 * row * dv)


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

    k [B, Hkv, L, D], v [B, Hkv, L, Dv]: caches of which the first `length` rows (None: all) are used, float32,
    float16, bfloat16 (or its bits, uint16), or int8 with scales float32 [B, Hkv, L]. Query head h reads key head
    h // (H / Hkv). Score: scale q.k (None: D^-1/2), capped as c tanh(score / c) where c = softcap > 0, plus
    slopes[h] (position - the query's). Seen are positions up to the query's own where `causal`, else all, and of
    those the last `window` where that is not 0. sinks [H]: one more score in the denominator. The range is done
    in `splits` pieces that are merged by their log-sum-exp: exact but for rounding.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.dtype.name not in _KV or k.shape[1] < 1:
        raise ValueError(f"q {list(q.shape)}, k {k.dtype} {list(k.shape)}, v {list(v.shape)} are no attention")
    (batch, heads, seq, d), (kv, rows, dv) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    used = rows if length is None else length
    if heads % kv or not 1 <= seq <= used <= rows or d < 1 or window < 0 or splits < 1:
        raise ValueError(
            f"{heads} heads on {kv}, {seq} queries, {used} of {rows} rows of {d}, window {window}, {splits} splits"
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
    y = np.empty((batch, heads, seq, dv), np.float32)
    code = KV_FORMATS.index(kind)
    a = (batch, heads, seq, d, kv, rows, dv, used, window, int(causal), splits, code, KV_SIZES[code])
    memory, scratch = scratch_memory(SCORES + up(4 * splits * (dv + 2)))
    _attend_parts(
        np.array([*addresses, y.ctypes.data], np.int64), a, np.float32(d**-0.5 if scale is None else scale),
        np.float32(softcap), _NONE if slopes is None else slopes, _NONE if sinks is None else sinks, scratch,
        0, _parts(parts), parts,
    )  # fmt: skip
    del memory
    return y


@entry()
def _top_rows(x: int, rows: int, n: int, k: int, values: int, indices: int) -> None:
    for row in range(rows):
        top_of(x + 4 * row * n, 0, n, k, 0, values + 4 * row * k, indices + 8 * row * k)


@entry()
def _head_top(
    code: int, w: int, s: int, z: int, x: int, rows: int, k: int, n: int, scratch: int, best: int, values: int,
    indices: int, parts: int,
) -> None:  # fmt: skip
    y = scratch + (parts * best * 12 + parts * 8 + 63) // 64 * 64
    prepared = y + (4 * n + 63) // 64 * 64
    held = i64(scratch, parts)
    where, theirs = scratch + 8 * parts, scratch + 8 * parts * (1 + best)
    for row in range(rows):
        prepare_rows(code, x + 4 * row * k, 4 * k, 1, k, prepared)
        for part in range(parts):
            held[part] = product_top(
                code, w, s, z, prepared, k, n, y, best, theirs + 4 * part * best, where + 8 * part * best, part,
                parts,
            )  # fmt: skip
        merge_top(theirs, where, held, best, values + 4 * row * best, indices + 8 * row * best)


def top_k(logits: F32, k: int) -> tuple[F32, I64]:
    """The k largest of every row of logits [M, N], and their indices: [M, k] both; for the order see `top`."""
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"the {k} largest of logits {list(logits.shape)}")
    checked("logits", logits, ("float32",), logits.shape)
    values, indices = np.empty((len(logits), k), np.float32), np.empty((len(logits), k), np.int64)
    _top_rows(logits.ctypes.data, *logits.shape, k, values.ctypes.data, indices.ctypes.data)
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
    own = up(_parts(parts) * (12 * k + 8)) + up(4 * n) + up(weight.layout.prepared_bytes(columns))
    memory, scratch = scratch_memory(own)
    zeros = 0 if weight.zeros is None else weight.zeros.ctypes.data
    scales = 0 if weight.scales is None else weight.scales.ctypes.data
    _head_top(
        weight.layout.code, weight.values.ctypes.data, scales, zeros, x.ctypes.data, len(x), columns, n,
        scratch, k, values.ctypes.data, indices.ctypes.data, parts,
    )  # fmt: skip
    del memory
    return values, indices
