"""Tiles of products: enumeration, pruning, and the choice by modelled time.

A product kernel computes one or more products of the same rows. A lane is a run of output columns that one
epilogue makes: `mats` weights of n rows each (gate and up are one lane of two). Weight rows take the long
side of the tensor core's product, tokens the short one (operands swapped), so that one token pads to
`mma.n` only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mapper.errors import LoweringError
from mapper_gpu.hardware import ENGINES, Gpu
from mapper_gpu.timing import grid_seconds

TILE_ROWS = (8, 16, 32, 64, 128, 256)
TILE_COLUMNS = (8, 16, 32, 64, 128, 256)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
STAGES = 2
"""Least stages of the pipeline through shared memory."""
NEAR = 1.005
"""What tiles cost besides (block launches, indices) is not modelled, so a half percent does not buy more of
them."""
STEP_BYTES = 128
"""Bytes of K that one stage holds of a row: a swizzle atom of shared memory."""


@dataclass(frozen=True)
class Lane:
    """Output columns of one epilogue: `n` columns of each of `mats` weights; tiles are whole `grain`s."""

    n: int
    mats: int = 1
    grain: int = 1


@dataclass(frozen=True)
class Low:
    """Weights that are stored in low bits: bytes of one as stored, `grain` columns of K that stay in one
    tile, columns per scale, and vector operations that make an operand of the tensor core of one."""

    element: float
    grain: int
    block: int
    unpack: float


@dataclass(frozen=True)
class Product:
    """What a product kernel has to do on one chip: `groups` independent products of `rows` rows.

    `element` and `operand` are bytes of a weight, as the products take it, and of an element of x, `out`
    those of a stored result, `extra` bytes that the epilogue reads and writes beside the results, `engine`
    the format of the products; `low` says how weights are stored where that is in low bits.
    `prologue` is the operations per element of x that every task repeats.
    """

    rows: int
    k: int
    lanes: tuple[Lane, ...]
    element: float
    operand: float
    engine: str
    groups: int = 1
    out: float = 4.0
    extra: float = 0.0
    prologue: float = 0.0
    whole_rows: bool = False
    low: Low | None = None

    @property
    def stored(self) -> float:
        """Bytes of a weight in memory."""
        return self.element if self.low is None else self.low.element


@dataclass(frozen=True)
class Tile:
    """The chosen tile: `m` tokens by `n` columns, K in `splits` parts, tiles in bands of `band` row tiles."""

    m: int
    n: int
    splits: int
    band: int
    engine: str


@dataclass(frozen=True)
class Timed:
    """A kernel's modelled time and what it comes from; bytes and operations of all its tasks."""

    seconds: float
    tasks: int
    far: float
    near: float
    work: float
    flops: float
    limit: str
    merges: int = 0


def columns(p: Product, tile: Tile) -> list[int]:
    """Column tiles of each lane."""
    return [math.ceil(lane.n / lane_width(lane, tile.n)) for lane in p.lanes]


def lane_width(lane: Lane, n: int) -> int:
    """Columns of a lane's tile of at most `n` columns in all its weights: whole grains, at least one."""
    return max(lane.grain, n // lane.mats // lane.grain * lane.grain)


def traffic(rows: float, cols: float, tiles: tuple[int, int], band: int, l2: float) -> float:
    """HBM bytes of a grid of `tiles` (row tiles, column tiles) whose row operand has `rows` bytes and
    column operand `cols`, walked in bands through a cache of `l2` bytes that drops what was used longest
    ago.

    The walk goes down a band of `band` row tiles, then to the next column. A band's rows stay while all
    columns stream by, if they fit beside one column; else they come again with every column. The columns
    come again for every band, unless all of them stay beside two bands."""
    down, across = tiles
    bands = math.ceil(down / band)
    held, strip = rows * band / down, cols / across
    loaded = rows if held + strip <= l2 else rows * across
    return loaded + (cols if bands == 1 or cols + 2 * held <= l2 else cols * bands)


def measure(gpu: Gpu, p: Product, tile: Tile) -> Timed:
    """The time of a product kernel with a tile, launch gap not included."""
    across = sum(columns(p, tile))
    down = math.ceil(p.rows / tile.m)
    tasks = p.groups * down * across * tile.splits
    mats = sum(lane.n * lane.mats for lane in p.lanes)
    weights = mats * p.k * p.stored
    rows = p.rows * p.k * p.operand
    far = p.groups * traffic(rows, weights, (down, across), min(tile.band, down), 0.8 * gpu.l2)
    wide = weights / across / tile.splits
    read = p.k * p.operand * min(tile.m, p.rows) / (1 if p.whole_rows else tile.splits)
    loaded = tasks * (wide + read) / (gpu.cluster if down > 1 else 1)
    results = p.groups * p.rows * sum(lane.n for lane in p.lanes)
    stored = results * p.out + p.extra
    partial = 0.0 if tile.splits == 1 else 4.0 * tile.splits * p.groups * p.rows * mats
    near = max(0.0, loaded - far) + stored + partial
    padded = _padded(gpu, p, tile)
    work = 2.0 * p.groups * padded * p.k
    work += p.groups * unpacking(gpu, p.low, tile.engine, down * mats * p.k)
    engine = ENGINES.index(tile.engine)
    body = grid_seconds(gpu, tasks, far / tasks, near / tasks, work / tasks, engine)
    prologue = p.prologue * read / p.operand / gpu.rate("vector") if p.prologue else 0.0
    merge = 0.0
    merges = 0
    if tile.splits > 1:
        merges = p.groups * down * across
        moved = (partial + stored) / merges
        merge = gpu.signal + gpu.l2_latency + grid_seconds(gpu, merges, 0.0, moved, 0.0, engine)
    lead = gpu.start + gpu.hbm_latency + gpu.l2_latency
    flops = 2.0 * p.groups * p.rows * mats * p.k
    limit = _limit(gpu, far, near, work, engine, lead + merge, body)
    return Timed(lead + prologue + body + merge, tasks, far, near, work, flops, limit, merges)


def _padded(gpu: Gpu, p: Product, tile: Tile) -> float:
    """Rows x columns that the engine works through: tiles padded to its smallest product."""
    wide, short, _ = gpu.mma if tile.engine != "vector" else (1, 1, 1)
    if gpu.systolic and tile.engine != "vector":
        wide, short = short, wide
    down, rest = divmod(p.rows, tile.m)
    rows = down * _up(tile.m, short) + _up(rest, short)
    total = 0.0
    for lane in p.lanes:
        width = lane_width(lane, tile.n)
        full, left = divmod(lane.n, width)
        total += full * _up(width * lane.mats, wide) + _up(left * lane.mats, wide)
    return rows * total


def unpacking(gpu: Gpu, low: Low | None, engine: str, weights: float) -> float:
    """Operations of `engine` that take as long as making operands of `weights` low-bit weights: the warps
    that do it then issue the products, so that the two do not overlap."""
    return 0.0 if low is None else low.unpack * weights * gpu.rate(engine) / gpu.rate("vector")


def stage_bytes(p: Product, columns: int, rows: int) -> float:
    """Shared memory of one stage of the pipeline: STEP_BYTES of each row of x and of each weight; of low-bit
    weights as many as stored, whole blocks (their operands are made in registers)."""
    if p.low is None:
        return STEP_BYTES * (columns + rows)
    deep = max(STEP_BYTES / p.element, p.low.block)
    return deep * (columns * p.low.element + rows * p.element)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _limit(gpu: Gpu, far: float, near: float, work: float, engine: int, lead: float, body: float) -> str:
    from mapper_gpu.timing import rates

    parts = {
        "HBM": far / gpu.stream,
        "L2": (far + near) / gpu.l2_bandwidth,
        "arithmetic": work / (float(rates(gpu)[engine]) * gpu.sms),
        "latency": lead,
    }
    name = max(parts, key=lambda k: parts[k])
    return "waves" if body > 1.5 * max(parts.values()) else name


def fits(gpu: Gpu, p: Product, tile: Tile) -> bool:
    """Whether a tile's stages fit shared memory and its accumulators half of the registers."""
    widest = max(lane_width(lane, tile.n) * lane.mats for lane in p.lanes)
    m = min(tile.m, _up(p.rows, gpu.mma[1]))
    return STAGES * stage_bytes(p, widest, m) <= gpu.shared and 4 * m * widest <= gpu.registers / 2


def candidates(gpu: Gpu, p: Product) -> Iterator[Tile]:
    """Legal tiles: those that fit, with splits that cut K on the tensor core's grain, bands of row tiles.

    Splits stop where the grid has eight tasks per SM; a tile takes all rows where these are few.
    """
    engines = [p.engine] if p.engine in gpu.tensor else ["vector"]
    if p.rows <= 4 and "vector" not in engines and p.engine != "fp4":
        engines.append("vector")
    grain = max(1, int(gpu.mma[2] / p.element))
    grain = grain if p.low is None else math.lcm(grain, p.low.grain)
    heights = [m for m in TILE_ROWS if m >= p.rows][:1] if p.rows <= 64 else TILE_ROWS[3:]
    for m in heights:
        bands = (1, 4, 16) if p.rows > m else (1,)
        for n in TILE_COLUMNS:
            tile = Tile(m, n, 1, 1, engines[0])
            if not fits(gpu, p, tile):
                continue
            tasks = p.groups * math.ceil(p.rows / m) * sum(columns(p, tile))
            # a merge reads its rows of the tile's columns in one run: a panel of them, unless it has all rows
            whole = p.rows <= m or all(lane.n % lane_width(lane, n) == 0 for lane in p.lanes)
            for splits in SPLITS if whole else (1,):
                if splits > 1 and (p.k % (splits * grain) or p.groups > 1 or tasks * splits > 8 * gpu.sms):
                    continue
                yield from (Tile(m, n, splits, band, e) for e in engines for band in bands)


@lru_cache(maxsize=1 << 16)
def choose(gpu: Gpu, p: Product, near: float = NEAR) -> tuple[Tile, Timed]:
    """The fastest legal tile, and its time; of those within `near` of it the one with fewest tasks."""
    found = [(t, measure(gpu, p, t)) for t in candidates(gpu, p)]
    if not found:
        raise LoweringError(f"gpu: no tile of {p.rows} rows and {p.lanes} fits an SM of {gpu.name}")
    limit = near * min(t.seconds for _, t in found)
    return min((f for f in found if f[1].seconds <= limit), key=lambda f: (f[1].tasks, f[1].seconds))
