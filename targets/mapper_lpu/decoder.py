"""A decoder as chains: which vectors stream where. One instance per program (phase); weights are shared.

Rows of a value are the tokens of the run (batch-major). Residuals are f32, matmul operands fp16. RMS norms
are deferred: x W is computed from x itself, and 1/rms, made beside it from a matmul with ones, multiplies the
results. Attention keeps keys and values as rows over all heads' lanes (grouped heads repeated), even rows in
the east, odd rows in the west. The query is the stationary operand, each head repeated over its own lanes, so
that the score of a key row comes out on the lanes of the value row that it weighs; the softmax then runs over
time, on the VXM alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mapper_lpu.chain import Chain, Gather, Imm, Mem, Mxm, Operand, Res, Tile
from mapper_lpu.isa import EAST, F16, F32, LANES, WEST
from mapper_lpu.spec import Decoder, Matrix, Norm
from mapper_lpu.storage import Storage, Stored, mem
from mapper_lpu.weights import HeadLayout, Weights, tile, tiles_of

LOG2E = math.log2(math.e)
MASKED = 1e30
SIDES = (EAST, WEST)
# the low part of the squares is kept 2^11 times larger, out of fp16's subnormal range
SQUARE_SCALE, LOW_SCALE = 2.0**-5, 2.0**11


def group(hemisphere: int, number: int) -> tuple[int, ...]:
    """The four slices of slice group `number`."""
    return mem(hemisphere, 4 * number, 4)


def head_width(vocabulary: int) -> int:
    """Words per tile of the head: a full vector, or half of a small vocabulary, so that both sides work."""
    return LANES if vocabulary > LANES else -(-vocabulary // 2)


@dataclass
class Cache:
    """The KV cache of one layer slot: keys (fp16) and values (f32), rows b * context + position, even east,
    odd west.
    """

    keys: dict[int, Stored]
    values: dict[int, Stored]


@dataclass
class Program:
    """Chains of a program in order: before, in, and after the repeated layer. `carried`: x, made by the layer
    again.
    """

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
        self,
        decoder: Decoder,
        phase: str,
        storage: Storage,
        weights: Weights,
        caches: list[Cache],
        lag: int,
    ) -> None:
        self.lag = lag  # cycles of an ALU: accumulation over time makes as many interleaved partial sums
        self.d, self.phase, self.storage, self.weights = decoder, phase, storage, weights
        self.cache = caches[0]
        self.rows = decoder.batch * decoder.tokens
        self.heads = HeadLayout(decoder.attention.heads, decoder.attention.head_dim)
        self.program = Program()
        self.chains = self.program.before
        self.mask: dict[int, Stored] | None = None  # additive score masks of the cache rows, by side

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
            if rows > self.lag and number + 1 < len(terms):
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
        """Sum over the tiles of x of a projection. One tile today: more would need passes of one MXM in one
        chain.
        """
        return self.matmul(chain, tiles[0], x[0].half[tiles[0].hemisphere], rows)

    def head(self, x: list[Residual]) -> list[Stored]:
        """Final norm and logits, f32, one Stored per tile of the vocabulary."""
        d, rows = self.d, self.all_rows
        inverse: dict[int, Stored] = {}
        out = []
        for t, (begin, end) in enumerate(tiles_of(d.vocabulary, head_width(d.vocabulary))):
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
