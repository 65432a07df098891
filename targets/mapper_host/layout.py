"""Addresses for temporaries: values whose lifetimes do not overlap may share bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 64


@dataclass(frozen=True)
class Interval:
    """A temporary: its size, and the first and last step position at which it is in use."""

    bytes: int
    first: int
    last: int


def aligned(size: int) -> int:
    """`size` rounded up to whole cache lines."""
    return -(-size // ALIGN) * ALIGN


def place(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """An offset for each interval, and the bytes used: first fit in order of first use, larger ones first."""
    offsets = [0] * len(intervals)
    alive: list[tuple[int, int, int]] = []  # (offset, end, last), sorted by offset
    top = 0
    for i in sorted(range(len(intervals)), key=lambda i: (intervals[i].first, -intervals[i].bytes, i)):
        item = intervals[i]
        alive = [a for a in alive if a[2] >= item.first]
        at, size = 0, aligned(item.bytes)
        for offset, end, _ in alive:
            if offset - at >= size:
                break
            at = max(at, end)
        offsets[i] = at
        alive.append((at, at + size, item.last))
        alive.sort()
        top = max(top, at + size)
    return offsets, top
