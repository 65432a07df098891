"""How long a step takes: the overhead, and then its bytes or its operations, whichever take longer."""

from __future__ import annotations

import numpy as np

from mapper.machine import Machine
from mapper.schedule.tables import Int, StepTable


def cycles(size: Int, flops: Int, machine: Machine) -> Int:
    """Durations in cycles of steps that move `size` bytes and do `flops` operations."""
    per_cycle = machine.value("memory.ram.bandwidth") / machine.value("clock")
    work = np.maximum(size / per_cycle, flops / machine.value("alu.rate"))
    return np.ceil(work).astype(np.int64) + round(machine.value("alu.overhead"))


def durations(steps: StepTable, machine: Machine) -> Int:
    """Durations in cycles of a table's steps on `machine`."""
    return cycles(steps.column("bytes"), steps.column("flops"), machine)
