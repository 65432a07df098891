"""Attention over a cache: tiles of queries and splits of the cache, merged exactly.

A task takes the query rows of one (sequence, key/value head, tile of tokens), reads a stretch of the cache
once for all query heads that share it, and keeps the running maximum and sum of the softmax. Where the
cache is split, each task stores its unnormalised result with maximum m and sum s, and a merge adds them:
with M = max m_i,

    out = sum_i exp(m_i - M) o_i / sum_i exp(m_i - M) s_i                                       (exact)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mapper_gpu.hardware import ENGINES, Gpu
from mapper_gpu.product import Timed
from mapper_gpu.timing import NONE, grid_seconds, spread, task_seconds

KEY_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
KEY_STEP = 64
"""Cache rows that a pipeline stage holds: splits are whole multiples."""
QUERY_ROWS = 128
"""Query rows of a prefill tile, heads that share a cache head counted as rows."""
ACCUMULATORS = 1 << 15
"""Elements of the running result that a task keeps: half of an SM's registers, 128 KB."""
OPERATIONS = 5.0
"""Operations per score besides the products: scale, maximum, subtract, sum, rescale."""


def head_parts(heads: int, value_dim: int) -> int:
    """Tasks that share the heads of latent attention, which all read the same rows: as few as have room for
    their running results."""
    fit = (p for p in range(1, heads) if heads % p == 0 and heads // p * value_dim <= ACCUMULATORS)
    return next(fit, heads)


@dataclass(frozen=True)
class Attention:
    """What an attention kernel does on one chip. `tokens` per sequence see `past` earlier rows; the cache
    has room for `length`. `dim` and `value_dim` per head; `element` bytes of a cached number; `shared`
    where keys and values are the same bytes (latent attention), and `kv_heads` are then parts of the heads
    that read the same rows. `window` 0: all."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    tokens: int
    past: int
    length: int
    element: float
    engine: str
    window: int = 0
    shared: bool = False

    @property
    def group(self) -> int:
        """Query heads per cache head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Split:
    """Tokens per task, and stretches of the cache: `keys` rows each."""

    tokens: int
    splits: int
    keys: int


def split_of(a: Attention, splits: int) -> Split:
    """The split of the cache's room into at most `splits` stretches of whole steps."""
    rows = min(QUERY_ROWS, ACCUMULATORS // a.value_dim)
    tokens = a.tokens if a.tokens * a.group <= rows else max(1, rows // a.group)
    keys = math.ceil(math.ceil(a.length / splits) / KEY_STEP) * KEY_STEP
    return Split(tokens, math.ceil(a.length / keys), min(keys, a.length))


def visible(a: Attention, first: int, last: int, low: int, high: int) -> int:
    """(query, key) pairs of tokens first..last-1 and cache rows low..high-1 that the mask lets through."""
    end = a.past + np.arange(first, last, dtype=np.int64) + 1
    begin = np.maximum(0, end - a.window) if a.window else np.zeros_like(end)
    return int(np.maximum(0, np.minimum(end, high) - np.maximum(begin, low)).sum())


def stretch(a: Attention, first: int, last: int, low: int, high: int) -> int:
    """Rows of the cache stretch that tokens first..last-1 see at all."""
    end = min(high, a.past + last)
    begin = max(low, a.past + first + 1 - a.window) if a.window else low
    return max(0, end - begin)


@dataclass(frozen=True)
class Piece:
    """One kind of task of the grid: token tile and cache stretch, with its cost. There are batch x kv_heads
    of each."""

    first: int
    last: int
    low: int
    high: int
    far: float
    near: float
    work: float
    flops: float


def pieces(a: Attention, s: Split) -> list[Piece]:
    """The kinds of tasks, most work first. The first token tile that reads a stretch takes it from HBM,
    later ones find it in L2."""
    found: list[Piece] = []
    row = a.element * (a.dim + (0 if a.shared else a.value_dim))
    for first in range(0, a.tokens, s.tokens):
        last = min(a.tokens, first + s.tokens)
        for low in range(0, a.length, s.keys):
            high = min(a.length, low + s.keys)
            rows = stretch(a, first, last, low, high)
            moved = rows * row
            queries = 16 * math.ceil((last - first) * a.group / 16)
            keys = 16 * math.ceil(rows / 16)
            work = 2.0 * queries * keys * (a.dim + a.value_dim)
            flops = 2.0 * visible(a, first, last, low, high) * a.group * (a.dim + a.value_dim)
            # parts of heads that read the same rows do it at once: one of them takes them from HBM
            far = moved / a.kv_heads if a.shared else moved
            reused = last < a.tokens and bool(rows)
            far = 0.0 if reused else far
            found.append(Piece(first, last, low, high, far, moved - far, work, flops))
    return sorted(found, key=lambda p: -p.work)


def softmax_seconds(gpu: Gpu, a: Attention, work: float) -> float:
    """Seconds of one SM for the exponentials and running sums of a task with `work` product operations."""
    scores = work / (2.0 * (a.dim + a.value_dim))
    return scores * (gpu.sms / gpu.exp + OPERATIONS / gpu.rate("vector"))


def as_work(gpu: Gpu, a: Attention, engine: int, work: float) -> float:
    """Product operations that take as long as the products and the softmax, which do not overlap."""
    from mapper_gpu.timing import rates

    return work + softmax_seconds(gpu, a, work) * float(rates(gpu)[engine])


def measure(gpu: Gpu, a: Attention, s: Split) -> Timed:
    """The time of the kernel, launch gap not included."""
    kinds = pieces(a, s)
    copies = a.batch * a.kv_heads
    tasks = copies * len(kinds)
    engine = ENGINES.index(a.engine if a.engine in gpu.tensor else "vector")
    sharers = min(tasks, gpu.sms)
    far, near, work = (np.array([getattr(p, k) for p in kinds]) for k in ("far", "near", "work"))
    cost = np.array([as_work(gpu, a, engine, float(w)) for w in work])
    each = task_seconds(gpu, far, near, cost, engine, sharers, NONE)
    if len(kinds) == 1:
        body = grid_seconds(gpu, tasks, float(far[0]), float(near[0]), float(cost[0]), engine)
    elif tasks <= 4096:
        body = spread(np.repeat(each, copies).tolist(), gpu.sms)[0]
    else:
        body = float(each.sum()) * copies / gpu.sms + float(each.max()) / 2
    merge, partial = 0.0, 0.0
    if s.splits > 1:
        results = a.batch * a.heads * a.tokens * (a.value_dim + 2) * 4.0
        partial = results * s.splits
        merges = a.batch * a.kv_heads * math.ceil(a.tokens / s.tokens)
        merge = gpu.signal + gpu.l2_latency
        merge += grid_seconds(gpu, merges, 0.0, (results + partial) / merges, 0.0, engine)
    lead = gpu.start + gpu.hbm_latency + gpu.l2_latency
    total = float(far.sum()) * copies
    limit = (
        "HBM" if total / gpu.stream > max(lead, 0.5 * body) else "latency" if lead > body else "arithmetic"
    )
    return Timed(
        lead + body + merge, tasks, total, float(near.sum()) * copies + partial,
        float(cost.sum()) * copies, sum(p.flops for p in kinds) * copies, limit,
        0 if s.splits == 1 else a.batch * a.kv_heads * math.ceil(a.tokens / s.tokens),
    )  # fmt: skip


@lru_cache(maxsize=1 << 14)
def choose(gpu: Gpu, a: Attention) -> tuple[Split, Timed]:
    """The fastest split, and its time. The cache is split only where token tiles leave SMs idle."""
    options = {split_of(a, n) for n in KEY_SPLITS if n * KEY_STEP <= a.length or n == 1}
    if a.batch * a.kv_heads * math.ceil(a.tokens / split_of(a, 1).tokens) >= 4 * gpu.sms:
        options = {split_of(a, 1)}
    found = [(s, measure(gpu, a, s)) for s in sorted(options, key=lambda s: s.splits)]
    return min(found, key=lambda f: f[1].seconds)
