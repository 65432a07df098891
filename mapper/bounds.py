"""Lower bounds on the time of any schedule. A schedule that beats one is wrong; the ratio is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """No schedule of this graph on this machine is faster than `seconds`. `why` names the resource and its
    figures.
    """

    name: str
    seconds: float
    why: str


def tightest(bounds: Sequence[Bound]) -> Bound:
    """The largest lower bound. `bounds` must not be empty."""
    return max(bounds, key=lambda b: b.seconds)
