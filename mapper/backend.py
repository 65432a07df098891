"""The Backend protocol: what a target provides, and how targets are found.

A target is a package that exposes one object through the entry-point group "mapper.targets". The core knows
no target; the driver asks for one by name. A third party adds a target in its own distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mapper.errors import MapperError, UsageError
from mapper.hints import did_you_mean
from mapper.lowbit import PARTS, format_name
from mapper.runtime.interface import Array, Memories, Semantics
from mapper.runtime.written import Written

if TYPE_CHECKING:
    from mapper.bounds import Bound
    from mapper.ir.graph import Graph
    from mapper.ir.weights import Derivation, WeightSymbol
    from mapper.machine import Machine
    from mapper.schedule.checks import Check
    from mapper.schedule.mutate import Mutation
    from mapper.schedule.tables import Phase, Request, Schedule

__all__ = [
    "GROUP", "Array", "Artifact", "Backend", "Explains", "Finding", "Memories", "Semantics", "SharesOut",
    "WeightSource", "Written", "discover", "load", "weight_format", "weight_source",
]  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """A file that is generated from a schedule: listing, memory map, source, trace. `name` is relative.

    `note` is what `mapper compile` says of it in a line, if anything; `{folder}` in it is the schedule's
    directory.
    """

    name: str
    data: bytes
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """What a target adds to `mapper explain` on one phase: a titled table; cells are numbers or text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]

    def record(self) -> dict[str, Any]:
        """JSON: the title, and a record per row."""
        return {"title": self.title, "rows": [dict(zip(self.columns, r, strict=True)) for r in self.rows]}


@runtime_checkable
class Explains(Protocol):
    """What a backend may offer beside the Backend protocol: why a schedule takes its time."""

    def explain(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, Sequence[Finding]]:
        """Tables per phase, most telling first, from the schedule and the machine alone."""


@runtime_checkable
class SharesOut(Protocol):
    """What a backend may offer beside the Backend protocol: `Request.parallel` says how it shares a model out
    among chips."""

    takes_parallel: bool


@dataclass(frozen=True)
class WeightSource:
    """How a schedule gets a weight: the value expression, the stored weights and the constants it reads."""

    expression: Any
    files: Mapping[str, WeightSymbol]
    constants: Mapping[str, Array]


def weight_source(symbol: WeightSymbol) -> WeightSource:
    """The array of a weight as it is computed in: read from its file, held here, or made from its parts."""
    if symbol.derivation is not None:
        return _derived(symbol, symbol.derivation)
    if symbol.packing is not None:
        parts = symbol.packing.parts
        sources = {name: weight_source(part) for name, part in parts.items()}
        given = [sources[n].expression if n in sources else None for n in PARTS]
        how = list(astuple(symbol.packing.scheme))
        made = ["dequantise", how, list(symbol.shape), symbol.type.numpy.name, *given]
        files = {name: w for s in sources.values() for name, w in s.files.items()}
        constants = {name: a for s in sources.values() for name, a in s.constants.items()}
        return WeightSource(made, files, constants)
    if symbol.data is not None:
        return WeightSource(["const", symbol.name], {}, {symbol.name: symbol.data})
    return WeightSource(["weight", symbol.name], {symbol.name: symbol}, {})


def _derived(symbol: WeightSymbol, derivation: Derivation) -> WeightSource:
    source = weight_source(derivation.source)
    made = source.expression
    if derivation.transposed:
        rank = len(derivation.source.shape)
        made = ["transpose", made, [*range(rank - 2), rank - 1, rank - 2]]
    if derivation.scheme is None:
        made = ["cast", made, symbol.type.numpy.name]
    else:
        made = ["quantise", list(astuple(derivation.scheme)), derivation.part, made]
    return WeightSource(made, source.files, source.constants)


class Backend(Protocol):
    """What every target provides. All methods are pure: same input, same output, no global state."""

    name: str
    summary: str  # one line for `mapper targets`
    default_machine: str
    formats: Sequence[str]
    """Weight formats (`mapper.lowbit.FORMATS`) that `lower` takes, first the one that weights are held in
    where none is asked for. A graph lowered for any other has its weights in that format already."""

    def machine_files(self) -> Sequence[Path]:
        """The machine TOML files that the target ships."""

    def lower(self, graph: Graph, machine: Machine, request: Request) -> Schedule:
        """Map the graph. Raises LoweringError or CapacityError. Reads no weight."""

    def semantics(self) -> Semantics:
        """The meaning of the opcodes, injected into runtime.execute."""

    def checks(self) -> Sequence[Check]:
        """The target's own legality predicates, beside the shared ones."""

    def mutations(self) -> Sequence[Mutation]:
        """The target's own mutation operators, beside the shared ones."""

    def bounds(self, graph: Graph, machine: Machine, request: Request) -> Mapping[Phase, Sequence[Bound]]:
        """Lower bounds on the time of any schedule, per phase, from graph and machine alone."""

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        """Seconds per program with another machine's constants; order and placement are kept."""

    def artifacts(self, schedule: Schedule) -> Sequence[Artifact]:
        """Files generated from the schedule, written into its directory."""


GROUP = "mapper.targets"


def discover() -> dict[str, str]:
    """Target name -> entry point value, of every installed target, sorted by name; imports nothing."""
    return {e.name: e.value for e in sorted(entry_points(group=GROUP), key=lambda e: e.name)}


def load(name: str) -> Backend:
    """The backend of target `name`. Raises UsageError where there is none or it cannot be imported."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                backend: Backend = entry.load()
            except MapperError:
                raise
            except (ImportError, AttributeError) as error:
                raise UsageError(f"target {name!r} cannot be loaded: {error}") from error
            return backend
    hint, known = did_you_mean(name, discover()) or ";", ", ".join(discover()) or "none"
    raise UsageError(f"unknown target {name[:60]!r}{hint} installed targets: {known}")


def weight_format(backend: Backend, name: str | None) -> str | None:
    """The canonical name of the weight format asked of a target. Raises UsageError listing those it has."""
    if name is None:
        return None
    try:
        found = format_name(name)
    except ValueError:
        found = ""
    if found not in backend.formats:
        has = ", ".join(backend.formats)
        raise UsageError(f"{backend.name} has no weight format {name!r}; it has {has}")
    return found
