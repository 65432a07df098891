"""Sizes of the scratch memory that kernels need, importable without the compiler."""

from __future__ import annotations

from mapper_kernels.formats import FORMATS

ROWS_AT_ONCE = 128
"""Most rows of x that are prepared at once for a product."""
FEWEST = 16
"""Fewest rows of x for which a product may take tiles."""
STRETCH = 2048
"""Elements of K that a product in tiles does at a time."""
POSITIONS = 128
"""Positions per step of the running softmax: their scores and values stay in the first-level cache."""
QUERIES = (4, 2, 1)
"""Queries that read the same cached rows at once: as many as are left."""
FACTORS = 4 * POSITIONS * max(QUERIES)
"""Bytes of the scores of as many positions and queries; behind them a factor for each query."""
SCORES = FACTORS + 64
"""Bytes of both."""


def up(n: int) -> int:
    """The next multiple of a cache line."""
    return -(-n // 64) * 64


def prepared_scratch(rows: int, k: int) -> int:
    """Bytes of so many prepared rows of x [K], whatever format and way `prefill` chooses: as `linear` takes
    them, or in tiles, at most three planes of bfloat16 of x and of 32 weight rows."""
    plain = (rows + 3) // 4 * 4 * max(f.prepared_bytes(k) for f in FORMATS.values())
    if rows < FEWEST:
        return plain
    whole = -(-k // 64) * 64
    return max(plain, 6 * whole * -(-rows // 32) * 32 + (6 * 32 + 4) * min(whole, STRETCH) + 128 + 8 * 1024)


def project_scratch(m: int, k: int, widest: int, matrices: int) -> int:
    """Bytes that `fused.project` needs; `widest`: columns of the widest matrix."""
    rows = min(m, ROWS_AT_ONCE)
    return up(4 * k) + up(prepared_scratch(rows, k)) + matrices * up(4 * rows * widest)


def attend_scratch(group: int, d: int, dv: int) -> int:
    """Bytes that `fused.attend_cached` needs; group: query heads per key head."""
    return SCORES + up(4 * group * d) + up(4 * group) + up(4 * group * (dv + 2))


def experts_scratch(pairs: int, experts: int, k: int, wide: int) -> int:
    """Bytes that `experts.experts` needs for `pairs` of a token and an expert; k: elements of a row that
    enters, wide: columns of all its products."""
    rows = min(pairs, ROWS_AT_ONCE)
    prepared = max(f.prepared_bytes(k) for f in FORMATS.values())
    sizes = (8 * (experts + 1 + pairs), 4 * k, (rows + 3) // 4 * 4 * prepared, 4 * rows * wide)
    return sum(map(up, sizes))
