"""The `lpu` backend: ties lowering, checks, executor, bounds and emitters together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mapper.backend import Artifact, Semantics
from mapper.bounds import Bound
from mapper.collector import without_collector
from mapper.errors import CapacityError, LoweringError, UsageError
from mapper.machine import Machine
from mapper.schedule.tables import ModelRef, Phase, Request, Schedule

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.schedule.mutate import Mutation
    from mapper.schedule.violation import Check

FORMATS = ("f16", "bf16", "int8", "int8row", "int4", "f8e4m3", "mxfp4")
"""Products take fp16 operands, and tiles are stored as such: of any other format it is the values that count,
rounded to fp16; two bytes are stored, moved and counted per weight."""


class LpuBackend:
    """One Groq TSP chip, scheduled instruction by instruction. See ISA.md and README.md."""

    name = "lpu"
    summary = "Groq LPU (TSP), one chip: every instruction placed in space and time"
    default_machine = "groq-lpu1"
    formats = FORMATS

    def machine_files(self) -> Sequence[Path]:
        """The machine TOML files of this package."""
        return sorted((Path(__file__).parent / "machines").glob("*.toml"))

    def lower(self, graph: Graph, machine: Machine, request: Request) -> Schedule:
        """Schedule every requested phase. Raises LoweringError, CapacityError, UsageError."""
        from mapper.passes.serve import serve
        from mapper_lpu import tables
        from mapper_lpu.extract import extract
        from mapper_lpu.lower import lower
        from mapper_lpu.retime import plan_of

        _check(request)
        _check_capacity(graph, machine)
        graphs: dict[Phase, Graph] = {
            phase: serve(
                graph, phase=phase, batch=request.batch, prompt=request.prompt, context=request.context
            )
            for phase in request.phases
        }
        ids, rows = tables.number_ops(graphs)
        decoders = {
            phase: extract(served, phase, ids[phase], request.context) for phase, served in graphs.items()
        }
        declared = {name: symbol for g in graphs.values() for name, symbol in g.weights.items()}
        with without_collector():  # millions of small objects, none of them in cycles
            lowered = lower(decoders, machine, declared)
        plan = {
            "arithmetic": {"matmul": "float16", "accumulate": "float32", "key_cache": "float16"},
            "access_timing": tables.ACCESS_TIMING,
            "exact_time": True,
            "permutes": [],
            **plan_of(lowered),
        }
        model = ModelRef(
            str(graph.path) if graph.path else graph.name,
            graph.sha256,
            {name: "" for name in graph.files},
            graph.params,
            graph.layers,
        )
        return tables.assemble(graph, machine, request, lowered, tables.ops(rows, ids, graphs), model, plan)

    def semantics(self) -> Semantics:
        """The cycle-by-cycle executor."""
        from mapper_lpu.execute import Executor

        return Executor()

    def checks(self) -> Sequence[Check]:
        """The target's own predicates."""
        from mapper_lpu.checks import CHECKS

        return CHECKS

    def mutations(self) -> Sequence[Mutation]:
        """The target's own mutation operators."""
        from mapper_lpu.mutate import MUTATIONS

        return MUTATIONS

    def bounds(self, graph: Graph, machine: Machine, request: Request) -> Mapping[Phase, Sequence[Bound]]:
        """Lower bounds from the serving form and the machine alone."""
        from mapper_lpu.bounds import bounds

        return bounds(graph, machine, request)

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        """Seconds per program with other constants, the order of all pieces kept."""
        from mapper_lpu.retime import retime

        return retime(schedule, machine)

    def artifacts(self, schedule: Schedule) -> Sequence[Artifact]:
        """Listing per queue and memory map."""
        from mapper_lpu.artifacts import artifacts

        return artifacts(schedule)


def _check_capacity(graph: Graph, machine: Machine) -> None:
    """Refuse what cannot fit at all; the exact check, slice by slice, is made when values are placed."""
    there = 2 * machine.whole("mem.slices") * machine.whole("mem.rows") * machine.whole("chip.lanes")
    needed = 2 * graph.params
    if needed > there:
        raise CapacityError(
            f"the model's {graph.params} parameters take {needed} bytes in fp16; "
            f"one {machine.name} has {there} bytes of SRAM"
        )


def _check(request: Request) -> None:
    if request.chips not in (1, None):
        raise LoweringError(f"lpu maps a model onto one chip; {request.chips} chips are not built yet")
    if request.weights not in (None, *FORMATS):
        raise UsageError(f"lpu has no weight format {request.weights!r}; it has {', '.join(FORMATS)}")
    if request.speculative:
        raise LoweringError("lpu: speculative decoding is not built yet")
