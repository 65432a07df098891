"""What the runtime asks of a target: the executable meaning of its opcodes and layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mapper.schedule.tables import Phase, Port, Schedule

Array = npt.NDArray[Any]


class Memories(Protocol):
    """The memories of one loaded schedule: bytes, and which of them have been written (start poisoned)."""

    def data(self, memory: int) -> npt.NDArray[np.uint8]:
        """All bytes of memory number `memory` (only as many as the schedule uses)."""

    def written(self, memory: int) -> npt.NDArray[np.bool_]:
        """One flag per byte: whether the byte holds something that the program or the loader wrote."""


class Semantics(Protocol):
    """The executable meaning of a target's opcodes and layouts. Knows the tables, never the scheduler."""

    def place(self, schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
        """Write the array of a weight, constant, input or state into its buffers; mark them written."""

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> Array:
        """Read the array of an output or state port. Raises ExecutionFault on unwritten bytes."""

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Execute one program in time order. Returns the cycles it took. Raises ExecutionFault."""
