"""The whole flow: load -> lower -> check -> time -> save; on a saved schedule: check, execute, verify.

The driver is where the two pillars meet: it asks the frontend for a graph, a target's backend for a schedule,
and injects that backend's opcode semantics into the runtime. It knows no target by name but `host`, which
runs graphs. Heavy modules are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mapper import backend as targets
from mapper.catalog import machine_for
from mapper.cost.estimate import Result, result, with_bounds
from mapper.errors import CheckFailedError, UsageError
from mapper.machine import Machine, parse

if TYPE_CHECKING:
    from mapper.backend import Array, Backend
    from mapper.ir.graph import Graph
    from mapper.runtime.verify import Verification
    from mapper.schedule.checks import Violation
    from mapper.schedule.tables import Phase, Request, Schedule

PhaseChoice = Literal["decode", "prefill", "both"]


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


def load(path: str | Path, external_root: str | Path | None = None, identify: bool = True) -> Graph:
    """The graph of an ONNX file, whose weights lie in its folder or, where it is given, in `external_root`;
    or of the model of the zoo that `zoo:NAME` names, without weights.

    Without `identify` the file is not hashed. Raises ModelError, UnsupportedModelError, UsageError for a name
    that is not in the zoo."""
    from mapper.frontend.load import load as load_onnx
    from mapper.zoo.files import is_name, skeleton

    if not is_name(path):
        return load_onnx(path, external_root=external_root, identify=identify)
    return replace(load_onnx(skeleton(path), identify=identify), path=Path(path))


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
    parallel: str = "",
    phase: PhaseChoice = "both",
    out: str | Path | None = None,
    external_root: str | Path | None = None,
) -> Schedule:
    """Map a model (path or graph) onto a target; save the schedule in directory `out` where one is given.

    `weights` is a format of `mapper.lowbit.FORMATS` that the target takes (None: its own); `chips` None lets
    the target choose; `parallel` says how a target that takes it shares the model out among them. Raises
    MapperError: UsageError, ModelError, CapacityError, LoweringError...,
    CheckFailedError for an illegal schedule (which is never saved).
    """
    done = build(
        model, target, machine=machine, batch=batch, context=context, prompt=prompt,
        weights=weights, chips=chips, parallel=parallel, phase=phase, out=out, external_root=external_root,
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
    parallel: str = "",
    phase: PhaseChoice = "both",
    out: str | Path | None = None,
    external_root: str | Path | None = None,
) -> Compiled:
    """Like `compile`, with checks, times, bands and bounds; a failed check is reported, not raised."""
    from mapper.execution import in_format

    backend = targets.load(target)
    chip = machine_for(backend, machine)
    held = targets.weight_format(backend, weights)
    if parallel and not isinstance(backend, targets.SharesOut):
        raise UsageError(f"{backend.name}: --parallel is for targets that share a model out, as gpu")
    request = replace(_request(phase, batch, context, prompt, held, chips), parallel=parallel)
    folder = _free(out)
    graph = load(model, external_root) if isinstance(model, str | Path) else model
    graph = in_format(graph, backend, held)
    bounds = backend.bounds(graph, chip, request)
    schedule = with_bounds(backend.lower(graph, chip, request), bounds)
    report = _check(backend, schedule)
    said = result(backend, schedule, chip, report.checks)
    if folder is not None and report.ok:
        from mapper.schedule.store import save

        made = backend.artifacts(schedule)
        save(schedule, folder, made)
        notes = tuple(a.note.replace("{folder}", str(out)) for a in made if a.note)
        said = replace(said, schedule_dir=str(out), notes=notes)
    return Compiled(schedule, report, said)


def check(schedule_dir: str | Path) -> CheckReport:
    """Run the shared checks and the target's own on a schedule on disk. Raises ScheduleError."""
    schedule = _open(schedule_dir)
    return _check(targets.load(schedule.target), schedule)


def describe(schedule_dir: str | Path) -> Compiled:
    """What `build` said of a schedule, from its directory alone: checked and timed again."""
    schedule = _open(schedule_dir)
    backend = targets.load(schedule.target)
    report = _check(backend, schedule)
    said = result(backend, schedule, parse(schedule.machine_toml, schedule.machine), report.checks)
    return Compiled(schedule, report, replace(said, schedule_dir=str(schedule_dir)))


def _check(backend: Backend, schedule: Schedule) -> CheckReport:
    from mapper.schedule.checks import run_checks

    found = run_checks(schedule, backend.checks())
    return CheckReport({name: tuple(violations) for name, violations in found.items()})


def _open(schedule_dir: str | Path) -> Schedule:
    from mapper.schedule.store import load as load_schedule

    return load_schedule(Path(schedule_dir))


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


def execute(
    schedule_dir: str | Path,
    inputs: Mapping[str, Array],
    model: str | Path | None = None,
    external_root: str | Path | None = None,
) -> dict[str, Array]:
    """Execute a schedule on disk on the model's own inputs, by their ONNX names; its outputs by theirs.

    The schedule assumes no padding: masks must be ones, positions must follow on the cache. Weights are read
    from the model's folder or, where it is given, from `external_root`. Raises
    UsageError, ScheduleError, WeightsMissingError, ExecutionFault.
    """
    from mapper.execution import session
    from mapper.runtime.inputs import execute as execute_inputs

    return execute_inputs(session(_open(schedule_dir), model, external_root), inputs)


def verify(
    schedule_dir: str | Path,
    model: str | Path | None = None,
    inputs: str | Path | None = None,
    tokens: int = 16,
    external_root: str | Path | None = None,
) -> Verification:
    """Execute a schedule from disk beside onnxruntime: a prompt, then `tokens` greedy steps, all compared.

    The prompt is in the .npz file `inputs` (the model's own inputs), or a fixed seeded one. Targets that
    compute in float32 are compared with onnxruntime; others as `mapper.judge` says. `tokens` beyond the
    context are cut. Where the schedule's weights are quantised, onnxruntime runs on the dequantised ones, and
    the deviation from the original model is reported apart.
    """
    from mapper import execution
    from mapper.runtime import verify as runtime
    from mapper.runtime.caches import Entry
    from mapper.runtime.inputs import interface, read_inputs

    if tokens < 0:
        raise UsageError(f"tokens must not be negative, and is {tokens}")
    schedule = _open(schedule_dir)
    path, names = execution.model_file(schedule, model), interface(schedule.roles)
    ids = runtime.seeded_prompt(schedule)
    start: Mapping[Entry, Array] = {}
    if inputs is not None:
        ids, start = read_inputs(names, execution.arrays_in(Path(inputs)))
    past = next((cache.shape[2] for cache in start.values()), 0)
    steps = min(tokens, max(schedule.request.context - past - ids.shape[1], 0))
    with execution.oracles(schedule, path, names, start, external_root) as (beside, judge, original):
        session = execution.session(schedule, model, external_root)
        return runtime.verify(session, beside, judge, steps, ids, start, original)


def run(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The graph's outputs for its own inputs, both by their ONNX names, on the host target's kernels.

    The graph is specialised to the inputs' shapes; what was lowered for some shapes is kept.
    """
    from mapper.execution import loaded

    return loaded(graph, inputs).run("prefill", inputs)


def optimise(file: str | Path, passes: str, external_root: str | Path | None = None) -> Graph:
    """The graph of an ONNX file, or of IR text (any other file; "-" is standard input), after some passes."""
    from mapper.ir.graph import Graph
    from mapper.passes.pipeline import run as run_passes
    from mapper.zoo.files import is_name

    path = Path(file)
    if path.suffix == ".onnx" or path.is_dir() or is_name(path):
        graph = load(path, external_root)
    else:
        graph = Graph.parse(_text(path), path, path.parent)
    return run_passes(graph, passes) if passes else graph


def _text(path: Path) -> str:
    import sys

    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
