"""The whole flow: load -> lower -> check -> time -> save; on a saved schedule: check, execute, verify.

The driver is where the two pillars meet: it asks the frontend for a graph, a target's backend for a schedule,
and injects that backend's opcode semantics into the runtime. It knows no target by name but `host`, which
runs graphs. Heavy modules are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mapper import backend as targets
from mapper.bounds import Bound, tightest
from mapper.errors import CheckFailedError, ScheduleError, UsageError
from mapper.machine import Machine, find, parse, user_folder

if TYPE_CHECKING:
    from mapper.backend import Backend
    from mapper.cost.estimate import Estimate, Result
    from mapper.ir.graph import Graph
    from mapper.schedule.checks import Violation
    from mapper.schedule.tables import Phase, Request, Schedule

PhaseChoice = Literal["decode", "prefill", "both"]
HOST = "host"


@dataclass(frozen=True)
class CheckReport:
    """Outcome of all checks of a schedule: name -> violations (none where it holds). True where all hold."""

    violations: Mapping[str, tuple[Violation, ...]]

    @property
    def checks(self) -> dict[str, bool]:
        """Check name -> whether it holds."""
        return {name: not found for name, found in self.violations.items()}

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return not any(self.violations.values())

    def __bool__(self) -> bool:
        return self.ok

    def raise_first(self) -> None:
        """Raise CheckFailedError for the first violation, if there is one."""
        for name, found in self.violations.items():
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                raise CheckFailedError(f"{name}: {found[0].message}{more}")


@dataclass(frozen=True)
class Compiled:
    """A schedule with what is said of it. `result.schedule_dir` is None where nothing was saved."""

    schedule: Schedule
    report: CheckReport
    result: Result


def load(path: str | Path) -> Graph:
    """The graph of an ONNX file. Raises ModelError, UnsupportedModelError."""
    from mapper.frontend import load as load_onnx

    return load_onnx(path)


def compile(
    model: str | Path | Graph,
    target: str = "lpu",
    *,
    machine: str | Path | Machine | None = None,
    batch: int = 1,
    context: int = 128,
    prompt: int = 16,
    weights: str | None = None,
    chips: int | None = 1,
    phase: PhaseChoice = "both",
    out: str | Path | None = None,
) -> Schedule:
    """Map a model (path or graph) onto a target; save the schedule in directory `out` where one is given.

    `weights` None is the target's widest native matmul format; `chips` None lets the target choose. Raises
    MapperError: UsageError, ModelError, CapacityError, LoweringError..., CheckFailedError for an illegal
    schedule (which is never saved).
    """
    done = build(
        model, target, machine=machine, batch=batch, context=context, prompt=prompt,
        weights=weights, chips=chips, phase=phase, out=out,
    )  # fmt: skip
    done.report.raise_first()
    return done.schedule


def build(
    model: str | Path | Graph,
    target: str = "lpu",
    *,
    machine: str | Path | Machine | None = None,
    batch: int = 1,
    context: int = 128,
    prompt: int = 16,
    weights: str | None = None,
    chips: int | None = 1,
    phase: PhaseChoice = "both",
    out: str | Path | None = None,
) -> Compiled:
    """Like `compile`, with checks, times, bands and bounds; a failed check is reported, not raised."""
    backend = targets.load(target)
    chip = _machine(backend, machine)
    request = _request(phase, batch, context, prompt, weights, chips)
    folder = _free(out)
    graph = load(model) if isinstance(model, str | Path) else model
    bounds = backend.bounds(graph, chip, request)
    schedule = _noted(backend.lower(graph, chip, request), bounds)
    report = _check(backend, schedule)
    result = _result(backend, schedule, chip, report)
    if folder is not None and report.ok:
        from mapper.schedule.store import save

        save(schedule, folder, backend.artifacts(schedule))
        result = replace(result, schedule_dir=str(out))
    return Compiled(schedule, report, result)


def check(schedule_dir: str | Path) -> CheckReport:
    """Run the shared checks and the target's own on a schedule on disk. Raises ScheduleError."""
    schedule = _open(schedule_dir)
    return _check(targets.load(schedule.target), schedule)


def describe(schedule_dir: str | Path) -> Compiled:
    """What `build` said of a schedule, from its directory alone: checked and timed again."""
    schedule = _open(schedule_dir)
    backend = targets.load(schedule.target)
    report = _check(backend, schedule)
    result = _result(backend, schedule, parse(schedule.machine_toml, schedule.machine), report)
    return Compiled(schedule, report, replace(result, schedule_dir=str(schedule_dir)))


def _check(backend: Backend, schedule: Schedule) -> CheckReport:
    from mapper.schedule.checks import run_checks

    found = run_checks(schedule, backend.checks())
    return CheckReport({name: tuple(violations) for name, violations in found.items()})


def _open(schedule_dir: str | Path) -> Schedule:
    from mapper.schedule.store import load as load_schedule

    return load_schedule(Path(schedule_dir))


def _machine(backend: Backend, machine: str | Path | Machine | None) -> Machine:
    """The machine asked for; else the user's calibrated one (named like the target), else the default."""
    if machine is None:
        calibrated = user_folder() / f"{backend.name}.toml"
        machine = calibrated if calibrated.is_file() else backend.default_machine
    found = machine if isinstance(machine, Machine) else find(str(machine), backend.machine_files())
    if found.target != backend.name:
        raise UsageError(f"machine {found.name!r} is for target {found.target!r}, not {backend.name!r}")
    return found


def _request(
    phase: str, batch: int, context: int, prompt: int, weights: str | None, chips: int | None
) -> Request:
    from mapper.schedule.tables import Request

    phases: dict[str, tuple[Phase, ...]] = {
        "both": ("prefill", "decode"), "prefill": ("prefill",), "decode": ("decode",),
    }  # fmt: skip
    if phase not in phases:
        raise UsageError(f"phase {phase!r} is not one of decode, prefill, both")
    for name, value in {"batch": batch, "context": context, "prompt": prompt, "chips": chips}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if prompt > context and phase != "decode":
        raise UsageError(f"prompt of {prompt} tokens does not fit a context of {context}")
    return Request(phases[phase], batch, context, prompt, weights, chips)


def _free(out: str | Path | None) -> Path | None:
    """`out` as a path that a schedule directory may be written to: absent, empty, or an older schedule."""
    if out is None:
        return None
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a directory")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "schedule.json").exists():
        raise UsageError(f"{folder} holds something else than a schedule; refusing to replace it")
    return folder


def _noted(schedule: Schedule, bounds: Mapping[Phase, Sequence[Bound]]) -> Schedule:
    """The schedule with its bounds on record: they come from the graph, which a schedule does not hold."""
    record = {
        phase: [{"name": b.name, "seconds": b.seconds, "why": b.why} for b in found]
        for phase, found in bounds.items()
    }
    return replace(schedule, provenance={**(schedule.provenance or {}), "bounds": record})


def bounds_of(schedule: Schedule) -> dict[str, tuple[Bound, ...]]:
    """The lower bounds that `build` put on record. Raises ScheduleError where there are none."""
    try:
        record = schedule.provenance["bounds"]
        return {phase: tuple(Bound(**b) for b in found) for phase, found in record.items()}
    except (TypeError, KeyError) as error:
        raise ScheduleError("the schedule holds no bounds; it was not made by mapper.compile") from error


def _result(backend: Backend, schedule: Schedule, machine: Machine, report: CheckReport) -> Result:
    from mapper.cost.bands import bands
    from mapper.cost.estimate import Estimate, Result, loads, step_count

    bounds = bounds_of(schedule)
    phases: dict[str, Estimate] = {}
    for phase, band in sorted(bands(backend, schedule, machine).items()):
        program = schedule.programs[phase]
        phases[phase] = Estimate(
            band.time_s, band.low_s, band.high_s, tightest(bounds[phase]), schedule.request.batch, program.sequence,
            step_count(program), band.influences, loads(schedule, program),
        )  # fmt: skip
    model = schedule.model
    return Result(
        schedule.target,
        schedule.machine,
        schedule.chips,
        model.params,
        model.layers,
        phases,
        report.checks,
        None,
    )
