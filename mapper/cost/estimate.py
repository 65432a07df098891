"""The result record of a compilation: times, bands and bounds per phase, checks, where the schedule is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mapper.backend import Explains, Finding
from mapper.bounds import Bound, tightest
from mapper.cost.bands import Influence, Retimes, bands
from mapper.errors import ScheduleError
from mapper.machine import Machine

if TYPE_CHECKING:
    from mapper.schedule.tables import Phase, Program, Schedule


@dataclass(frozen=True)
class UnitLoad:
    """How busy one unit is: `share` of the program's cycles in which it runs a step."""

    unit: str
    share: float
    steps: int


@dataclass(frozen=True)
class Estimate:
    """One phase. Times in seconds of one run: one decode step at full context, or a whole prompt in prefill.

    `tokens` is how many tokens per sequence one run yields or consumes; `findings` are tables of the target.
    """

    time_s: float
    low_s: float
    high_s: float
    bound: Bound
    batch: int
    tokens: int
    steps: int
    influences: tuple[Influence, ...]
    loads: tuple[UnitLoad, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def ratio(self) -> float:
        """Schedule time over the tightest lower bound; below 1 is a bug."""
        return self.time_s / self.bound.seconds if self.bound.seconds else 0.0

    def record(self) -> dict[str, Any]:
        """The stable JSON record of a phase."""
        per_user = self.tokens / self.time_s if self.time_s else 0.0
        return {
            "time_s": self.time_s,
            "low_s": self.low_s,
            "high_s": self.high_s,
            "bound_s": self.bound.seconds,
            "bound_name": self.bound.name,
            "ratio": self.ratio,
            "tokens_per_s_per_user": per_user,
            "tokens_per_s": per_user * self.batch,
            "steps": self.steps,
        }

    def explanation(self, top: int) -> dict[str, Any]:
        """The JSON record of `mapper explain`: what the time comes from, `top` rows per list."""
        return {
            "time_s": self.time_s,
            "low_s": self.low_s,
            "high_s": self.high_s,
            "bound": {
                "name": self.bound.name,
                "seconds": self.bound.seconds,
                "why": self.bound.why,
                "ratio": self.ratio,
            },
            "constants": [
                {"constant": i.key, "at_low_s": i.at_low_s, "at_high_s": i.at_high_s}
                for i in self.influences[:top]
            ],
            "units": [{"unit": u.unit, "share": u.share, "steps": u.steps} for u in self.loads[:top]],
            "findings": [f.record() for f in self.findings],
        }


@dataclass(frozen=True)
class Result:
    """What `mapper compile` says. `record()` has the stable JSON keys; other tools are built on them."""

    target: str
    machine: str
    chips: int
    params: int
    layers: int
    phases: Mapping[str, Estimate]
    checks: Mapping[str, bool]
    schedule_dir: str | None
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The JSON of `mapper compile --json`."""
        return {
            "target": self.target,
            "machine": self.machine,
            "chips": self.chips,
            "model": {"params": self.params, "layers": self.layers},
            "phases": {name: e.record() for name, e in self.phases.items()},
            "checks": dict(self.checks),
            "schedule_dir": self.schedule_dir,
        }


def loads(schedule: Schedule, program: Program) -> tuple[UnitLoad, ...]:
    """The load of each unit that `program` uses, busiest first. Overlapping steps of one unit count twice."""
    busy = np.zeros(len(schedule.units), np.int64)
    count = np.zeros(len(schedule.units), np.int64)
    for block in program.blocks:
        unit = block.steps.column("unit")
        np.add.at(busy, unit, block.steps.column("duration") * block.repeat)
        np.add.at(count, unit, block.repeat)
    used = np.flatnonzero(count)
    order = used[np.lexsort((used, -busy[used]))]
    cycles = max(program.cycles, 1)
    return tuple(UnitLoad(schedule.units[u], float(busy[u]) / cycles, int(count[u])) for u in order)


def step_count(program: Program) -> int:
    """Steps that one run of `program` executes."""
    return sum(len(block.steps) * block.repeat for block in program.blocks)


def with_bounds(schedule: Schedule, bounds: Mapping[Phase, Sequence[Bound]]) -> Schedule:
    """The schedule with its bounds on record: they come from the graph, which a schedule does not hold."""
    record = {
        phase: [{"name": b.name, "seconds": b.seconds, "why": b.why} for b in found]
        for phase, found in bounds.items()
    }
    return replace(schedule, provenance={**(schedule.provenance or {}), "bounds": record})


def bounds_of(schedule: Schedule) -> dict[str, tuple[Bound, ...]]:
    """The lower bounds on record. Raises ScheduleError where there are none."""
    try:
        record = schedule.provenance["bounds"]
        return {phase: tuple(Bound(**b) for b in found) for phase, found in record.items()}
    except (TypeError, KeyError) as error:
        raise ScheduleError("the schedule holds no bounds; it was not made by mapper.compile") from error


def result(backend: Retimes, schedule: Schedule, machine: Machine, checks: Mapping[str, bool]) -> Result:
    """What there is to say of a schedule that holds its bounds."""
    bounds = bounds_of(schedule)
    findings = backend.explain(schedule, machine) if isinstance(backend, Explains) else {}
    phases: dict[str, Estimate] = {}
    for phase, band in sorted(bands(backend, schedule, machine).items()):
        program = schedule.programs[phase]
        phases[phase] = Estimate(
            time_s=band.time_s,
            low_s=band.low_s,
            high_s=band.high_s,
            bound=tightest(bounds[phase]),
            batch=schedule.request.batch,
            tokens=program.sequence,
            steps=step_count(program),
            influences=band.influences,
            loads=loads(schedule, program),
            findings=tuple(findings.get(phase, ())),
        )
    model = schedule.model
    return Result(
        target=schedule.target,
        machine=schedule.machine,
        chips=schedule.chips,
        params=model.params,
        layers=model.layers,
        phases=phases,
        checks=checks,
        schedule_dir=None,
    )
