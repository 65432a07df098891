"""Runs a program: one step after the other, NumPy on the bytes of the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault
from mapper.runtime.interface import Memories
from mapper.runtime.written import require_written
from mapper.schedule.tables import Phase, Port, Schedule

from .opcodes import OPCODES, SIZES

Array = npt.NDArray[Any]


class ScalarSemantics:
    """See mapper.runtime.interface.Semantics. Arrays lie in one buffer each, in C order."""

    def place(self, schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
        """Write a port's array."""
        low, high = _extent(schedule, port.buffers[0])
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if len(raw) != high - low:
            raise ExecutionFault(f"port {port.name} has {len(raw)} bytes, its buffer {high - low}")
        memories.data(0)[low:high] = raw
        memories.written(0)[low:high] = True

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> Array:
        """Read a port's array."""
        raw = _read(memories, *_extent(schedule, port.buffers[0]), port.name)
        return raw.view(np.dtype(port.dtype)).reshape(port.shape).copy()

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Execute the steps in the order of their starts."""
        program = schedule.programs[phase]
        base = schedule.buffers.column("offset").to_numpy()
        for block in program.blocks:
            rows = sorted(block.steps.table.to_pylist(), key=lambda row: row["start"])
            for row in rows:
                _step(schedule, row, base, memories)
        return program.cycles


def _extent(schedule: Schedule, buffer: int) -> tuple[int, int]:
    row = schedule.buffers.slice(buffer, 1).to_pylist()[0]
    return row["offset"], row["offset"] + row["bytes"]


def _read(memories: Memories, low: int, high: int, what: str) -> npt.NDArray[np.uint8]:
    require_written(memories.written(0), low, high, what)
    return memories.data(0)[low:high]


def _step(schedule: Schedule, row: dict[str, Any], base: Any, memories: Memories) -> None:
    name = schedule.opcodes[row["opcode"]]
    what = f"{name} at cycle {row['start']}"
    reads = [_read(memories, *_slice(base, s), what) for s in row["reads"]]
    if [len(r) for r in reads] != SIZES[name](row["args"])[:-1]:
        raise ExecutionFault(f"{what}: operands of {[len(r) for r in reads]} bytes do not suit it")
    result = np.ascontiguousarray(OPCODES[name](row["args"], reads), np.float32).reshape(-1).view(np.uint8)
    low, high = _slice(base, row["writes"][0])
    if len(result) != high - low:
        raise ExecutionFault(f"{what}: {len(result)} bytes of result do not fit {high - low}")
    memories.data(0)[low:high] = result
    memories.written(0)[low:high] = True


def _slice(base: Any, part: dict[str, int]) -> tuple[int, int]:
    low = int(base[part["buffer"]]) + part["offset"]
    return low, low + part["bytes"]
