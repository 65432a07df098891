"""Attention as chains: projections, cache append, scores and softmax over time, output projection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mapper_lpu.chain import Chain, Hold, Mem, Mxm, Res, Scatter, Self, Tile
from mapper_lpu.decoder import LOG2E, SIDES, Builder, Residual, group
from mapper_lpu.isa import EAST, F16, F32, LANES, WEST
from mapper_lpu.spec import Matrix
from mapper_lpu.storage import Stored, mem
from mapper_lpu.weights import LOAD_GROUPS, rotated, tiles_of, weight_units


def attention(
    b: Builder, x: list[Residual], cosines: dict[str, Stored], index: dict[int, Stored], position: list[int]
) -> list[Stored]:
    """Attention of the normed x: chains up to the fp16 result, stored east, one row per token."""
    a, rows = b.d.attention, b.rows
    share = a.heads // a.kv_heads
    norm = b.d.attention_norm
    asked = queries(b, x, cosines, position)
    inverse = b.inverse_rms("attention/norm", x, norm)
    values = b.project("v", a.v, EAST, b.heads.columns(share), norm)
    chain = b.chain("attention/value", rows, a.v.op)
    made = chain.add("vxm.mul", b.projected(chain, values, x, b.all_rows), Mem(inverse[WEST], b.all_rows))
    append(b, chain, made, F32, b.cache.values, index, a.v_append_op)
    keys(b, x, cosines, inverse, index, position)
    return attend(b, asked, inverse)


def rope(
    b: Builder,
    chain: Chain,
    x: list[Residual],
    key: str,
    matrix: Matrix,
    columns: list[int],
    rows: tuple[int, ...],
    tables: tuple[Stored, Stored] | None,
    at: tuple[int, ...],
    rope_op: int,
) -> Res:
    """A projection with its rotary embedding: x W cos + x W' sin, W' the weights of the rotated partners."""
    a, norm = b.d.attention, b.d.attention_norm
    plain = b.projected(chain, b.project(key, matrix, EAST, columns, norm), x, rows)
    if a.rope is None or tables is None:
        return plain
    partner, signs = rotated(columns, a.rope, b.heads)
    turned_weights = b.project(f"{key}.rotated", matrix, WEST, partner, norm, signs)
    turned = b.projected(chain, turned_weights, x, rows)
    chain.ir = rope_op
    left = chain.add("vxm.mul", plain, Mem(tables[0], at))
    right = chain.add("vxm.mul", turned, Mem(tables[1], at))
    return chain.add("vxm.add", left, right)


def queries(
    b: Builder, x: list[Residual], cosines: dict[str, Stored], position: list[int]
) -> dict[int, list[Stored]]:
    """Per token and head the query on the head's own lanes only, fp16, in all weight slices of both sides."""
    a, heads = b.d.attention, b.heads.heads
    count = b.rows * heads
    rows = tuple(r for r in range(b.rows) for _ in range(heads))
    chain = b.chain("attention/query", count, a.q.op)
    tables = (cosines["q.cos"], cosines["q.sin"]) if a.rope else None
    at = tuple(position[r] for r in rows)
    turned = rope(
        b, chain, x, "q", a.q, b.heads.columns(1), rows, tables, at, a.rope.op if a.rope else a.q.op
    )
    chain.ir = a.op
    masks = np.zeros((heads, b.heads.lanes), np.float32)
    for h in range(heads):
        masks[h, h * b.heads.stride : h * b.heads.stride + b.heads.dim] = 1.0 if a.rope else a.scale * LOG2E
    mask = b.weights.array("head_masks", EAST, 0, masks)
    own = chain.add("vxm.mul", turned, Mem(mask, tuple(h for _ in range(b.rows) for h in range(heads))))
    out: dict[int, list[Stored]] = {}
    for side in SIDES:
        half = chain.cast(own, F16)
        units = weight_units(side)
        out[side] = [b.temp(f"query.{way}", F16, count, units[2 * way : 2 * way + 2]) for way in range(16)]
        used = [i if seen(b, i // heads)[side] else -1 for i in range(count)]
        for stored in out[side]:
            chain.write(half, stored, used)
    return out


def keys(
    b: Builder,
    x: list[Residual],
    cosines: dict[str, Stored],
    inverse: dict[int, Stored],
    index: dict[int, Stored],
    position: list[int],
) -> None:
    """The new keys, appended to the cache."""
    a = b.d.attention
    columns = b.heads.columns(a.heads // a.kv_heads)
    chain = b.chain("attention/key", b.rows, a.k.op)
    tables = (cosines["k.cos"], cosines["k.sin"]) if a.rope else None
    turned = rope(b, chain, x, "k", a.k, columns, b.all_rows, tables, tuple(position), a.k_rope_op)
    made = chain.add("vxm.mul", turned, Mem(inverse[WEST], b.all_rows))
    append(b, chain, made, F16, b.cache.keys, index, a.k_append_op)


def append(
    b: Builder,
    chain: Chain,
    value: Res,
    type: int,
    cache: dict[int, Stored],
    index: dict[int, Stored],
    op: int,
) -> None:
    """Write new rows to the cache: at data-dependent rows in decode, at known ones in prefill."""
    for side in SIDES:
        chain.ir = op
        made = chain.cast(value, F16) if type == F16 else chain.add("vxm.copy", value)
        if b.phase == "decode":
            for sequence in range(b.d.batch):
                only = [0 if r == sequence else -1 for r in range(b.rows)]
                chain.write(made, cache[side], only, Scatter(index[side], sequence))
        else:
            rows = [cache_row(b, r) for r in range(b.rows)]
            chain.write(made, cache[side], [r // 2 if r % 2 == side else -1 for r in rows])


def cache_row(b: Builder, token: int) -> int:
    """Row of the cache of a prefill token."""
    return (token // b.d.tokens) * b.d.context + token % b.d.tokens


def attend(b: Builder, queries: dict[int, list[Stored]], inverse: dict[int, Stored]) -> list[Stored]:
    """softmax(q k^T) v of every token over the cache."""
    result = b.temp("attended", F16, b.rows, mem(EAST, 8, 2))
    for token in range(b.rows):
        _Token(b, token, seen(b, token), queries, inverse, result).build()
    return [result]


def seen(b: Builder, token: int) -> dict[int, list[int]]:
    """The cache rows of each side that a token's query meets: in decode all, masked by the position."""
    sequence, last = divmod(token, b.d.tokens)
    begin = sequence * b.d.context
    end = begin + (b.d.context if b.phase == "decode" else last + 1)
    return {s: [r // 2 for r in range(begin, end) if r % 2 == s] for s in SIDES}


def output(b: Builder, attended: list[Stored], x: list[Residual], out: list[Residual]) -> None:
    """Output projection and residual add."""
    a = b.d.attention
    columns = b.heads.columns(1)
    for t, (begin, end) in enumerate(tiles_of(b.d.width)):
        stored = b.weights.matrix(f"o.{t}", a.o, b.d.layers, EAST, range(begin, end), columns)
        weights = b.use(f"o.{t}", stored[0], a.o.op)
        chain = b.chain(f"attention/output.{t}", b.rows, a.o.op)
        made = b.matmul(chain, weights, attended[0], b.all_rows)
        chain.ir = a.residual_op
        b.write_residual(chain, chain.add("vxm.add", made, Mem(x[t].wide, b.all_rows)), out[t])


@dataclass
class _Token:
    """The attention chains of one token: `rows[side]` are the cache rows it sees."""

    b: Builder
    token: int
    rows: dict[int, list[int]]
    queries: dict[int, list[Stored]]
    inverse: dict[int, Stored]
    result: Stored

    def build(self) -> None:
        sides = [s for s in SIDES if self.rows[s]]
        tiles = {s: self.stationary(s) for s in sides}
        scores, peaks = self.scores(sides, tiles)
        top = self.peak(sides, peaks)
        self.weigh(sides, scores, top)

    def stationary(self, side: int) -> Tile:
        """The query as weights: output n of head h has that head's query."""
        b = self.b
        heads = b.heads
        zero = b.weights.stored.get(("zero", side))
        if zero is None:
            stored = b.storage.store("zero", F16, 16, weight_units(side), ways=16)
            layout = {"kind": "rows", "dtype": "f16", "ways": 16, "axes": None, "row_axes": 1, "take": None}
            b.storage.port(
                f"zero@{'ew'[side]}",
                "constant",
                "float32",
                (16, LANES),
                stored,
                layout,
                ["zeros", [16, LANES], "float32"],
            )
            zero = b.weights.stored[("zero", side)] = [stored]
        loads = []
        for g in range(LOAD_GROUPS):
            head = g * 16 // heads.stride
            if head < heads.heads:
                row = self.token * heads.heads + head
                loads.append(tuple((self.queries[side][i], row, p) for p in (0, 1) for i in range(16)))
            else:
                loads.append(tuple((zero[0], i, p) for p in (0, 1) for i in range(16)))
        made = Tile(f"query.{self.token}@{'ew'[side]}", side, tuple(loads), b.d.attention.op)
        b.program.tiles.append(made)
        return made

    def scores(self, sides: list[int], tiles: dict[int, Tile]) -> tuple[dict[int, Stored], dict[int, Stored]]:
        b = self.b
        chain = b.chain(
            f"attention/scores.{self.token}", max(len(self.rows[s]) for s in sides), b.d.attention.op
        )
        scores, peaks = {}, {}
        for side in sides:
            rows = tuple(self.rows[side])
            count = len(rows)
            keys = b.cache.keys[side]
            made = chain.add(
                "vxm.add", Mxm(tiles[side], 1, keys, rows), Mxm(tiles[side], 0, keys, rows), count=count
            )
            score = chain.add("vxm.mul", made, Mem(self.inverse[side], (self.token,) * count), count=count)
            if b.mask is not None:
                score = chain.add("vxm.add", score, Mem(b.mask[side], rows), count=count)
            scores[side] = b.temp(f"scores.{self.token}", F32, count, group(side, 0))
            chain.write(score, scores[side], range(count))
            peaks[side] = self.partial("peak", side, 2, count)
            chain.write(chain.add("vxm.max", score, Self(), count=count), peaks[side], self.last(count))
        return scores, peaks

    def partial(self, name: str, side: int, number: int, count: int) -> Stored:
        return self.b.temp(f"{name}.{self.token}", F32, min(self.b.lag, count), group(side, number))

    def last(self, count: int) -> list[int]:
        """Rows of the partial results of an accumulation: those of its last vectors, one per ALU cycle."""
        keep = min(self.b.lag, count)
        return [-1] * (count - keep) + list(range(keep))

    def fold(self, chain: Chain, opcode: str, parts: dict[int, Stored]) -> Res:
        """All partial results combined on one ALU, through its output register."""
        operands = [Mem(p, (r,)) for r in range(self.b.lag) for p in parts.values() if r < p.rows]
        if len(operands) == 1:
            return chain.add("vxm.copy", operands[0])
        result = chain.add(opcode, operands[0], operands[1])
        for operand in operands[2:]:
            result = chain.add(opcode, operand, Hold(result.op))
        return result

    def peak(self, sides: list[int], peaks: dict[int, Stored]) -> dict[int, Stored]:
        b = self.b
        chain = b.chain(f"attention/peak.{self.token}", 1, b.d.attention.op)
        top = self.fold(chain, "vxm.max", peaks)
        out = {}
        for side in sides:
            out[side] = b.temp(f"top.{self.token}", F32, 1, group(side, 1))
            chain.write(chain.add("vxm.copy", top), out[side], (0,))
        return out

    def weigh(self, sides: list[int], scores: dict[int, Stored], top: dict[int, Stored]) -> None:
        b = self.b
        chain = b.chain(
            f"attention/weigh.{self.token}", max(len(self.rows[s]) for s in sides), b.d.attention.op
        )
        sums, products = {}, {}
        for side in sides:
            rows = tuple(self.rows[side])
            count = len(rows)
            below = chain.add(
                "vxm.sub", Mem(scores[side], tuple(range(count))), Mem(top[side], (0,) * count), count=count
            )
            weight = chain.add("vxm.exp2", below, count=count)
            sums[side] = self.partial("sum", side, 0, count)
            chain.write(chain.add("vxm.add", weight, Self(), count=count), sums[side], self.last(count))
            product = chain.add("vxm.mul", weight, Mem(b.cache.values[side], rows), count=count)
            products[side] = self.partial("product", side, 1, count)
            chain.write(chain.add("vxm.add", product, Self(), count=count), products[side], self.last(count))
        chain = b.chain(f"attention/normalise.{self.token}", 1, b.d.attention.op)
        total = self.fold(chain, "vxm.add", sums)
        root = chain.add("vxm.rsqrt", total)
        made = chain.add("vxm.mul", chain.add("vxm.mul", root, root), self.fold(chain, "vxm.add", products))
        chain.write(chain.cast(made, F16), self.result, (self.token,))
