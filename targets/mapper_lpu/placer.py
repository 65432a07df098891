"""Placing chains and weight loads in time: each at the first cycle at which its operands exist and all is free.

A placer works in one frame: a whole program (absolute calendar), or one iteration of a repeated body (modulo calendar).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mapper.errors import LoweringError
from mapper_lpu import calendar
from mapper_lpu.calendar import Calendar
from mapper_lpu.chain import Chain, Tile
from mapper_lpu.storage import Stored
from mapper_lpu.template import Instruction, Latencies, Template, build, distance, unit

ALTERNATIVES = 3
_LONG_AGO = -(1 << 40)


LoadPiece = tuple[list[calendar.Use], list[Instruction]]


@dataclass
class Placed:
    """One placed piece, kept for retiming and traces: name, start, and what it waited for."""

    name: str
    start: int
    end: int
    low: int  # first cycle that its operands allowed
    waits: str  # the piece that made the last operand, or the tile


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
        self.current: dict[int, Tile | None] = {0: None, 1: None}
        self.first_tile: dict[int, Tile] = {}
        self.taken: list[tuple[list[calendar.Use], int]] = []
        self.templates: list[tuple[Template, int]] = []
        self.maker: dict[tuple[int, int], str] = {}

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions at the cycles of the frame."""
        return [replace(i, cycle=i.cycle + cycle) for made, cycle in self.pieces for i in made]

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
        self._commit(template, cycle, low)
        return cycle

    def _low(self, template: Template) -> int:
        low = 0
        if self.floor is not None:
            low = self.floor - min(i.cycle for i in template.instructions)
        for stored, row, relative in template.reads:
            low = max(low, stored.ready.get(row, _LONG_AGO) - relative)
        for tile, relative in template.activations:
            if tile.installed is not None:
                low = max(low, tile.installed + self.lat.install - relative)
        return low

    def _commit(self, template: Template, cycle: int, low: int) -> None:
        self.take(template.uses, cycle)
        self.templates.append((template, cycle))
        end = cycle
        waits = ""
        for stored, row, relative in template.reads:
            if stored.ready.get(row, _LONG_AGO) - relative == low:
                waits = self.maker.get((id(stored), row), stored.name)
            stored.last[row] = max(stored.last.get(row, _LONG_AGO), cycle + relative)
        for stored, row, relative in template.writes:
            stored.ready[row] = cycle + relative + 1
            stored.written[row] = cycle + relative
            self.maker[(id(stored), row)] = template.chain.name
        for tile, relative in template.activations:
            tile.last_activation = max(tile.last_activation, cycle + relative)
            tile.first_activation = min(tile.first_activation, cycle + relative)
            if tile.installed is not None and tile.installed + self.lat.install - relative == low:
                waits = f"install of {tile.name}"
        for instruction in template.instructions:
            end = max(end, instruction.cycle + cycle)
        self.pieces.append((template.instructions, cycle))
        self.placed.append(Placed(template.chain.name, cycle, end, low, waits))

    def load(self, tile: Tile) -> None:
        """Place the loads of a tile after the tile before it on the same MXM, as early as possible, and install it."""
        before = self.current[tile.hemisphere]
        if before is None:
            raise LoweringError(f"{tile.name}: the first tile of a frame is placed by load_before")
        assert before.installed is not None
        low = before.installed + self.lat.install
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
        high = max(at, before.last_activation - self.lat.install + 1)
        self._install(tile, min(cycles), self._free_install(tile, high))

    def load_before(self, tile: Tile, deadline: int) -> None:
        """Place the loads of the first tile of a frame as late as they can be for an activation at `deadline`."""
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
        for stored, row, plane in tile.loads[group]:
            if row in stored.ready:
                number, _, _ = stored.place(row, plane)
                low = max(low, stored.ready[row] + self.lat.read + self.lat.edge - distance(number))
        return low

    def _streams(self, tile: Tile, group: int) -> Iterator[tuple[int, Stored, int, int]]:
        """(stream, value, row, byte plane) of one load group."""
        for index, (stored, row, byte) in enumerate(tile.loads[group]):
            yield 16 * tile.planes[index // 16] + index % 16, stored, row, byte

    def _load_piece(self, tile: Tile, group: int) -> LoadPiece:
        """Uses and instructions of one load cycle, relative to the cycle of the load at the MXM; kept per tile."""
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
        return uses, made

    def _load_group(self, tile: Tile, group: int, piece: LoadPiece, cycle: int) -> None:
        uses, made = piece
        self.take(uses, cycle)
        self.pieces.append((made, cycle))
        for _, stored, row, byte in self._streams(tile, group):
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
        self.current[tile.hemisphere] = tile
        self.first_tile.setdefault(tile.hemisphere, tile)
        self.placed.append(Placed(f"load {tile.name}", first, at, first, ""))
