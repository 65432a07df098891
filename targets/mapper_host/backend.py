"""The host target: the CPU that the compiler itself runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mapper.backend import Artifact, Semantics
from mapper.bounds import Bound
from mapper.errors import UsageError
from mapper.lowbit import FORMATS
from mapper.machine import Machine

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.schedule.checks import Check
    from mapper.schedule.mutate import Mutation
    from mapper.schedule.tables import Phase, Request, Schedule

PHASES: tuple[Phase, ...] = ("prefill", "decode")
_MACHINES = Path(__file__).parent / "machines"


@dataclass(frozen=True)
class HostBackend:
    """See mapper.backend.Backend. `lower` also takes any other graph of static shapes: it becomes the program
    "prefill" with the graph's own inputs and outputs as ports."""

    name: str = "host"
    summary: str = (
        "the CPU this runs on: decode and prefill as tables of kernel steps in one compiled interpreter"
    )
    default_machine: str = "host-generic"
    formats: tuple[str, ...] = tuple(FORMATS)

    def machine_files(self) -> Sequence[Path]:
        """The shipped machine files."""
        return sorted(_MACHINES.glob("*.toml"))

    def lower(self, graph: Graph, machine: Machine, request: Request) -> Schedule:
        """Map a recognised decoder for the phases of the request, or a graph of static shapes as it is.

        Raises LoweringError, UnsupportedModelError, UsageError.
        """
        from mapper_host.assemble import schedule_of
        from mapper_host.context import Weights
        from mapper_host.fuse import fuse
        from mapper_host.lower import lower_program
        from mapper_host.program import Value

        _supported(request)
        if is_static(graph) and not graph.inputs_with_role("past_length"):
            weights, states = Weights(), dict[str, Value]()
            work = [lower_program(graph, "prefill", weights, states)]
            return schedule_of(graph, machine, request, work, weights, serving=False)
        weights, states = Weights(), dict[str, Value]()
        served = serving_forms(graph, request)
        work = [lower_program(form, phase, weights, states) for phase, form in served.items()]
        for one in work:
            one.fused = fuse(one)
        return schedule_of(graph, machine, request, work, weights, serving=True)

    def semantics(self) -> Semantics:
        """The interpreter; compiled when it first runs."""
        from mapper_host.semantics import HostSemantics

        return HostSemantics()

    def checks(self) -> Sequence[Check]:
        """OperandsFit, RatesHold."""
        from mapper_host.checks import CHECKS

        return CHECKS

    def mutations(self) -> Sequence[Mutation]:
        """None beside the shared ones."""
        return ()

    def bounds(self, graph: Graph, machine: Machine, request: Request) -> Mapping[Phase, Sequence[Bound]]:
        """Memory, cache and arithmetic bounds, per phase."""
        from mapper_host.bounds import bounds_of

        if is_static(graph) and not graph.inputs_with_role("past_length"):
            return {"prefill": bounds_of(graph, machine)}
        return {phase: bounds_of(form, machine) for phase, form in serving_forms(graph, request).items()}

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        """Seconds per program with another machine's constants."""
        from mapper_host.retime import retime

        return retime(schedule, machine)

    def artifacts(self, schedule: Schedule) -> Sequence[Artifact]:
        """listing.txt: every block's steps with operands, cycles, bytes and operations; trace.json."""
        from mapper_host.listing import artifacts

        return artifacts(schedule)

    def calibrate(self) -> str:
        """TOML text of a machine "host" with constants measured on this computer (takes some seconds)."""
        from mapper_host.calibrate import calibrated

        return calibrated()

    def read_rate(self) -> float:
        """Bytes per second at which this computer reads memory, measured now. Raises MapperError."""
        from mapper_host.read_rate import read_rate

        return read_rate()


def is_static(graph: Graph) -> bool:
    """Whether all inputs have known shapes."""
    return all(kind.is_static for _, kind in graph.inputs)


_forms: WeakKeyDictionary[Graph, dict[tuple[Any, ...], Graph]] = WeakKeyDictionary()


def serving_forms(graph: Graph, request: Request) -> dict[Phase, Graph]:
    """The serving form per requested phase; made once per graph, because lowering and bounds both need it.

    Raises UnsupportedModelError, UsageError.
    """
    from mapper.passes.serve import serve

    known = _forms.setdefault(graph, {})
    found: dict[Phase, Graph] = {}
    for phase in PHASES:
        if phase in request.phases:
            key = (phase, request.batch, request.prompt, request.context)
            if key not in known:
                known[key] = serve(graph, *key)
            found[phase] = known[key]
    return found


def _supported(request: Request) -> None:
    if request.weights not in (None, *FORMATS):
        raise UsageError(f"host: no weight format is called {request.weights!r}: {', '.join(FORMATS)}")
    if request.chips not in (None, 1):
        raise UsageError(f"host: there is one host, not {request.chips} chips")
