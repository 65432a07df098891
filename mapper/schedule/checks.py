"""The shared checks, and how to run them. Written without any knowledge of schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mapper.schedule.check_cover import CoversGraph
from mapper.schedule.check_dependence import DependenceHolds
from mapper.schedule.check_memory import CapacityFits, LifetimesDisjoint, WeightsIntact
from mapper.schedule.check_units import BandwidthHolds, UnitExclusive
from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Check, Violation

__all__ = [
    "SHARED",
    "BandwidthHolds",
    "CapacityFits",
    "Check",
    "CoversGraph",
    "DependenceHolds",
    "LifetimesDisjoint",
    "UnitExclusive",
    "Violation",
    "WeightsIntact",
    "each_check",
    "run_checks",
]

SHARED: tuple[Check, ...] = (
    CapacityFits(),
    UnitExclusive(),
    LifetimesDisjoint(),
    WeightsIntact(),
    DependenceHolds(),
    CoversGraph(),
    BandwidthHolds(),
)
"""Every schedule of every target must pass these. The first one makes the others safe to run."""


def run_checks(schedule: Schedule, extra: Sequence[Check] = ()) -> dict[str, list[Violation]]:
    """Violations by check name: the shared checks, then `extra`. Where something lies outside its buffer or
    memory, only `CapacityFits` runs, because the other checks rely on it."""
    return dict(each_check(schedule, extra))


def each_check(schedule: Schedule, extra: Sequence[Check] = ()) -> Iterator[tuple[str, list[Violation]]]:
    """As `run_checks`, one check at a time, for whom the first failure is enough."""
    for check in (*SHARED, *extra):
        found = _run(check, schedule)
        yield check.name, found
        if check.name == "CapacityFits" and found:
            break


def _run(check: Check, schedule: Schedule) -> list[Violation]:
    try:
        return check.run(schedule)
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        # a plan or immediates that a check cannot make sense of are no legal schedule
        return [Violation(f"the schedule makes no sense to this check: {type(error).__name__}: {error}")]
