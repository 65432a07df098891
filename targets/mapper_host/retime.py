"""The same schedule on a machine with other constants: order and placement kept, durations computed anew."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mapper.machine import Machine
from mapper.schedule.tables import Block, Int, Phase, Schedule
from mapper_host.program import MEMORIES
from mapper_host.timing import durations

_STREAMED = (MEMORIES.index("weights"), MEMORIES.index("state"))


def streamed(block: Block, memory: Int) -> Int:
    """Bytes of weights and state that each step of a block moves (no more than it moves in all)."""
    total = np.zeros(len(block.steps), np.int64)
    for offsets, buffer, _, count in (block.steps.slices("reads"), block.steps.slices("writes")):
        owner = np.repeat(np.arange(len(block.steps)), np.diff(offsets))
        far = np.isin(memory[buffer], _STREAMED)
        total += np.bincount(owner[far], count[far], minlength=len(block.steps)).astype(np.int64)
    return np.minimum(total, block.steps.column("bytes"))


def step_times(schedule: Schedule, machine: Machine, phase: Phase) -> list[Int]:
    """Cycles of each step of each block of a program."""
    memory = np.asarray(schedule.buffers.column("memory").to_numpy(), np.int64)
    blocks = schedule.programs[phase].blocks
    far = [streamed(b, memory) for b in blocks]
    working_set = float(sum(int(f.sum()) * b.repeat for f, b in zip(far, blocks, strict=True)))
    columns = [[b.steps.column(k) for k in ("opcode", "bytes", "flops")] for b in blocks]
    return [
        durations(machine, opcode, f, moved, flops, working_set, schedule.clock_hz)
        for f, (opcode, moved, flops) in zip(far, columns, strict=True)
    ]


def retime(schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
    """Seconds of each program. The steps of a host program follow each other on one unit."""
    found: dict[Phase, float] = {}
    for name in schedule.programs:
        phase: Phase = "decode" if name == "decode" else "prefill"
        times = step_times(schedule, machine, phase)
        blocks = schedule.programs[phase].blocks
        total = sum(int(t.sum()) * b.repeat for t, b in zip(times, blocks, strict=True))
        found[phase] = machine.value("program.overhead") + total / schedule.clock_hz
    return found
