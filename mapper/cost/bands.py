"""Uncertainty bands: how far a time moves when each machine constant goes to the ends of its range.

One constant at a time is set to its low and its high end and the schedule is timed again, its order and
placement kept. The deviations are taken as independent and summed in quadrature, apart for each direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mapper.machine import Machine

if TYPE_CHECKING:
    from mapper.schedule.tables import Phase, Schedule


class Retimes(Protocol):
    """The part of a backend that bands need."""

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        """Seconds per program with another machine's constants."""


@dataclass(frozen=True)
class Influence:
    """What one constant alone does to the time of a phase: seconds added at the ends of its range."""

    key: str
    at_low_s: float
    at_high_s: float

    @property
    def span_s(self) -> float:
        """The larger of the two deviations, in seconds, without sign."""
        return max(abs(self.at_low_s), abs(self.at_high_s))


@dataclass(frozen=True)
class Band:
    """The time of one run of a phase in seconds, its band, and the constants that move it, most first."""

    time_s: float
    low_s: float
    high_s: float
    influences: tuple[Influence, ...]


def bands(backend: Retimes, schedule: Schedule, machine: Machine) -> dict[Phase, Band]:
    """A band per phase of `schedule`. Raises MachineError where a constant's end of range means nothing."""
    nominal = backend.retime(schedule, machine)
    moved: dict[Phase, list[Influence]] = {phase: [] for phase in nominal}
    for key in machine.ranged():
        constant = machine.get(key)
        ends = [_at(backend, schedule, machine, key, v, nominal) for v in (constant.low, constant.high)]
        for phase, time in nominal.items():
            low, high = (end[phase] - time for end in ends)
            if low or high:
                moved[phase].append(Influence(key, low, high))
    return {phase: _band(time, moved[phase]) for phase, time in nominal.items()}


def _at(
    backend: Retimes,
    schedule: Schedule,
    machine: Machine,
    key: str,
    value: float,
    nominal: Mapping[Phase, float],
) -> Mapping[Phase, float]:
    if value == machine.value(key):
        return nominal
    return backend.retime(schedule, machine.replace({key: value}))


def _band(time: float, influences: list[Influence]) -> Band:
    deviations = [(i.at_low_s, i.at_high_s) for i in influences]
    faster = math.sqrt(sum(min(*d, 0.0) ** 2 for d in deviations))
    slower = math.sqrt(sum(max(*d, 0.0) ** 2 for d in deviations))
    order = sorted(influences, key=lambda i: (-i.span_s, i.key))
    return Band(time, max(time - faster, 0.0), time + slower, tuple(order))
