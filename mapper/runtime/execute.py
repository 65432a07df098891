"""Run a schedule: load its ports into poisoned memories, execute its programs, read the results.

The runtime knows the tables; what opcodes and layouts mean comes from the target's `Semantics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault, MapperError, ScheduleError, UsageError, WeightsMissingError
from mapper.runtime.image import Images, mapped_weights
from mapper.runtime.interface import PlainPorts, Prepares, Semantics
from mapper.runtime.memories import POISON, allocate, temporaries
from mapper.runtime.weights import WeightFiles
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import Phase, Port, Schedule
from mapper.schedule.validate import validate
from mapper.schedule.values import evaluate

Array = npt.NDArray[Any]
Weights = Callable[[str], Array]


@dataclass(frozen=True)
class _Part:
    """A program's input ports by name, its output ports, and how many steps it executes."""

    inputs: Mapping[str, Port]
    outputs: Sequence[Port]
    steps: int


class Session:
    """One loaded schedule. State (the KV cache) stays in its memories from run to run. `cycles`, `steps` and
    `runs` count what has been executed.

    `weights` looks weights up by name; without it they are read from `model_folder`, whose files may be links
    into `external_root`, and big ones are mapped where the target can work on mapped bytes (see image.py;
    `images`: where converted ones are kept). Raises ScheduleError if
    the schedule is not well formed, WeightsMissingError if a weight is not there.
    """

    def __init__(
        self,
        schedule: Schedule,
        semantics: Semantics,
        model_folder: str | Path | None = None,
        weights: Weights | None = None,
        external_root: str | Path | None = None,
        images: Images | None = None,
    ) -> None:
        validate(schedule)
        self.schedule = schedule
        self.cycles = self.steps = self.runs = 0
        self._semantics = semantics
        self._ports = {port.name: port for port in schedule.ports}
        self._temporaries = temporaries(schedule)
        self._torn = False
        mapped: Mapping[int, npt.NDArray[np.uint8]] = {}
        if weights is None and model_folder is not None:
            self._weights: Weights = WeightFiles(schedule, model_folder, external_root)
            if isinstance(semantics, PlainPorts):
                kept = images or Images.default()
                mapped = mapped_weights(schedule, semantics.plain, self._weights, self._array, kept)
        else:
            self._weights = weights or _none
        self._memories = allocate(schedule, mapped)
        self._taking = {phase: self._part(phase) for phase in schedule.programs}
        for port in schedule.ports:
            lasting = port.kind in ("weight", "constant", "state") and port.source is not None
            if lasting and not (port.buffers and port.buffers[0] in mapped):
                self._load(port)

    def _part(self, phase: str) -> _Part:
        """What a run of a program needs to look up: once, because a decode step may take a millisecond."""
        steps = sum(len(b.steps) * b.repeat for b in self.schedule.programs[phase].blocks)
        inputs = {p.name: p for p in self.ports("input", phase=phase)}
        return _Part(inputs, self.ports("output", phase=phase), steps)

    def _array(self, port: Port) -> Array:
        array = evaluate(port.source, self._weights, self.schedule.constants.__getitem__)
        if array.shape != port.shape:
            raise ScheduleError(f"port {port.name}: its source has shape {array.shape}, not {port.shape}")
        return array.astype(dtype(port.dtype), copy=False)

    def _load(self, port: Port) -> None:
        self._place(port, self._array(port))

    def _place(self, port: Port, array: Array) -> None:
        with _nonsense(f"port {port.name}", ScheduleError):
            self._semantics.place(self.schedule, port, array, self._memories)

    def reset(self) -> None:
        """Bring every state port back to its initial value."""
        for port in self.ports("state"):
            if port.source is not None:
                self._load(port)

    def ports(self, *kinds: str, phase: str | None = None) -> list[Port]:
        """Ports of these kinds, those that take part in `phase` where it is given."""
        taking = (p for p in self.schedule.ports if p.kind in kinds)
        return [p for p in taking if phase is None or not p.programs or phase in p.programs]

    def run(self, phase: Phase, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Execute program `phase` once and return its output ports by name.

        `inputs` by port name, each with its port's shape, converted to its type. All bytes that belong to no
        weight, constant or state are poisoned first. Raises UsageError, ExecutionFault.
        """
        self._enter(phase, inputs)
        with _nonsense(f"program {phase}", ExecutionFault):
            self.cycles += self._semantics.run(self.schedule, phase, self._memories)
        self._torn = False
        self.steps += self._taking[phase].steps
        self.runs += 1
        return {p.name: self._fetch(p) for p in self._taking[phase].outputs}

    def prepare(self, phase: Phase, inputs: Mapping[str, Array]) -> None:
        """Do beforehand what a target does once per program before its first run, where it can; raises as
        `run` does."""
        if isinstance(self._semantics, Prepares):
            self._enter(phase, inputs)
            with _nonsense(f"program {phase}", ExecutionFault):
                self._semantics.prepare(self.schedule, phase, self._memories)

    def _enter(self, phase: Phase, inputs: Mapping[str, Array]) -> None:
        if phase not in self.schedule.programs:
            raise UsageError(
                f"the schedule has no {phase} program; it has {', '.join(self.schedule.programs)}"
            )
        wanted = self._taking[phase].inputs
        if set(inputs) != set(wanted):
            raise UsageError(f"{phase} takes the inputs {sorted(wanted)}, not {sorted(inputs)}")
        self._poison()
        self._torn = True
        for name, port in wanted.items():
            self._place(port, _fitting(name, inputs[name], port))

    def _poison(self) -> None:
        """Poison what the last run has written of the temporaries: all of them where it did not end."""
        for memory, low, high in self._temporaries:
            spans = self._memories.written(memory).remove(low, high)
            for a, b in [(low, high)] if self._torn else spans:
                self._memories.data(memory)[a:b] = POISON

    def _fetch(self, port: Port) -> Array:
        with _nonsense(f"port {port.name}", ScheduleError):
            return self._semantics.fetch(self.schedule, port, self._memories)

    def state(self, name: str) -> Array:
        """The array of state port `name`, now. Raises UsageError, ExecutionFault on unwritten bytes."""
        return self._fetch(self._state_port(name))

    def set_state(self, name: str, array: Array) -> None:
        """Overwrite state port `name`. Raises UsageError on another shape."""
        port = self._state_port(name)
        self._place(port, _fitting(name, array, port))

    def _state_port(self, name: str) -> Port:
        port = self._ports.get(name)
        if port is None or port.kind != "state":
            raise UsageError(f"the schedule has no state {name!r}")
        return port


@contextmanager
def _nonsense(what: str, kind: type[MapperError]) -> Iterator[None]:
    """A schedule from disk may hold layouts and immediates that a target trips over: one line, no trace."""
    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise kind(f"{what}: {type(error).__name__}: {error}") from error


def _none(name: str) -> Array:
    raise WeightsMissingError(f"weight {name}: no folder of the model was given")


def _fitting(name: str, array: Array, port: Port) -> Array:
    array = np.asarray(array)
    if array.shape != port.shape:
        raise UsageError(f"input {name} has shape {array.shape}; the schedule takes {port.shape}")
    wanted = dtype(port.dtype)
    if array.dtype.kind not in "biufV" or (array.dtype.kind == "f" and wanted.kind in "iub"):
        raise UsageError(f"input {name} is {array.dtype}; the schedule takes {port.dtype}")
    return array.astype(wanted, copy=False)
