"""What depends on the position: rotary rows, cache indices, score masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mapper_lpu.chain import Chain, Gather, Imm, Mem
from mapper_lpu.decoder import LOG2E, MASKED, SIDES, Builder, group
from mapper_lpu.isa import EAST, F32, I16, NO_INDEX, SUPERLANE, WEST
from mapper_lpu.storage import Stored, mem


def positional(b: Builder, position: dict[int, Stored]) -> tuple[dict[str, Stored], dict[int, Stored]]:
    """Rows of the rotary tables and of the scatter indices at the position, gathered once per step."""
    a, d = b.d.attention, b.d
    rows: dict[str, Stored] = {}
    for name, table in rotary_tables(b).items():
        side = table.hemisphere
        made = b.temp(name, F32, 1, group(side, {"q": 1, "k": 0}[name[0]]))
        rope_op = a.rope.op if a.rope is not None and name[0] == "q" else a.k_rope_op
        chain = b.chain(f"position/{name}", 1, rope_op)
        chain.write(chain.add("vxm.copy", Gather(table, position[side], (0,))), made, (0,))
        rows[name] = made
    index: dict[int, Stored] = {}
    # a superlane takes its index from its first lane
    lanes = [lane // SUPERLANE if lane % SUPERLANE == 0 else -1 for lane in range(b.heads.lanes)]
    for side in SIDES:
        index[side] = b.temp("cache_index", I16, d.batch, mem(side, 4, 2))
        for sequence in range(d.batch):
            rows_of = index_rows(b, sequence, side)
            table = b.weights.array(f"cache_index.{sequence}", side, 28, rows_of, I16, lanes)
            chain = b.chain(f"position/index.{sequence}", 1, -1)  # for keys and values alike
            number = chain.cast(Gather(table, position[side], (0,)), F32, I16)
            chain.write(chain.cast(number, I16, F32), index[side], [sequence])
    return rows, index


def index_rows(b: Builder, sequence: int, side: int) -> npt.NDArray[np.int16]:
    """Per position the cache row of this side, or 65535 (-1) where the position belongs to the other side."""
    rows = sequence * b.d.context + np.arange(b.d.context)
    index = np.where(rows % 2 == side, rows // 2, NO_INDEX).astype(np.uint16).view(np.int16)
    return np.repeat(index[:, None], superlanes(b), axis=1)


def superlanes(b: Builder) -> int:
    """Superlanes that the heads fill."""
    return -(-b.heads.lanes // SUPERLANE)


def rotary_tables(b: Builder) -> dict[str, Stored]:
    """Tables of cosines (east) and sines (west) of all positions; the score scale is in the query's."""
    a = b.d.attention
    if a.rope is None:
        return {}
    made = {}
    for which, first in (("q", 4), ("k", 0)):
        scale = a.scale * LOG2E if which == "q" else 1.0
        for part, side in (("cos", EAST), ("sin", WEST)):
            key = f"{which}.{part}"
            made[key] = b.weights.rotary(key, a.rope, side, b.heads, side, first, scale)
    return made


def masks(b: Builder, position: dict[int, Stored]) -> dict[int, Stored]:
    """Additive score masks of the cache rows, from the position: 0 up to it, -1e30 beyond."""
    out: dict[int, Stored] = {}
    chain: Chain | None = None
    for side in SIDES:
        numbers = np.array(
            [r % b.d.context for r in range(b.d.batch * b.d.context) if r % 2 == side],
            np.float32,
        )
        count = len(numbers)
        if chain is None:
            chain = b.chain("position/mask", count, b.d.attention.op)
        table = b.weights.array("row_position", side, 12, np.repeat(numbers[:, None], b.heads.lanes, axis=1))
        behind = chain.add(
            "vxm.sub", Mem(position[side], (0,) * count), Mem(table, tuple(range(count))), count=count
        )
        clipped = chain.add("vxm.min", behind, Imm(0.0), count=count)
        out[side] = b.temp("mask", F32, count, group(side, 4))
        chain.write(chain.add("vxm.mul", clipped, Imm(MASKED), count=count), out[side], range(count))
    return out
