"""Published results against what a target predicts for them, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mapper import backend as targets
from mapper.catalog import machine_for
from mapper.errors import CapacityError, MapperError, UsageError
from mapper.published.formats import formats
from mapper.published.points import Excluded, Point, point
from mapper.published.rows import Row
from mapper.published.subset import calibrates
from mapper.serving.batching import serve
from mapper.serving.measures import Measures, measure
from mapper.serving.phases import Deployment, Phases, Policy, Serves, Stack
from mapper.serving.workload import Workload

if TYPE_CHECKING:
    from mapper.ir.graph import Graph

WAVES = 4  # requests per place of a closed loop: the start, where all prompts come at once, is a part of it
MOST = 1024  # requests of a closed loop
OFFLINE = 3  # requests per place where more are offered than fit


@runtime_checkable
class Systems(Protocol):
    """What a backend offers beside `Serves` where published results speak of its machines."""

    def machine_of(self, system: str, source: str) -> str | None:
        """The machine file of a system that a published result names; None where it is another target's."""

    def calibration_systems(self) -> frozenset[str]:
        """The systems whose rows in the calibration subset its constants were fitted on."""


@dataclass(frozen=True)
class Outcome:
    """A row with its prediction, or with the reason why it has none.

    `fitted`: constants were fitted on it. `ttft`: predicted mean time to the first token, in seconds.
    """

    row: Row
    target: str | None
    machine: str | None
    framework: str | None
    predicted: float | None
    reason: str | None
    fitted: bool
    ttft: float | None = None

    @property
    def error(self) -> float | None:
        """predicted / published - 1; None where either is missing or the published rate is 0."""
        if self.predicted is None or not self.row.published:
            return None
        return self.predicted / self.row.published - 1


def evaluate(rows: Sequence[Row], target: str | None = None) -> Iterator[Outcome]:
    """Predict each row by `target`, or by whichever installed target has its system.

    Raises UsageError where `target` is not installed or offers no serving times.
    """
    found = {name: b for name in targets.discover() if (b := _modelled(name)) is not None}
    if target is not None and target not in found:
        targets.load(target)
        raise UsageError(f"target {target!r} offers no serving times, so it predicts no published results")
    for row in rows:
        owners = (name for name, b in found.items() if b.machine_of(row.system, row.source))
        name, made = next(owners, None), point(row)
        if name is None:
            yield _excluded(row, "no installed target models this system")
        elif target not in (None, name):
            yield _excluded(row, "another target's system")
        elif isinstance(made, Excluded):
            yield _excluded(row, made.reason)
        else:
            yield _outcome(made, name)


class _Modelled(Serves, Systems, targets.Backend, Protocol):
    """A backend with all that published results need."""


@cache
def _modelled(name: str) -> _Modelled | None:
    try:
        found: object = targets.load(name)
    except MapperError:
        return None
    if isinstance(found, Serves) and isinstance(found, Systems):
        return found  # type: ignore[return-value]  # Serves, Systems and, from the registry, Backend
    return None


def _excluded(row: Row, reason: str) -> Outcome:
    made = point(row)
    software = made.framework if isinstance(made, Point) else None
    return Outcome(row, None, None, software, None, reason, False)


def _outcome(made: Point, target: str) -> Outcome:
    backend = _modelled(target)
    assert backend is not None  # the owner of a system was found among the modelled
    machine = backend.machine_of(made.row.system, made.row.source)
    fitted = calibrates(made) and made.row.system in backend.calibration_systems()
    shown = Outcome(made.row, target, machine, made.framework, None, None, fitted)
    form = formats(made)
    stack = stack_of(backend.stacks(), made)
    if form is None:
        return replace(shown, reason=f"precision {made.row.weights[:40]!r} is not known", fitted=False)
    if stack is None:
        return replace(shown, reason=f"no constants for {made.framework}", fitted=False)
    wanted = Deployment(
        made.tensor, form.weights, form.cache, made.experts, made.replicas, stack.name, form.experts
    )
    try:
        phases = _phases(target, str(machine), made.model, wanted)
        found = measured(made, phases, stack.policy)
        return replace(shown, predicted=rate(made, found), ttft=found.ttft.mean)
    except CapacityError as error:
        return replace(shown, reason=f"does not fit the chips that the row states: {error}", fitted=False)
    except UsageError as error:
        return replace(shown, reason=str(error), fitted=False)


def stack_of(stacks: Sequence[Stack], made: Point) -> Stack | None:
    """The serving software of a point: of its framework, the release of the row's year or the nearest one."""
    year = made.row.year or 0
    same = [s for s in stacks if s.framework == made.framework]
    return min(same, key=lambda s: max(s.since - year, year - s.until, 0), default=None)


@cache
def _graph(model: str) -> Graph:
    from mapper.driver import load

    return load(f"zoo:{model}")


@cache
def _phases(target: str, machine: str, model: str, wanted: Deployment) -> Phases:
    backend = _modelled(target)
    assert backend is not None
    return backend.phases(_graph(model), machine_for(backend, machine), wanted)


def predict(made: Point, phases: Phases, policy: Policy) -> float:
    """The rate that the row publishes, from iteration times: tokens per second, per user or in all.

    Raises CapacityError where a request does not fit.
    """
    return rate(made, measured(made, phases, policy))


def measured(made: Point, phases: Phases, policy: Policy) -> Measures:
    """The row's load, served. Raises CapacityError where a request does not fit."""
    users = made.concurrency or 1
    if made.load == "offline":
        places = max(1, min(policy.sequences, phases.capacity // (made.prompt + made.output)))
        requests = users = OFFLINE * places
    elif made.load == "batch":
        requests = users
    else:
        requests = max(users + 1, min(WAVES * users, MOST))
    return measure(serve(phases, Workload(requests, made.prompt, made.output, users), policy))


def rate(made: Point, found: Measures) -> float:
    """What the row's metric is of a served load; a batch's rate per user is its output over its whole
    time."""
    if made.row.metric != "tokens_per_s_per_user":
        return found.tokens_per_s
    if made.load == "batch":
        return found.tokens_per_s / (made.concurrency or 1)
    return found.tokens_per_s_per_user
