"""What the runtime asks of a target: the executable meaning of its opcodes and layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mapper.runtime.written import Written
    from mapper.schedule.tables import Phase, Port, Schedule

Array = npt.NDArray[Any]


class Memories(Protocol):
    """The memories of one loaded schedule: bytes, and which of them have been written (start poisoned)."""

    def data(self, memory: int) -> npt.NDArray[np.uint8]:
        """All bytes of memory number `memory` (only as many as the schedule uses). Raises ExecutionFault for
        a memory whose buffers are mapped from files one by one, as only `PlainPorts` are."""

    def bytes_of(self, number: int) -> npt.NDArray[np.uint8]:
        """The bytes of buffer number `number`; read-only where they are mapped from a file."""

    def written(self, memory: int) -> Written:
        """Which bytes hold something that the program or the loader wrote."""


@runtime_checkable
class Prepares(Protocol):
    """What a target's semantics offer beside `Semantics` where a program's first run does work that later
    ones need not repeat."""

    def prepare(self, schedule: Schedule, phase: Phase, memories: Memories) -> object:
        """Do that work, on memories that inputs have been placed in. Raises ExecutionFault."""


@runtime_checkable
class PlainPorts(Protocol):
    """What a target's semantics offer beside `Semantics` where they go through `Memories.bytes_of` alone, so
    that weights need not be copied into one stretch of memory."""

    def plain(self, schedule: Schedule, port: Port) -> bool:
        """Whether the port's only buffer holds exactly its array's bytes in C order."""


@runtime_checkable
class Threaded(Protocol):
    """What a target's semantics offer beside `Semantics` where a program can run on several threads."""

    def on_threads(self, threads: int) -> Semantics:
        """The same semantics, on so many threads. Raises UsageError where that is no number of threads."""


class Semantics(Protocol):
    """The executable meaning of a target's opcodes and layouts. Knows the tables, never the scheduler."""

    def place(self, schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
        """Write the array of a weight, constant, input or state into its buffers; mark them written."""

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> Array:
        """Read the array of an output or state port. Raises ExecutionFault on unwritten bytes."""

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Execute one program in time order. Returns the cycles it took. Raises ExecutionFault."""
