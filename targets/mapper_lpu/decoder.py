"""A decoder as chains: which vectors stream where. One instance per program (phase); weights are shared.

Rows of a value are the tokens of the run (batch-major). Residuals are f32, matmul operands fp16. RMS norms are
deferred: x W is computed from x itself, and 1/rms, made beside it from a matmul with ones, multiplies the results.
Attention keeps keys and values as rows over all heads' lanes (grouped heads repeated), even rows in the east, odd rows in
the west. The query is the stationary operand, each head repeated over its own lanes, so that the score of a key row
comes out on the lanes of the value row that it weighs; the softmax then runs over time, on the VXM alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mapper_lpu.chain import Chain, Gather, Hold, Imm, Mem, Mxm, Operand, Res, Scatter, Self, Tile
from mapper_lpu.isa import EAST, F16, F32, I16, LANES, NO_INDEX, WEST
from mapper_lpu.spec import Decoder, Matrix, Norm
from mapper_lpu.storage import Storage, Stored, mem
from mapper_lpu.weights import LOAD_GROUPS, HeadLayout, Weights, rotated, tile, tiles_of, weight_units

LOG2E = math.log2(math.e)
MASKED = 1e30
SIDES = (EAST, WEST)
# the low part of the squares is kept 2^11 times larger, out of fp16's subnormal range
SQUARE_SCALE, LOW_SCALE = 2.0**-5, 2.0**11


def group(hemisphere: int, number: int) -> tuple[int, ...]:
    """The four slices of slice group `number`."""
    return mem(hemisphere, 4 * number, 4)


@dataclass
class Cache:
    """The KV cache of one layer slot: keys (fp16) and values (f32), rows b * context + position, even east, odd west."""

    keys: dict[int, Stored]
    values: dict[int, Stored]


@dataclass
class Program:
    """Chains of a program in order: before, in, and after the repeated layer. `carried`: x, made by the layer again."""

    before: list[Chain] = field(default_factory=list)
    body: list[Chain] = field(default_factory=list)
    after: list[Chain] = field(default_factory=list)
    carried: list[Stored] = field(default_factory=list)
    values: list[Stored] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)


@dataclass
class Residual:
    """x of one tile of lanes: f32 in the east, fp16 on both sides; rows = tokens."""

    wide: Stored
    half: dict[int, Stored]


class Builder:
    """Builds the chains of one phase."""

    def __init__(
        self, decoder: Decoder, phase: str, storage: Storage, weights: Weights, caches: list[Cache]
    ) -> None:
        self.d, self.phase, self.storage, self.weights = decoder, phase, storage, weights
        self.cache = caches[0]
        self.rows = decoder.batch * decoder.tokens
        self.heads = HeadLayout(decoder.attention.heads, decoder.attention.head_dim)
        self.program = Program()
        self.chains = self.program.before

    # -- helpers ------------------------------------------------------------------------------------------

    def temp(self, name: str, type: int, rows: int, units: tuple[int, ...]) -> Stored:
        value = self.storage.store(
            f"{self.phase}/{name}", type, rows, units, program=self.phase, temporary=True
        )
        self.program.values.append(value)
        return value

    def chain(self, name: str, count: int, op: int) -> Chain:
        chain = Chain(name, count, ir=op)
        self.chains.append(chain)
        return chain

    def use(self, name: str, stored: Stored, op: int) -> Tile:
        made = tile(name, stored, op)
        self.program.tiles.append(made)
        return made

    def matmul(self, chain: Chain, weights: Tile, activation: Stored, rows: tuple[int, ...]) -> Res:
        """The f32 result of an fp16 tile: the halves of both planes, joined."""
        return chain.add("vxm.add", Mxm(weights, 1, activation, rows), Mxm(weights, 0, activation, rows))

    @property
    def all_rows(self) -> tuple[int, ...]:
        return tuple(range(self.rows))

    # -- the residual stream ------------------------------------------------------------------------------

    def residual(self, name: str, slices: int) -> list[Residual]:
        """Storage for x: one Residual per 320 channels, the f32 part in slice group `slices`."""
        out = []
        for t, _ in enumerate(tiles_of(self.d.width)):
            wide = self.temp(f"{name}.{t}", F32, self.rows, group(EAST, slices))
            half = {s: self.temp(f"{name}.{t}.half", F16, self.rows, mem(s, 8, 2)) for s in SIDES}
            out.append(Residual(wide, half))
        return out

    def write_residual(self, chain: Chain, value: Res, x: Residual) -> None:
        """Write a result as the f32 residual and its fp16 copies."""
        for side in SIDES:
            chain.write(chain.cast(value, F16), x.half[side], self.all_rows)
        chain.write(value, x.wide, self.all_rows)

    def embed(self, x: list[Residual], tokens: Stored) -> None:
        """Gather the embedding rows of the tokens."""
        table = self.weights_embedding()
        for t, part in enumerate(x):
            chain = self.chain(f"embed.{t}", self.rows, self.d.embed_op)
            row = chain.add("vxm.copy", Gather(table[t], tokens, self.all_rows))
            self.write_residual(chain, row, part)

    def weights_embedding(self) -> list[Stored]:
        tables = []
        for t, (begin, end) in enumerate(tiles_of(self.d.width)):
            expr = ["slice", self.weights.weight(self.d.embedding), 1, begin, end]
            shape = (self.d.vocabulary, end - begin)
            tables.append(self.weights.table(f"embedding.{t}", EAST, 12 + 4 * t, expr, shape, None))
        return tables

    def inverse_rms(self, name: str, x: list[Residual], norm: Norm) -> dict[int, Stored]:
        """1/rms of every token on all lanes, stored on both sides."""
        width, rows = self.d.width, self.rows
        ones = self.use(f"{name}/ones", self.weights.ones(min(width, LANES), WEST), norm.op)
        parts = []
        for t, part in enumerate(x):
            chain = self.chain(f"{name}/squares.{t}", rows, norm.op)
            wide = Mem(part.wide, self.all_rows)
            small = chain.add("vxm.mul", wide, Imm(SQUARE_SCALE))
            square = chain.add("vxm.mul", small, small)
            high = chain.cast(square, F16)
            low = chain.add("vxm.sub", square, chain.add("vxm.cast", high, type=F16))
            small_low = chain.cast(chain.add("vxm.mul", low, Imm(LOW_SCALE)), F16)
            both = [
                self.temp(f"{name}/squares.{t}.{part}", F16, rows, mem(WEST, first, 2))
                for part, first in (("high", 10), ("low", 8))
            ]
            chain.write(high, both[0], self.all_rows)
            chain.write(small_low, both[1], self.all_rows)
            parts.append(both)
        factor = 1.0 / (width * SQUARE_SCALE**2)
        chain = self.chain(f"{name}/rsqrt", rows, norm.op)
        total: Operand = Imm(norm.eps)
        terms = [
            (part, scale)
            for high, low in parts
            for part, scale in ((low, factor / LOW_SCALE), (high, factor))
        ]
        for number, (stored, scale) in enumerate(terms):
            part_sum = self.matmul(chain, ones, stored, self.all_rows)
            made = chain.add("vxm.add", chain.add("vxm.mul", part_sum, Imm(scale)), total)
            total = made
            if rows > 3 and number + 1 < len(terms):
                # activations of one MXM are as far apart as VXM levels: longer streams go by way of MEM
                partial = self.temp(f"{name}/sum.{number}", F32, rows, group(EAST, 2))
                chain.write(made, partial, self.all_rows)
                chain = self.chain(f"{name}/rsqrt.{number}", rows, norm.op)
                total = Mem(partial, self.all_rows)
        out = {}
        for side in SIDES:
            out[side] = self.temp(f"{name}/rms", F32, rows, group(side, 1))
            chain.write(chain.add("vxm.rsqrt", total), out[side], self.all_rows)
        return out

    # -- attention ----------------------------------------------------------------------------------------

    def project(
        self,
        key: str,
        matrix: Matrix,
        side: int,
        rows: list[int],
        norm: Norm,
        signs: list[float] | None = None,
    ) -> list[Tile]:
        """The tiles of one projection of the normed x, one per 320 channels of x."""
        out = []
        for t, (begin, end) in enumerate(tiles_of(self.d.width)):
            stored = self.weights.matrix(
                f"{key}.{t}", matrix, self.d.layers, side, rows, range(begin, end), signs=signs, norm=norm
            )
            out.append(self.use(f"{key}.{t}", stored[0], matrix.op))
        return out

    def projected(self, chain: Chain, tiles: list[Tile], x: list[Residual], rows: tuple[int, ...]) -> Res:
        """Sum over the tiles of x of a projection. One tile today: more would need passes of one MXM in one chain."""
        return self.matmul(chain, tiles[0], x[0].half[tiles[0].hemisphere], rows)

    def attention(
        self, x: list[Residual], cosines: dict[str, Stored], index: dict[int, Stored], position: list[int]
    ) -> list[Stored]:
        """Attention of the normed x: chains up to the fp16 result, stored east, one row per token."""
        a, rows = self.d.attention, self.rows
        share = a.heads // a.kv_heads
        norm = self.d.attention_norm
        queries = self.queries(x, cosines, position)
        inverse = self.inverse_rms("attention/norm", x, norm)
        values = self.project("v", a.v, EAST, self.heads.columns(share), norm)
        chain = self.chain("attention/value", rows, a.v.op)
        made = chain.add(
            "vxm.mul", self.projected(chain, values, x, self.all_rows), Mem(inverse[WEST], self.all_rows)
        )
        self.append(chain, made, F32, self.cache.values, index, a.v_append_op)
        self.keys(x, cosines, inverse, index, position)
        return self.attend(queries, inverse)

    def rope(
        self,
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
        a, norm = self.d.attention, self.d.attention_norm
        plain = self.projected(chain, self.project(key, matrix, EAST, columns, norm), x, rows)
        if a.rope is None or tables is None:
            return plain
        partner, signs = rotated(columns, a.rope, self.heads)
        turned_weights = self.project(f"{key}.rotated", matrix, WEST, partner, norm, signs)
        turned = self.projected(chain, turned_weights, x, rows)
        chain.ir = rope_op
        left = chain.add("vxm.mul", plain, Mem(tables[0], at))
        right = chain.add("vxm.mul", turned, Mem(tables[1], at))
        return chain.add("vxm.add", left, right)

    def queries(
        self, x: list[Residual], cosines: dict[str, Stored], position: list[int]
    ) -> dict[int, list[Stored]]:
        """Per token and head the query on the head's own lanes only, fp16, in all weight slices of both sides."""
        a, heads = self.d.attention, self.heads.heads
        count = self.rows * heads
        rows = tuple(r for r in range(self.rows) for _ in range(heads))
        chain = self.chain("attention/query", count, a.q.op)
        tables = (cosines["q.cos"], cosines["q.sin"]) if a.rope else None
        at = tuple(position[r] for r in rows)
        turned = self.rope(
            chain, x, "q", a.q, self.heads.columns(1), rows, tables, at, a.rope.op if a.rope else a.q.op
        )
        chain.ir = a.op
        masks = np.zeros((heads, LANES), np.float32)
        for h in range(heads):
            masks[h, h * self.heads.stride : h * self.heads.stride + self.heads.dim] = (
                1.0 if a.rope else a.scale * LOG2E
            )
        mask = self.weights.array("head_masks", EAST, 0, masks)
        own = chain.add(
            "vxm.mul", turned, Mem(mask, tuple(h for _ in range(self.rows) for h in range(heads)))
        )
        out: dict[int, list[Stored]] = {}
        for side in SIDES:
            half = chain.cast(own, F16)
            units = weight_units(side)
            out[side] = [
                self.temp(f"query.{way}", F16, count, units[2 * way : 2 * way + 2]) for way in range(16)
            ]
            used = [i if self.seen(i // heads)[side] else -1 for i in range(count)]
            for stored in out[side]:
                chain.write(half, stored, used)
        return out

    def keys(
        self,
        x: list[Residual],
        cosines: dict[str, Stored],
        inverse: dict[int, Stored],
        index: dict[int, Stored],
        position: list[int],
    ) -> None:
        """The new keys, appended to the cache."""
        a = self.d.attention
        columns = self.heads.columns(a.heads // a.kv_heads)
        chain = self.chain("attention/key", self.rows, a.k.op)
        tables = (cosines["k.cos"], cosines["k.sin"]) if a.rope else None
        turned = self.rope(chain, x, "k", a.k, columns, self.all_rows, tables, tuple(position), a.k_rope_op)
        made = chain.add("vxm.mul", turned, Mem(inverse[WEST], self.all_rows))
        self.append(chain, made, F16, self.cache.keys, index, a.k_append_op)

    def append(
        self, chain: Chain, value: Res, type: int, cache: dict[int, Stored], index: dict[int, Stored], op: int
    ) -> None:
        """Write new rows to the cache: at data-dependent rows in decode, at known ones in prefill."""
        for side in SIDES:
            chain.ir = op
            made = chain.cast(value, F16) if type == F16 else chain.add("vxm.copy", value)
            if self.phase == "decode":
                for b in range(self.d.batch):
                    only = [0 if r == b else -1 for r in range(self.rows)]
                    chain.write(made, cache[side], only, Scatter(index[side], b))
            else:
                rows = [self.cache_row(r) for r in range(self.rows)]
                chain.write(made, cache[side], [r // 2 if r % 2 == side else -1 for r in rows])

    def cache_row(self, token: int) -> int:
        """Row of the cache of a prefill token."""
        return (token // self.d.tokens) * self.d.context + token % self.d.tokens

    def attend(self, queries: dict[int, list[Stored]], inverse: dict[int, Stored]) -> list[Stored]:
        """softmax(q k^T) v of every token over the cache."""
        result = self.temp("attended", F16, self.rows, mem(EAST, 8, 2))
        for token in range(self.rows):
            _Token(self, token, self.seen(token), queries, inverse, result).build()
        return [result]

    def seen(self, token: int) -> dict[int, list[int]]:
        """The cache rows of each side that a token's query meets: in decode all, masked by the position."""
        sequence, last = divmod(token, self.d.tokens)
        begin = sequence * self.d.context
        end = begin + (self.d.context if self.phase == "decode" else last + 1)
        return {s: [r // 2 for r in range(begin, end) if r % 2 == s] for s in SIDES}

    def output(self, attended: list[Stored], x: list[Residual], out: list[Residual]) -> None:
        """Output projection and residual add."""
        a = self.d.attention
        columns = self.heads.columns(1)
        for t, (begin, end) in enumerate(tiles_of(self.d.width)):
            stored = self.weights.matrix(f"o.{t}", a.o, self.d.layers, EAST, range(begin, end), columns)
            weights = self.use(f"o.{t}", stored[0], a.o.op)
            chain = self.chain(f"attention/output.{t}", self.rows, a.o.op)
            made = self.matmul(chain, weights, attended[0], self.all_rows)
            chain.ir = a.residual_op
            self.write_residual(chain, chain.add("vxm.add", made, Mem(x[t].wide, self.all_rows)), out[t])

    # -- the gated MLP ------------------------------------------------------------------------------------

    def mlp(self, x: list[Residual], out: list[Residual]) -> None:
        """down(silu(gate(x)) * up(x)) + x."""
        m, rows = self.d.mlp, self.all_rows
        inverse: dict[int, Stored] = {}
        hidden: list[Stored] = []
        for t, (begin, end) in enumerate(tiles_of(m.gate.n)):
            gate = self.project(f"gate.{t}", m.gate, EAST, list(range(begin, end)), self.d.mlp_norm)
            up = self.project(f"up.{t}", m.up, WEST, list(range(begin, end)), self.d.mlp_norm)
            if not inverse:
                inverse = self.inverse_rms("mlp/norm", x, self.d.mlp_norm)
            chain = self.chain(f"mlp/gate.{t}", self.rows, m.op)
            g = chain.add("vxm.mul", self.projected(chain, gate, x, rows), Mem(inverse[EAST], rows))
            u = chain.add("vxm.mul", self.projected(chain, up, x, rows), Mem(inverse[WEST], rows))
            product = self.temp(f"mlp/product.{t}", F32, self.rows, group(WEST, 0))
            exponential = self.temp(f"mlp/exponential.{t}", F32, self.rows, group(EAST, 0))
            chain.write(chain.add("vxm.mul", g, u), product, rows)
            power = chain.add("vxm.exp2", chain.add("vxm.mul", g, Imm(-LOG2E)))
            chain.write(chain.add("vxm.add", power, Imm(1.0)), exponential, rows)
            side = t % 2
            chain = self.chain(f"mlp/silu.{t}", self.rows, m.op)
            root = chain.add("vxm.rsqrt", Mem(exponential, rows))
            sigmoid = chain.add("vxm.mul", root, root)
            gated = chain.add("vxm.mul", sigmoid, Mem(product, rows))
            hidden.append(self.temp(f"mlp/hidden.{t}", F16, self.rows, mem(side, 10, 2)))
            chain.write(chain.cast(gated, F16), hidden[-1], rows)
        self.down(hidden, x, out)

    def down(self, hidden: list[Stored], x: list[Residual], out: list[Residual]) -> None:
        """The down projection: tiles of the hidden vector two by two, partial sums in f32, residual added last."""
        m, rows = self.d.mlp, self.all_rows
        inputs = tiles_of(m.down.k)
        for n, (begin, end) in enumerate(tiles_of(self.d.width)):
            partial: Stored | None = None
            for first in range(0, len(inputs), 2):
                chain = self.chain(f"mlp/down.{n}.{first}", self.rows, m.op)
                total: Res | None = None
                for k in range(first, min(first + 2, len(inputs))):
                    lanes = range(*inputs[k])
                    stored = self.weights.matrix(
                        f"down.{n}.{k}", m.down, self.d.layers, k % 2, range(begin, end), lanes
                    )
                    weights = self.use(f"down.{n}.{k}", stored[0], m.op)
                    part = self.matmul(chain, weights, hidden[k], rows)
                    total = part if total is None else chain.add("vxm.add", total, part)
                assert total is not None
                if partial is not None:
                    total = chain.add("vxm.add", total, Mem(partial, rows))
                if first + 2 >= len(inputs):
                    chain.ir = m.residual_op
                    self.write_residual(chain, chain.add("vxm.add", total, Mem(x[n].wide, rows)), out[n])
                else:
                    partial = self.temp(f"mlp/partial.{n}.{first}", F32, self.rows, group(WEST, 0))
                    chain.write(total, partial, rows)

    # -- the head -----------------------------------------------------------------------------------------

    def head(self, x: list[Residual]) -> list[Stored]:
        """Final norm and logits, f32, one Stored per 320 of the vocabulary."""
        d, rows = self.d, self.all_rows
        inverse: dict[int, Stored] = {}
        out = []
        for t, (begin, end) in enumerate(tiles_of(d.vocabulary)):
            side = t % 2
            stored = self.weights.matrix(
                f"head.{t}", d.head, 1, side, range(begin, end), range(d.width), norm=d.final_norm
            )
            weights = self.use(f"head.{t}", stored[0], d.head.op)
            if not inverse:
                inverse = self.inverse_rms("head/norm", x, d.final_norm)
            chain = self.chain(f"head.{t}", self.rows, d.head.op)
            made = self.matmul(chain, weights, x[0].half[side], rows)
            logits = self.temp(f"logits.{t}", F32, self.rows, group(side, 0))
            chain.write(chain.add("vxm.mul", made, Mem(inverse[1 - side], rows)), logits, rows)
            out.append(logits)
        return out

    # -- what only a decode step needs: values that depend on the position ---------------------------------

    def positional(self, position: dict[int, Stored]) -> tuple[dict[str, Stored], dict[int, Stored]]:
        """Rows of the rotary tables and of the scatter indices at the position, gathered once per step."""
        a, d = self.d.attention, self.d
        rows: dict[str, Stored] = {}
        for name, table in self.rotary_tables().items():
            side = table.hemisphere
            made = self.temp(name, F32, 1, group(side, {"q": 1, "k": 0}[name[0]]))
            rope_op = a.rope.op if a.rope is not None and name[0] == "q" else a.k_rope_op
            chain = self.chain(f"position/{name}", 1, rope_op)
            chain.write(chain.add("vxm.copy", Gather(table, position[side], (0,))), made, (0,))
            rows[name] = made
        index: dict[int, Stored] = {}
        for side in SIDES:
            index[side] = self.temp("cache_index", I16, d.batch, mem(side, 4, 2))
            for b in range(d.batch):
                table = self.weights.array(f"cache_index.{b}", side, 28, self.index_rows(b, side), I16)
                chain = self.chain(f"position/index.{b}", 1, -1)  # for keys and values alike
                number = chain.cast(Gather(table, position[side], (0,)), F32, I16)
                chain.write(chain.cast(number, I16, F32), index[side], [b])
        return rows, index

    def index_rows(self, sequence: int, side: int) -> npt.NDArray[np.int16]:
        """Per position the cache row of this side, or 65535 (-1) where the position belongs to the other side."""
        rows = sequence * self.d.context + np.arange(self.d.context)
        index = np.where(rows % 2 == side, rows // 2, NO_INDEX).astype(np.uint16).view(np.int16)
        return np.repeat(index[:, None], LANES, axis=1)

    def rotary_tables(self) -> dict[str, Stored]:
        """Tables of cosines (east) and sines (west) over all positions; those of the query carry the score scale."""
        a = self.d.attention
        if a.rope is None:
            return {}
        made = {}
        for which, first in (("q", 4), ("k", 0)):
            scale = a.scale * LOG2E if which == "q" else 1.0
            for part, side in (("cos", EAST), ("sin", WEST)):
                key = f"{which}.{part}"
                made[key] = self.weights.rotary(key, a.rope, side, self.heads, side, first, scale)
        return made

    def masks(self, position: dict[int, Stored]) -> dict[int, Stored]:
        """Additive score masks of the cache rows, from the position: 0 up to it, -1e30 beyond."""
        out: dict[int, Stored] = {}
        chain: Chain | None = None
        for side in SIDES:
            numbers = np.array(
                [r % self.d.context for r in range(self.d.batch * self.d.context) if r % 2 == side],
                np.float32,
            )
            count = len(numbers)
            if chain is None:
                chain = self.chain("position/mask", count, self.d.attention.op)
            table = self.weights.array("row_position", side, 12, np.repeat(numbers[:, None], LANES, axis=1))
            behind = chain.add(
                "vxm.sub", Mem(position[side], (0,) * count), Mem(table, tuple(range(count))), count=count
            )
            clipped = chain.add("vxm.min", behind, Imm(0.0), count=count)
            out[side] = self.temp("mask", F32, count, group(side, 4))
            chain.write(chain.add("vxm.mul", clipped, Imm(MASKED), count=count), out[side], range(count))
        return out

    mask: dict[int, Stored] | None = None


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
        return self.b.temp(f"{name}.{self.token}", F32, min(3, count), group(side, number))

    @staticmethod
    def last(count: int) -> list[int]:
        """Rows of the partial results of an accumulation: those of its last three vectors."""
        keep = min(3, count)
        return [-1] * (count - keep) + list(range(keep))

    def fold(self, chain: Chain, opcode: str, parts: dict[int, Stored]) -> Res:
        """All partial results combined on one ALU, through its output register."""
        operands = [Mem(p, (r,)) for r in range(3) for p in parts.values() if r < p.rows]
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
