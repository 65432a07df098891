"""Placing chains and weight loads in time: each at the first cycle at which its operands exist and all is
free.

A placer works in one frame: a whole program (absolute calendar), or one iteration of a repeated body (modulo
calendar).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mapper.errors import LoweringError
from mapper_lpu import calendar
from mapper_lpu.calendar import Calendar
from mapper_lpu.chain import Chain, Tile
from mapper_lpu.instruction import CONSTANTS, Form, Instruction, Latencies, Template, distance, form, unit
from mapper_lpu.storage import Stored
from mapper_lpu.template import build

ALTERNATIVES = 3
_LONG_AGO = -(1 << 40)


ZERO: Form = (0,) * len(CONSTANTS)
INSTALL = form(mxm_install=1)
LOADED = form(mem_read=1, sxm_crossing=1)


def plus(a: Form, b: Form) -> Form:
    """Sum of two forms."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def minus(a: Form, b: Form) -> Form:
    """Difference of two forms."""
    return tuple(x - y for x, y in zip(a, b, strict=True))


Plane = tuple[int, int]
"""An MXM plane: (hemisphere, plane)."""


def planes(tile: Tile) -> list[Plane]:
    """The MXM planes that a tile takes."""
    return [(tile.hemisphere, plane) for plane in tile.planes]


LoadPiece = tuple[list[calendar.Use], list[Instruction], list[tuple[Stored, int, int]]]
"""One load cycle: uses, instructions, and (value, row, byte plane) of what chains have made."""


@dataclass
class Placed:
    """One placed piece, for retiming and for explaining: its start may not be before start of piece p + lag.

    `after` maps p (-1: cycle 0 of the frame, when x is ready) to (lag in cycles, form of the lag). A load's
    start is its install. `end` is the cycle after its last effect.
    """

    name: str
    start: int
    end: int
    after: dict[int, tuple[int, Form]] = field(default_factory=dict)

    def wait(self, piece: int, lag: int, form: Form) -> None:
        """Record that this piece starts at least `lag` cycles after `piece`."""
        if piece not in self.after or lag > self.after[piece][0]:
            self.after[piece] = (lag, form)


@dataclass
class TemplateCache:
    """Templates of chains and loads of tiles by object, kept for the attempts at other periods."""

    latencies: Latencies
    built: dict[tuple[int, int], Template | None] = field(default_factory=dict)
    keep: list[Chain] = field(default_factory=list)
    loads: dict[tuple[int, int], LoadPiece] = field(default_factory=dict)
    tiles: list[Tile] = field(default_factory=list)

    def get(self, chain: Chain, seed: int) -> Template | None:
        """The template of `chain` for `seed`, or None."""
        key = (id(chain), seed)
        if key not in self.built:
            self.built[key] = build(chain, self.latencies, seed)
            self.keep.append(chain)
        return self.built[key]


class PeriodTooShort(Exception):
    """A piece finds no place in a modulo calendar of this period."""


class Placer:
    """Places pieces on a calendar; collects absolute instructions of its frame."""

    def __init__(self, grid: Calendar, cache: TemplateCache, floor: int | None = None) -> None:
        self.calendar, self.cache, self.floor = grid, cache, floor
        self.lat = cache.latencies
        self.pieces: list[tuple[Sequence[Instruction], int]] = []
        self.placed: list[Placed] = []
        self.current: dict[Plane, Tile] = {}  # the tile installed last per MXM plane
        self.first_tile: dict[Plane, Tile] = {}
        self.taken: list[tuple[list[calendar.Use], int]] = []
        self.templates: list[tuple[Template, int]] = []
        self.maker: dict[tuple[int, int], tuple[int, int, Form]] = {}  # (value, row) -> piece, lag, form
        self.installer: dict[int, int] = {}  # tile -> piece
        self.last_use: dict[
            int, tuple[int, int, Form]
        ] = {}  # tile -> piece, lag, form of its last activation

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions at the cycles of the frame."""
        return [i.at(cycle) for made, cycle in self.pieces for i in made]

    def take(self, uses: list[calendar.Use], cycle: int) -> None:
        """Reserve the uses at `cycle`."""
        folded = self.calendar.fold(uses)
        assert folded is not None
        self.calendar.take(folded, cycle)
        self.taken.append((uses, cycle))

    def chain(self, chain: Chain) -> int:
        """Place a chain (its tiles' loads must be placed, except the first of a frame). Returns its start."""
        best: tuple[int, int, Template] | None = None
        for seed in range(ALTERNATIVES):
            template = self.cache.get(chain, seed)
            if template is None:
                continue
            low = self._low(template)
            cycle = self.calendar.earliest(template.uses, low)
            if cycle is not None and (best is None or cycle < best[0]):
                best = (cycle, low, template)
            if best is not None and best[0] == best[1]:
                break
        if best is None:
            if self.calendar.period is not None:
                raise PeriodTooShort(chain.name)
            raise LoweringError(f"{chain.name}: no assignment of VXM units and streams found")
        cycle, low, template = best
        self._commit(template, cycle)
        return cycle

    def _low(self, template: Template) -> int:
        low = 0
        if self.floor is not None:
            low = self.floor - min(i.cycle for i in template.instructions)
        for stored, row, relative, _ in template.reads:
            low = max(low, stored.ready.get(row, _LONG_AGO) - relative)
        for tile, relative, _ in template.activations:
            if tile.installed is not None:
                low = max(low, tile.installed + self.lat.install - relative)
        return low

    def _commit(self, template: Template, cycle: int) -> None:
        self.take(template.uses, cycle)
        self.templates.append((template, cycle))
        self.pieces.append((template.instructions, cycle))
        number = len(self.placed)
        end = max(i.cycle + i.duration for i in template.instructions) + cycle
        placed = Placed(template.chain.name, cycle, end)
        self.placed.append(placed)
        for stored, row, relative, form_of in template.reads:
            if row in stored.ready:
                piece, lag, made = self.maker.get((id(stored), row), (-1, stored.ready[row], ZERO))
                placed.wait(piece, lag - relative, minus(made, form_of))
            stored.last[row] = max(stored.last.get(row, _LONG_AGO), cycle + relative)
        for tile, relative, form_of in template.activations:
            if tile.installed is not None:
                placed.wait(self.installer[id(tile)], self.lat.install - relative, minus(INSTALL, form_of))
            if cycle + relative >= tile.last_activation:
                self.last_use[id(tile)] = (number, relative, form_of)
            tile.last_activation = max(tile.last_activation, cycle + relative)
            tile.first_activation = min(tile.first_activation, cycle + relative)
        for stored, row, relative, form_of in template.writes:
            stored.ready[row] = cycle + relative + 1
            stored.written[row] = cycle + relative
            self.maker[(id(stored), row)] = (number, relative + 1, form_of)

    def load(self, tile: Tile) -> None:
        """Place the loads of a tile after the tile before it on the same MXM, as early as possible, and
        install it.
        """
        before = list(
            {id(t): t for t in (self.current.get(p) for p in planes(tile)) if t is not None}.values()
        )
        # without a tile before it, the first reads may be issued in cycle 0
        low = self.lat.edge + self.lat.read
        if before:
            low = max(t.installed + self.lat.install for t in before if t.installed is not None)
        elif self.floor is None:
            raise LoweringError(f"{tile.name}: the first tile of a frame is placed by load_before")
        cycles = []
        at = low
        for group in range(len(tile.loads)):
            piece = self._load_piece(tile, group)
            found = self.calendar.earliest(piece[0], max(low, self._rows_ready(tile, group)))
            if found is None:
                raise PeriodTooShort(tile.name)
            self._load_group(tile, group, piece, found)
            cycles.append(found)
            at = max(at, found + 1)
        high = max([at, *(t.last_activation - self.lat.install + 1 for t in before)])
        self._install(tile, min(cycles), self._free_install(tile, high))
        for other in before:
            self._load_waits(tile, other)

    def _load_waits(self, tile: Tile, before: Tile) -> None:
        """What the install of a tile waited for: the tile before it, its last activation, rows made by
        chains.
        """
        placed = self.placed[-1]
        groups = len(tile.loads)
        placed.wait(self.installer.get(id(before), -1), self.lat.install + groups, INSTALL)
        if id(before) in self.last_use:
            piece, lag, made = self.last_use[id(before)]
            placed.wait(piece, lag - self.lat.install + 1, minus(made, INSTALL))
        for group in range(groups):
            for stored, row, byte in self._load_piece(tile, group)[2]:
                if (id(stored), row) in self.maker:
                    piece, lag, made = self.maker[(id(stored), row)]
                    number, _, _ = stored.place(row, byte)
                    travel = self.lat.read + self.lat.edge - distance(number)
                    placed.wait(piece, lag + travel + groups, plus(made, LOADED))

    def load_before(self, tile: Tile, deadline: int) -> None:
        """Place the loads of the first tile of a frame as late as they can be for an activation at
        `deadline`.
        """
        uses = calendar.merge(self._install_raw(tile))
        assert uses is not None
        at = self.calendar.latest(uses, deadline - self.lat.install)
        if at is None:
            raise PeriodTooShort(tile.name)
        first = at
        high = at - 1
        for group in range(len(tile.loads)):
            piece = self._load_piece(tile, group)
            found = self.calendar.latest(piece[0], high)
            if found is None:
                raise PeriodTooShort(tile.name)
            self._load_group(tile, group, piece, found)
            first = min(first, found)
        self._install(tile, first, at)

    def _rows_ready(self, tile: Tile, group: int) -> int:
        low = _LONG_AGO
        for stored, row, plane in self._load_piece(tile, group)[2]:
            if row in stored.ready:
                number, _, _ = stored.place(row, plane)
                low = max(low, stored.ready[row] + self.lat.read + self.lat.edge - distance(number))
        return low

    def _streams(self, tile: Tile, group: int) -> Iterator[tuple[int, Stored, int, int]]:
        """(stream, value, row, byte plane) of one load group."""
        for index, (stored, row, byte) in enumerate(tile.loads[group]):
            yield 16 * tile.planes[index // 16] + index % 16, stored, row, byte

    def _load_piece(self, tile: Tile, group: int) -> LoadPiece:
        """Uses and instructions of one load cycle, relative to the cycle of the load at the MXM; kept per
        tile.
        """
        key = (id(tile), group)
        if key not in self.cache.loads:
            self.cache.loads[key] = self._make_load(tile, group)
            self.cache.tiles.append(tile)
        return self.cache.loads[key]

    def _make_load(self, tile: Tile, group: int) -> LoadPiece:
        side = tile.hemisphere
        raw: list[tuple[int, int]] = []
        made: list[Instruction] = []
        for plane in tile.planes:
            name = unit(f"mxm.{'ew'[side]}.{plane}.load")
            raw.append((calendar.queue(name), 0))
            made.append(Instruction(0, name, "mxm.load", (group, 16 * plane), tile.op))
        for stream, stored, row, byte in self._streams(tile, group):
            number, buffer, inside = stored.place(row, byte)
            at = distance(number) - self.lat.edge - self.lat.read
            raw.append((calendar.queue(number), at))
            keys = calendar.span(side, side, stream, distance(number), self.lat.edge)
            raw += [(key, -self.lat.edge) for key in keys]
            made.append(Instruction(at, number, "mem.read", (side, stream), tile.op, 1, buffer, inside))
        uses = calendar.merge(raw)
        if uses is None:
            raise LoweringError(f"{tile.name}: two weight streams read one slice")
        return uses, made, [part for part in tile.loads[group] if part[0].temporary]

    def _load_group(self, tile: Tile, group: int, piece: LoadPiece, cycle: int) -> None:
        uses, made, rows = piece
        self.take(uses, cycle)
        self.pieces.append((made, cycle))
        for stored, row, byte in rows:
            number, _, _ = stored.place(row, byte)
            at = cycle + distance(number) - self.lat.edge - self.lat.read
            stored.last[row] = max(stored.last.get(row, _LONG_AGO), at)

    def _install_raw(self, tile: Tile) -> list[tuple[int, int]]:
        side = "ew"[tile.hemisphere]
        return [
            (calendar.queue(unit(f"mxm.{side}.{p}.load")), c)
            for p in tile.planes
            for c in range(self.lat.install)
        ]

    def _free_install(self, tile: Tile, low: int) -> int:
        uses = calendar.merge(self._install_raw(tile))
        assert uses is not None
        at = self.calendar.earliest(uses, low)
        if at is None:
            raise PeriodTooShort(tile.name)
        return at

    def _install(self, tile: Tile, first: int, at: int) -> None:
        uses = calendar.merge(self._install_raw(tile))
        assert uses is not None
        self.take(uses, at)
        names = [unit(f"mxm.{'ew'[tile.hemisphere]}.{plane}.load") for plane in tile.planes]
        made = [Instruction(0, n, "mxm.install", (), tile.op, duration=self.lat.install) for n in names]
        self.pieces.append((made, at))
        tile.installed = at
        tile.first_load = first
        for plane in planes(tile):
            self.current[plane] = tile
            self.first_tile.setdefault(plane, tile)
        self.installer[id(tile)] = len(self.placed)
        self.placed.append(Placed(f"load {tile.name}", at, at + self.lat.install))
