"""Which bytes of a memory hold something."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault

Flags = npt.NDArray[np.bool_]


class Written:
    """The bytes of a memory that have been written, at first none: sorted intervals, so that gigabytes of
    weights cost a few numbers.

    By index it reads and is set like an array of one flag per byte. A target whose compiled code keeps such
    an array itself asks for `flags`; from then on that array is what counts.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ends: list[int] = []  # first byte and end of each interval in turn, strictly ascending
        self._flags: Flags | None = None

    def __len__(self) -> int:
        return self._size

    def add(self, low: int, high: int) -> None:
        """Mark bytes [low, high) as written."""
        if self._flags is not None:
            self._flags[low:high] = True
        elif low < high:
            self._replace(low, high, 0)

    def remove(self, low: int, high: int) -> list[tuple[int, int]]:
        """Mark bytes [low, high) as not written; the intervals in it that may have been."""
        if low >= high:
            return []
        if self._flags is not None:
            self._flags[low:high] = False
            return [(low, high)]
        i, j = bisect_right(self._ends, low), bisect_left(self._ends, high)
        cut = ([low] if i % 2 else []) + self._ends[i:j] + ([high] if j % 2 else [])
        self._replace(low, high, 1)
        return list(zip(cut[::2], cut[1::2], strict=True))

    def _replace(self, low: int, high: int, odd: int) -> None:
        i, j = bisect_left(self._ends, low), bisect_right(self._ends, high)
        self._ends[i:j] = ([low] if i % 2 == odd else []) + ([high] if j % 2 == odd else [])

    def missing(self, low: int, high: int) -> int | None:
        """The first byte of [low, high) that has not been written; None where all have."""
        if low >= high:
            return None
        if self._flags is not None:
            part = self._flags[low:high]
            return None if part.all() else low + int(np.argmin(part))
        i = bisect_right(self._ends, low)
        if i % 2 == 0:
            return low
        return None if self._ends[i] >= high else self._ends[i]

    def flags(self) -> Flags:
        """One flag per byte, to be read and written in place."""
        if self._flags is None:
            self._flags = self[:]
            self._ends.clear()
        return self._flags

    def copy(self) -> Written:
        """The same bytes, marked apart."""
        made = Written(self._size)
        made._ends = self._ends.copy()
        made._flags = None if self._flags is None else self._flags.copy()
        return made

    def __getitem__(self, part: slice) -> Flags:
        low, high = self._bounds(part)
        if self._flags is not None:
            return self._flags[low:high].copy()
        found = np.zeros(max(high - low, 0), np.bool_)
        i, j = bisect_right(self._ends, low), bisect_left(self._ends, high)
        cut = ([low] if i % 2 else []) + self._ends[i:j] + ([high] if j % 2 else [])
        for a, b in zip(cut[::2], cut[1::2], strict=True):
            found[a - low : b - low] = True
        return found

    def __setitem__(self, part: slice, value: bool) -> None:
        low, high = self._bounds(part)
        if value:
            self.add(low, high)
        else:
            self.remove(low, high)

    def _bounds(self, part: slice) -> tuple[int, int]:
        low, high, step = part.indices(self._size)
        if step != 1:
            raise ValueError("written bytes are marked in runs of neighbours")
        return low, high


def require_written(written: Written, low: int, high: int, what: str) -> None:
    """Raises ExecutionFault, naming `what` and the byte, where a byte of [low, high) has not been written."""
    at = written.missing(low, high)
    if at is not None:
        raise ExecutionFault(f"{what}: byte {at} is read and was never written")
