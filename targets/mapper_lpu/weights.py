"""Ports of weights, tables and caches: value expressions and layouts, and the MXM tiles that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.backend import weight_source
from mapper.ir.weights import WeightSymbol
from mapper.schedule.tables import PortKind
from mapper_lpu.chain import Tile
from mapper_lpu.isa import EAST, F16, F32, I16, LANES, SLICES, SUPERLANE, TYPE_BYTES, WEST
from mapper_lpu.spec import Decoder, Matrix, Norm, Rope
from mapper_lpu.storage import Storage, Stored, mem

LOAD_GROUPS = LANES // SUPERLANE
FIRST_WEIGHT_SLICE = SLICES - 2 * SUPERLANE
"""Slices 12..43 hold weights: 16 for the low bytes (plane 0), 16 for the high bytes (plane 1)."""


def weight_units(hemisphere: int) -> tuple[int, ...]:
    """S16 layout of fp16 rows: way i, byte j -> slice 12 + 16 j + i."""
    return tuple(
        mem(hemisphere, FIRST_WEIGHT_SLICE + 16 * byte + way, 1)[0] for way in range(16) for byte in (0, 1)
    )


def tiles_of(size: int, width: int = LANES) -> list[tuple[int, int]]:
    """Ranges of at most `width` that cover `size`."""
    return [(b, min(b + width, size)) for b in range(0, size, width)]


@dataclass(frozen=True)
class HeadLayout:
    """Lanes of a vector that holds all heads: head h, column c in lane h * stride + c; stride is a multiple
    of 16.
    """

    heads: int
    dim: int

    @property
    def stride(self) -> int:
        """Lanes per head: the head width padded to whole superlanes, so that a load group serves one head."""
        return -(-self.dim // SUPERLANE) * SUPERLANE

    @property
    def lanes(self) -> int:
        """Lanes used."""
        return self.heads * self.stride

    def columns(self, share: int) -> list[int]:
        """Per lane the column of a matrix with heads/share heads (grouped-query sharing), -1 for padding."""
        out = [-1] * self.lanes
        for h in range(self.heads):
            for c in range(self.dim):
                out[h * self.stride + c] = (h // share) * self.dim + c
        return out


@dataclass
class Weights:
    """Declares weight ports on demand, once per tile, and keeps the constants that their expressions name."""

    decoder: Decoder
    storage: Storage
    declared: Mapping[str, WeightSymbol]
    symbols: dict[str, WeightSymbol] = field(default_factory=dict)  # those that are used and lie in files
    constants: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    stored: dict[tuple[Any, ...], list[Stored]] = field(default_factory=dict)

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """Register a constant; the same name always stands for the same array."""
        self.constants.setdefault(name, array)
        return name

    def weight(self, name: str) -> Any:
        """The value expression of a weight symbol: read from its file, or kept in the schedule."""
        symbol = self.declared[name]
        if symbol.data is not None:
            return ["const", self.constant(f"weight/{name}", symbol.data)]
        source = weight_source(symbol)
        self.symbols.update(source.files)
        for part, array in source.constants.items():
            self.constant(part, array)
        return source.expression

    def matrix(
        self,
        key: str,
        matrix: Matrix,
        layers: int,
        hemisphere: int,
        rows: Sequence[int],
        lanes: Sequence[int],
        *,
        signs: Sequence[float] | None = None,
        norm: Norm | None = None,
    ) -> list[Stored]:
        """One 320 x 320 fp16 tile per layer: output n is column rows[n] (-1: zero), lane l input lanes[l]
        (-1: zero).

        `norm`: its gain is folded into the weights. `signs` multiplies outputs. Returns a Stored per layer.
        """
        name = (key, hemisphere)
        if name in self.stored:
            return self.stored[name]
        index = self.constant(f"rows/{key}", np.array([*rows, *[-1] * (LANES - len(rows))], np.int64))
        take = self.constant(f"lanes/{key}", np.array(lanes, np.int64))
        out = []
        for layer in range(layers):
            symbol = self.decoder.symbol(matrix.slot, layer)
            expr: Any = self.weight(symbol)
            if not matrix.transposed:
                expr = ["transpose", expr, [1, 0]]
            expr = ["slice", expr, 0, matrix.begin, matrix.end]
            if norm is not None and norm.gain is not None:
                gain: Any = self.weight(self.decoder.symbol(norm.gain, layer))
                if norm.offset:
                    gain = ["add", gain, ["full", [1], "float32", norm.offset]]
                expr = ["mul", expr, gain]
            # row -1 of the padded matrix is zero
            expr = ["take", ["pad", expr, 0, 0, 1], 0, index]
            if signs is not None:
                sign = np.array([*signs, *[0.0] * (LANES - len(signs))], np.float32)[:, None]
                expr = ["mul", expr, ["const", self.constant(f"signs/{key}", sign)]]
            label = f"{key}/{layer}" if layers > 1 else key
            units = weight_units(hemisphere)
            stored = self.storage.store(label, F16, LANES, units, ways=16)
            layout = {"kind": "rows", "dtype": "f16", "ways": 16, "axes": None, "row_axes": 1, "take": take}
            self.storage.port(
                f"{label}@{'ew'[hemisphere]}", "weight", "float32", (LANES, matrix.k), stored, layout, expr
            )
            out.append(stored)
        self.stored[name] = out
        return out

    def table(
        self,
        key: str,
        hemisphere: int,
        first: int,
        expr: Any,
        shape: tuple[int, int],
        take: Sequence[int] | None,
    ) -> Stored:
        """A table of f32 rows in one slice group (four byte planes from slice `first` on)."""
        name = (key, hemisphere, first)
        if name not in self.stored:
            units = mem(hemisphere, first, 4)
            stored = self.storage.store(key, F32, shape[0], units)
            lanes = None if take is None else self.constant(f"lanes/{key}", np.array(take, np.int64))
            layout = {"kind": "rows", "dtype": "f32", "ways": 1, "axes": None, "row_axes": 1, "take": lanes}
            kind: PortKind = "weight" if _reads_weight(expr) else "constant"
            self.storage.port(
                f"{key}@{'ew'[hemisphere]}{first}", kind, "float32", shape, stored, layout, expr
            )
            self.stored[name] = [stored]
        return self.stored[name][0]

    def array(
        self,
        key: str,
        hemisphere: int,
        first: int,
        array: npt.NDArray[Any],
        type: int = F32,
        lanes: Sequence[int] | None = None,
    ) -> Stored:
        """A table from an array [rows, columns] kept in the schedule: f32 or i16, as `type` says.

        `lanes` gives the column of each lane (-1: zero); without it column c is lane c.
        """
        name = (key, hemisphere, first)
        if name not in self.stored:
            stored = self.storage.store(key, type, array.shape[0], mem(hemisphere, first, TYPE_BYTES[type]))
            take = None if lanes is None else self.constant(f"lanes/{key}", np.array(lanes, np.int64))
            kind, dtype = ("i16", "int16") if type == I16 else ("f32", "float32")
            layout = {"kind": "rows", "dtype": kind, "ways": 1, "axes": None, "row_axes": 1, "take": take}
            source = ["const", self.constant(f"{key}@{'ew'[hemisphere]}", array)]
            self.storage.port(
                f"{key}@{'ew'[hemisphere]}{first}", "constant", dtype, array.shape, stored, layout, source
            )
            self.stored[name] = [stored]
        return self.stored[name][0]

    def ones(self, width: int, hemisphere: int) -> Stored:
        """A tile of ones on the first `width` lanes: every output is the sum of the activation's lanes."""
        name = ("ones", hemisphere, width)
        if name not in self.stored:
            label = f"ones/{width}"
            stored = self.storage.store(label, F16, LANES, weight_units(hemisphere), ways=16)
            layout = {"kind": "rows", "dtype": "f16", "ways": 16, "axes": None, "row_axes": 1, "take": None}
            source = ["full", [LANES, width], "float32", 1.0]
            port = f"{label}@{'ew'[hemisphere]}"
            self.storage.port(port, "constant", "float32", (LANES, width), stored, layout, source)
            self.stored[name] = [stored]
        return self.stored[name][0]

    def rotary(
        self, key: str, rope: Rope, which: int, heads: HeadLayout, hemisphere: int, first: int, scale: float
    ) -> Stored:
        """Cosines (which = 0) or sines (1) of every position on the lanes of every head, times `scale`."""
        half = rope.rotary // 2
        context = self.decoder.context
        part = ["reshape", ["slice", self.weight(rope.table), 0, which, which + 1], [context, half]]
        rest = 1.0 if which == 0 else 0.0
        expr: Any = ["concat", [part, ["full", [context, 1], "float32", rest]], 1]
        factor = self.constant(f"scale/{key}", np.array([scale], np.float32))
        expr = ["mul", expr, ["const", factor]]
        take = [-1] * heads.lanes
        for h in range(heads.heads):
            for c in range(heads.dim):
                pair = c % half if rope.style == "half" else c // 2
                take[h * heads.stride + c] = pair if c < rope.rotary else half
        return self.table(key, hemisphere, first, expr, (context, half + 1), take)


def rotated(columns: Sequence[int], rope: Rope, heads: HeadLayout) -> tuple[list[int], list[float]]:
    """Columns and signs of the matrix that makes the rotated partner of every lane: rotation folded into
    weights.
    """
    half = rope.rotary // 2
    rows, signs = [-1] * len(columns), [0.0] * len(columns)
    for h in range(heads.heads):
        for c in range(rope.rotary):
            if rope.style == "half":
                partner, sign = (c + half, -1.0) if c < half else (c - half, 1.0)
            else:
                partner, sign = (c + 1, -1.0) if c % 2 == 0 else (c - 1, 1.0)
            lane = h * heads.stride + c
            rows[lane], signs[lane] = columns[h * heads.stride + partner], sign
    return rows, signs


def tile(name: str, stored: Stored, op: int) -> Tile:
    """The MXM use of a stored weight tile."""
    hemisphere = EAST if stored.units[0] < SLICES else WEST
    loads = tuple(
        tuple((stored, 16 * g + i, p) for p in (0, 1) for i in range(16)) for g in range(LOAD_GROUPS)
    )
    return Tile(name, hemisphere, loads, op)


def _reads_weight(expr: Any) -> bool:
    return isinstance(expr, list) and (expr[:1] == ["weight"] or any(_reads_weight(e) for e in expr))
