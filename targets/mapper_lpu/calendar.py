"""The resource calendar of space-time scheduling: which queue and which stream diagonal is taken when.

Every resource is a bitmap over cycles, kept as one Python integer, so a conflict test is a shift and an AND.
A stream value occupies one diagonal; in the coordinate "cycle at which the diagonal passes x = 0" a diagonal
is one bit, the same at every position, so a value is one bit per (zone of the chip, direction, stream). A
zone is a range of positions: weights that are loaded from the outer slices leave the inner ones free for what
the VXM writes there. With a period the calendar is a modulo reservation table (Rau, iterative modulo
scheduling, MICRO-27, 1994).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mapper_lpu.isa import STREAMS, UNITS

_OFFSET = 1 << 12  # absolute bitmaps hold cycles from -_OFFSET on: software pipelining issues before cycle 0


def queue(unit: int) -> int:
    """Key of a unit's instruction queue."""
    return unit


INNER_EDGE = 3
"""Positions 1..INNER_EDGE of a hemisphere are its inner zone (slices 0..11), the rest the outer one."""


def span(hemisphere: int, direction: int, stream: int, near: int, far: int) -> list[int]:
    """Keys of the zones that a value passes on its way between the positions |x| = near and far."""
    base = len(UNITS) + (hemisphere * 4 + direction * 2) * STREAMS + stream
    return [
        base + zone * STREAMS for zone in (0, 1) if (near <= INNER_EDGE if zone == 0 else far > INNER_EDGE)
    ]


def centre(direction: int, stream: int) -> int:
    """Key of a stream at x = 0."""
    return len(UNITS) + 8 * STREAMS + direction * STREAMS + stream


@dataclass(frozen=True)
class Use:
    """`key` is taken in the cycles t + offset + i for every set bit i of `mask`; t is where the user is
    placed.
    """

    key: int
    offset: int
    mask: int


def merge(raw: Iterable[tuple[int, int]]) -> list[Use] | None:
    """Uses from (key, cycle) pairs. None where one key is taken twice in a cycle: never placeable."""
    cycles: dict[int, list[int]] = {}
    for key, cycle in raw:
        cycles.setdefault(key, []).append(cycle)
    uses = []
    for key, times in cycles.items():
        low = min(times)
        mask = 0
        for time in times:
            bit = 1 << (time - low)
            if mask & bit:
                return None
            mask |= bit
        uses.append(Use(key, low, mask))
    return uses


class Calendar:
    """Bitmaps of taken cycles per resource key, absolute (period None) or modulo `period`."""

    def __init__(self, period: int | None = None) -> None:
        self.period = period
        self.busy: dict[int, int] = {}
        self._folded: dict[int, tuple[Sequence[Use], list[Use] | None]] = {}

    def fold(self, uses: Sequence[Use]) -> Sequence[Use] | None:
        """Uses with masks folded to the period; None where a use meets itself in another iteration."""
        if self.period is None:
            return uses
        if id(uses) not in self._folded:
            self._folded[id(uses)] = (uses, self._fold(uses, self.period))
        return self._folded[id(uses)][1]

    @staticmethod
    def _fold(uses: Sequence[Use], period: int) -> list[Use] | None:
        full = (1 << period) - 1
        folded = []
        for use in uses:
            mask, rest = use.mask & full, use.mask >> period
            while rest:
                if mask & rest & full:
                    return None
                mask |= rest & full
                rest >>= period
            folded.append(Use(use.key, use.offset, mask))
        return folded

    def _bits(self, use: Use, cycle: int) -> int:
        start = cycle + use.offset
        if self.period is None:
            return use.mask << (start + _OFFSET)
        turn = start % self.period
        wide = use.mask << turn
        return (wide | (wide >> self.period)) & ((1 << self.period) - 1)

    def fits(self, uses: Sequence[Use], cycle: int) -> bool:
        """Whether all uses (folded) are free with their user placed at `cycle`."""
        busy = self.busy
        for use in uses:
            taken = busy.get(use.key)
            if taken and taken & self._bits(use, cycle):
                return False
        return True

    def take(self, uses: Sequence[Use], cycle: int) -> None:
        """Mark the uses as taken."""
        for use in uses:
            self.busy[use.key] = self.busy.get(use.key, 0) | self._bits(use, cycle)

    def _blocked(self, uses: Sequence[Use], low: int, span: int) -> int:
        """Bit k is set where the uses (folded) do not all fit at cycle low + k, k < span."""
        blocked = 0
        for use in uses:
            taken = self.busy.get(use.key)
            if not taken:
                continue
            at = low + use.offset
            if self.period is None:
                at += _OFFSET
            else:
                at %= self.period
                repeats = -(-(at + span + use.mask.bit_length()) // self.period)
                have = 1
                while have < repeats:
                    taken |= taken << (self.period * have)
                    have *= 2
            blocked |= _smeared(taken, use.mask) >> at if at >= 0 else _smeared(taken, use.mask) << -at
        return blocked & ((1 << span) - 1)

    def earliest(self, uses: Sequence[Use], low: int, limit: int = 4000) -> int | None:
        """The first cycle >= low at which the uses fit, within `limit` cycles; None where there is none."""
        folded = self.fold(uses)
        if folded is None:
            return None
        span = limit if self.period is None else min(limit, self.period)
        free = ~self._blocked(folded, low, span) & ((1 << span) - 1)
        return low + (free & -free).bit_length() - 1 if free else None

    def latest(self, uses: Sequence[Use], high: int, limit: int = 4000) -> int | None:
        """The last cycle <= high at which the uses fit, within `limit` cycles; None where there is none."""
        folded = self.fold(uses)
        if folded is None:
            return None
        span = limit if self.period is None else min(limit, self.period)
        low = high - span + 1
        free = ~self._blocked(folded, low, span) & ((1 << span) - 1)
        return low + free.bit_length() - 1 if free else None


def _smeared(taken: int, mask: int) -> int:
    """Bit t is set where taken & (mask << t) is not 0: `taken` moved down by every set bit of the mask."""
    result, at = 0, 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask, at = mask >> skip, at + skip
        run = (~mask & (mask + 1)).bit_length() - 1  # length of the run of ones
        part, have = taken >> at, 1
        while have < run:
            step = min(have, run - have)
            part |= part >> step
            have += step
        result |= part
        mask, at = mask >> run, at + run
    return result
