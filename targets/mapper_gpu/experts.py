"""Products of the experts that tokens chose: blocks of rows by expert, tiles, and their time.

`rows` tokens choose `chosen` of `count` experts each. The (token, choice) pairs are sorted by expert, and
each expert's are padded to whole blocks of `tile` rows, as vLLM's moe_align_block_size does it. Which expert
a block belongs to is data; how many blocks there can be is not, so the grid is static: block j is there if
more than j blocks are made, and a task of a block that is not there does nothing.

A task streams the columns n0 .. n1 of the weights of `run` blocks, one block after the other. Times are those
of even routing (see routing): `distinct` experts are read from HBM, `blocks` blocks are worked through; where
groups of chips have experts of their own, those of the fullest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mapper.errors import LoweringError
from mapper_gpu.hardware import ENGINES, Gpu
from mapper_gpu.product import STAGES, STEP_BYTES, TILE_COLUMNS, Low, Timed, unpacking
from mapper_gpu.routing import Routing
from mapper_gpu.timing import grid_seconds, rates

NEAR = 1.02
"""Tiles that take this much longer are as good, if there are fewer of them."""
TASKS = 12
"""Tasks per SM at most: more would only fill the table."""


@dataclass(frozen=True)
class Grouped:
    """One product of experts on one chip: `mats` weights [n, k] per expert, `element` bytes of a weight as
    stored, `operand` of an element of x, `out` of one of the result;
    `low` says how weights are stored where that is in low bits."""

    routing: Routing
    n: int
    k: int
    mats: int
    element: float
    operand: float
    out: float
    engine: str
    low: Low | None = None


@dataclass(frozen=True)
class ExpertTile:
    """`n` columns of `run` blocks per task, on `engine`."""

    n: int
    run: int
    engine: str


def tasks(g: Grouped, t: ExpertTile) -> tuple[int, int]:
    """(runs of blocks, column tiles)."""
    return math.ceil(g.routing.most / t.run), math.ceil(g.n / t.n)


def used(g: Grouped, t: ExpertTile) -> list[int]:
    """Blocks that an average routing fills in each run."""
    return [max(0, min(t.run, g.routing.blocks - i * t.run)) for i in range(tasks(g, t)[0])]


def padded(gpu: Gpu, g: Grouped, columns: int, engine: str) -> float:
    """Operations that the engine works through for one block of a tile, those that make its operands
    included."""
    wide, short = gpu.mma[:2] if engine != "vector" else (1, 1)
    if gpu.systolic and engine != "vector":
        wide, short = short, wide
    rows = -(-g.routing.tile // short) * short
    made = unpacking(gpu, g.low, engine, columns * g.mats * g.k)
    return 2.0 * rows * (-(-columns * g.mats // wide) * wide) * g.k + made


def measure(gpu: Gpu, g: Grouped, t: ExpertTile) -> Timed:
    """The time of the kernel, launch gap not included."""
    r = g.routing
    runs, across = tasks(g, t)
    busy = sum(u > 0 for u in used(g, t)) * across
    far = r.distinct * g.mats * g.n * g.k * g.element
    again = max(0.0, r.blocks - r.distinct) * g.mats * g.n * g.k * g.element
    entering = r.blocks * r.tile * g.k * g.operand
    near = again + across * entering + r.blocks * r.tile * (g.n * g.out + 4 * across)
    work = r.blocks * sum(padded(gpu, g, c, t.engine) for c in widths(g, t))
    engine = ENGINES.index(t.engine)
    body = grid_seconds(gpu, busy, far / busy, near / busy, work / busy, engine)
    lead = gpu.start + gpu.hbm_latency + gpu.l2_latency
    parts = {
        "HBM": far / gpu.stream, "L2": (far + near) / gpu.l2_bandwidth,
        "arithmetic": work / (float(rates(gpu)[engine]) * gpu.sms), "latency": lead,
    }  # fmt: skip
    limit = "waves" if body > 1.5 * max(parts.values()) else max(parts, key=lambda k: parts[k])
    flops = 2.0 * r.pairs / r.owners * g.mats * g.n * g.k
    return Timed(lead + body, runs * across, far, near, work, flops, limit)


def widths(g: Grouped, t: ExpertTile) -> list[int]:
    """Columns of each column tile."""
    return [min(t.n, g.n - n0) for n0 in range(0, g.n, t.n)]


def candidates(gpu: Gpu, g: Grouped) -> Iterator[ExpertTile]:
    """Legal tiles: stages in shared memory, accumulators in half of the registers, and not more tasks than
    TASKS per SM unless one column tile of single blocks has more."""
    engines = [g.engine] if g.engine in gpu.tensor else ["vector"]
    if g.routing.tile <= 4 and "vector" not in engines and g.engine != "fp4":
        engines.append("vector")
    m = max(g.routing.tile, gpu.mma[1])
    for n in TILE_COLUMNS:
        columns = n * g.mats
        if STAGES * STEP_BYTES * (columns + m) > gpu.shared or 4 * m * columns > gpu.registers / 2:
            continue
        run = 1
        while run < 2 * g.routing.most:
            t = ExpertTile(n, min(run, g.routing.most), engines[0])
            runs, across = tasks(g, t)
            if runs * across <= TASKS * gpu.sms or t.run == g.routing.most:
                yield from (ExpertTile(t.n, t.run, e) for e in engines)
            run *= 2


@lru_cache(maxsize=1 << 12)
def choose(gpu: Gpu, g: Grouped) -> tuple[ExpertTile, Timed]:
    """The fastest legal tile, and its time; of those that are as fast the one with fewest tasks."""
    found = [(t, measure(gpu, g, t)) for t in candidates(gpu, g)]
    if not found:
        raise LoweringError(f"gpu: no tile of experts [{g.n}, {g.k}] fits an SM of {gpu.name}")
    limit = NEAR * min(t.seconds for _, t in found)
    return min((f for f in found if f[1].seconds <= limit), key=lambda f: (f[1].tasks, f[1].seconds))
