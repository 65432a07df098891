"""The Backend object that the entry point names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mapper.backend import Artifact, Semantics
from mapper.bounds import Bound
from mapper.machine import Machine

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.schedule.checks import Check
    from mapper.schedule.mutate import Mutation
    from mapper.schedule.tables import Phase, Request, Schedule


@dataclass(frozen=True)
class ScalarBackend:
    """See mapper.backend.Backend."""

    name: str = "scalar"
    summary: str = "an example: one arithmetic unit and one memory, one operation at a time"
    default_machine: str = "scalar-1"
    formats: tuple[str, ...] = ("f32",)

    def machine_files(self) -> Sequence[Path]:
        """The shipped machine file."""
        return sorted((Path(__file__).parent / "machines").glob("*.toml"))

    def lower(self, graph: Graph, machine: Machine, request: Request) -> Schedule:
        """Map a recognised decoder. Raises LoweringError, CapacityError."""
        from .lower import lower

        return lower(graph, machine, request)

    def semantics(self) -> Semantics:
        """NumPy."""
        from .semantics import ScalarSemantics

        return ScalarSemantics()

    def checks(self) -> Sequence[Check]:
        """OperandsFit, DurationsHold."""
        from .checks import DurationsHold, OperandsFit

        return (OperandsFit(), DurationsHold())

    def mutations(self) -> Sequence[Mutation]:
        """shorten_step."""
        from .checks import ShortenStep

        return (ShortenStep(),)

    def bounds(self, graph: Graph, machine: Machine, request: Request) -> Mapping[Phase, Sequence[Bound]]:
        """Weights and caches are read once, and all operations are done by the one unit."""
        from mapper.ir.cost import total

        from .lower import serving_form

        found: dict[Phase, Sequence[Bound]] = {}
        for phase in request.phases:
            cost = total(serving_form(graph, phase, request))
            flops, weights = cost.flops.value, cost.weights.value
            rate = machine.value("alu.rate") * machine.value("clock")
            wide = machine.value("memory.ram.bandwidth")
            found[phase] = (
                Bound("arithmetic", flops / rate, f"{flops:.4g} operations at {rate:.4g}/s"),
                Bound("memory", weights / wide, f"{weights:.4g} B of weights at {wide:.4g} B/s"),
            )
        return found

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        """Seconds per program: steps in order, each as long as the machine takes."""
        from .timing import durations

        out: dict[Phase, float] = {}
        for program in schedule.programs.values():
            cycles = sum(int(durations(b.steps, machine).sum()) for b in program.blocks)
            out[program.phase] = cycles / machine.value("clock")
        return out

    def artifacts(self, schedule: Schedule) -> Sequence[Artifact]:
        """listing.txt: one line per step."""
        lines = []
        for phase, program in sorted(schedule.programs.items()):
            for block in program.blocks:
                columns = [block.steps.column(k).tolist() for k in ("start", "opcode", "bytes", "flops")]
                for start, opcode, size, flops in zip(*columns, strict=True):
                    lines.append(
                        f"{phase} {start:>9} {schedule.opcodes[opcode]:<16} {size:>10} B {flops:>10} flop"
                    )
        return (Artifact("listing.txt", ("\n".join(lines) + "\n").encode()),)
