"""The gpu target: many-core machines with HBM, from NVIDIA GPUs to machines with systolic arrays and
scratchpads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from mapper.backend import Artifact, Finding, Semantics
from mapper.bounds import Bound
from mapper.collector import without_collector
from mapper.errors import LoweringError
from mapper.machine import Machine
from mapper_gpu.view import ServingView

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.schedule.checks import Check
    from mapper.schedule.mutate import Mutation
    from mapper.schedule.tables import Phase, Request, Schedule

PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class GpuBackend(ServingView):
    """See mapper.backend.Backend."""

    name: str = "gpu"
    summary: str = "GPUs and other HBM machines: fused kernels as tiles on SMs, over several --chips"
    default_machine: str = "h100-sxm"
    takes_parallel: bool = True
    formats: tuple[str, ...] = ("f32", "bf16", "f16", "int8", "int8row", "int4", "f8e4m3", "mxfp4")

    def machine_files(self) -> Sequence[Path]:
        """The machine TOML files of this package."""
        return sorted((Path(__file__).parent / "machines").glob("*.toml"))

    def lower(self, graph: Graph, machine: Machine, request: Request) -> Schedule:
        """Schedule every requested phase. `chips` None takes the fewest, in powers of two, whose memory
        suffices.

        Raises LoweringError, CapacityError, UsageError, UnsupportedModelError."""
        from mapper_gpu.capacity import chips_for
        from mapper_gpu.degrees import degrees_of, own, settled
        from mapper_gpu.lower import lower
        from mapper_gpu.packed import form_of, item_bytes

        request = settled(request)
        if request.speculative:
            raise LoweringError("gpu: speculative decoding is not scheduled yet")
        form = form_of(graph, request.weights, "tensor.f16" in machine.constants)
        graphs = serving_forms(graph, own(request))
        chips = request.chips or chips_for(graphs, machine, item_bytes(form))
        with without_collector():
            return lower(graphs, graph, machine, request, degrees_of(request.parallel, chips), form)

    def semantics(self) -> Semantics:
        """The task executor."""
        from mapper_gpu.semantics import GpuSemantics

        return GpuSemantics()

    def checks(self) -> Sequence[Check]:
        """The target's own predicates."""
        from mapper_gpu.checks import CHECKS

        return CHECKS

    def mutations(self) -> Sequence[Mutation]:
        """The target's own mutation operators."""
        from mapper_gpu import mutate, mutate_lowbit

        return (*mutate.MUTATIONS, *mutate_lowbit.MUTATIONS)

    def bounds(self, graph: Graph, machine: Machine, request: Request) -> Mapping[Phase, Sequence[Bound]]:
        """Memory, arithmetic and latency bounds, per phase."""
        from mapper_gpu.bounds import bounds_of
        from mapper_gpu.degrees import own, settled

        request = settled(request)
        graphs = serving_forms(graph, own(request))
        return {p: bounds_of(graphs, graph, machine, request, p) for p in graphs}

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        """Seconds per program with another machine's constants; order and placement are kept."""
        from mapper_gpu.retime import retime

        return retime(schedule, machine)

    def explain(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, Sequence[Finding]]:
        """Utilisation of each reading of "peak", where the time goes, and the kernels."""
        from mapper_gpu.explain import explain

        return explain(schedule, machine)

    def artifacts(self, schedule: Schedule) -> Sequence[Artifact]:
        """Kernels, task listing and trace."""
        from mapper_gpu.artifacts import artifacts

        return artifacts(schedule)


_forms: WeakKeyDictionary[Graph, dict[tuple[object, ...], Graph]] = WeakKeyDictionary()


def serving_forms(graph: Graph, request: Request) -> dict[Phase, Graph]:
    """The serving form per requested phase; made once per graph, because lowering and bounds both need it."""
    from mapper.passes.serve import serve

    known = _forms.setdefault(graph, {})
    found: dict[Phase, Graph] = {}
    for phase in PHASES:
        if phase in request.phases:
            key = (phase, request.batch, request.prompt, request.context)
            if key not in known:
                known[key] = serve(graph, phase, request.batch, request.prompt, request.context)
            found[phase] = known[key]
    return found
