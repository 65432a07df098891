"""Cycle-accurate execution of an lpu schedule: the meaning of its opcodes and layouts (ISA.md).

Nothing here knows the scheduler or the checks. A program is expanded once, then run by compiled code in which
every vector travels on stream registers from position to position; what the chip could not do is a fault.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from mapper.backend import Array, Memories
from mapper.errors import ExecutionFault
from mapper.schedule.tables import Phase, Port, Schedule
from mapper_lpu import isa, layouts
from mapper_lpu.chip import codes
from mapper_lpu.chip.simulate import simulate
from mapper_lpu.chip.state import empty_chip
from mapper_lpu.expand import Expanded, expand

_KEPT = 4


class Executor:
    """The Semantics of the lpu (mapper.backend.Semantics). Keeps the last few expanded programs."""

    def __init__(self) -> None:
        self._expanded: OrderedDict[tuple[int, str], tuple[Schedule, Expanded]] = OrderedDict()

    def place(self, schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
        """Write a port's array into its buffers. Raises ScheduleError where its layout does not fit."""
        layouts.place(schedule, port, array, memories)

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> Array:
        """Read a port's array. Raises ExecutionFault on bytes that nothing has written."""
        return layouts.fetch(schedule, port, memories)

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Execute one program. Returns its length in cycles.

        Raises ExecutionFault naming cycle, unit, opcode and reason; also where the program claims to end
        before its last instruction has passed all tiles.
        """
        program = self._program(schedule, phase)
        matrix = program.matrix
        cycles = schedule.programs[phase].cycles
        if not len(matrix):
            return cycles
        last = int(matrix[-1, codes.CYCLE])
        if last + program.tiles > cycles:
            reason = f"ends after the program's {cycles} cycles ({program.tiles} tiles later)"
            raise program.fault(len(matrix) - 1, reason)
        data = [memories.data(m) for m in range(len(schedule.memories))]
        flags = [memories.written(m).flags() for m in range(len(schedule.memories))]
        addresses = (_addresses(data), _addresses(flags), np.array([len(d) for d in data], np.int64))
        chip = empty_chip(program.timing, program.pool, len(isa.UNITS), program.permutes, addresses)
        end = max(last, int(matrix[:, codes.OUT_CYCLE].max()))
        fault, row = simulate(chip, matrix, program.order, int(matrix[0, codes.CYCLE]), end)
        if fault:
            raise program.fault(int(row), codes.FAULTS[fault])
        return cycles

    def _program(self, schedule: Schedule, phase: Phase) -> Expanded:
        key = (id(schedule), phase)
        if key not in self._expanded:
            self._expanded[key] = (schedule, expand(schedule, phase))
            while len(self._expanded) > _KEPT:
                self._expanded.popitem(last=False)
        return self._expanded[key][1]


def _addresses(arrays: list[Array]) -> Array:
    """Addresses of the arrays. Raises ExecutionFault for an array that compiled code cannot write."""
    for array in arrays:
        if array.itemsize != 1 or not (array.flags.c_contiguous and array.flags.writeable):
            raise ExecutionFault("a memory is not a writeable array of bytes")
    return np.array([a.ctypes.data for a in arrays], np.int64)
