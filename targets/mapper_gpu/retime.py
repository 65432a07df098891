"""The same schedule with other constants: order and placement kept, durations and starts computed anew."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mapper.machine import Machine
from mapper.schedule.tables import Block, Int, Phase, Schedule
from mapper_gpu.columns import FIELDS, between, cycles
from mapper_gpu.hardware import Gpu, gpu
from mapper_gpu.persistent import queue_starts
from mapper_gpu.queues import Stages, ranks, stage_starts
from mapper_gpu.timing import task_seconds


@dataclass(frozen=True)
class Prepared:
    """A block's columns that its time depends on, in queue order, with its stages and how often it runs."""

    far: Int
    near: Int
    work: Int
    engine: Int
    sharers: Int
    lead: Int
    stages: Stages
    repeat: int
    waits: list[list[int]]
    raised: list[list[int]]


_known: dict[int, tuple[weakref.ref[Schedule], dict[str, list[Prepared]]]] = {}


def retime(schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
    """Seconds of each program."""
    chip = gpu(machine)
    found: dict[Phase, float] = {}
    for name in schedule.programs:
        phase: Phase = "decode" if name == "decode" else "prefill"
        persistent = schedule.plan["style"] == "megakernel"
        found[phase] = _program(chip, _prepared(schedule)[phase], persistent) / chip.clock
    return found


def _program(chip: Gpu, blocks: list[Prepared], persistent: bool) -> int:
    gap = between(chip, persistent)
    at = int(cycles(chip, chip.step))
    end = at
    for b in blocks:
        seconds = task_seconds(chip, b.far, b.near, b.work, b.engine, b.sharers, b.lead)
        if persistent:
            duration = cycles(chip, seconds).tolist()
            _, length = queue_starts(b.stages.unit.tolist(), duration, b.waits, b.raised, gap)
        else:
            _, length = stage_starts(b.stages, cycles(chip, seconds), gap)
        end = at + b.repeat * length + (b.repeat - 1) * gap
        at = end + gap
    return end


def _prepared(schedule: Schedule) -> dict[str, list[Prepared]]:
    key = id(schedule)
    if key not in _known or _known[key][0]() is not schedule:
        made = {p: [_block(schedule, b) for b in program.blocks] for p, program in schedule.programs.items()}
        _known[key] = (weakref.ref(schedule, lambda _: _known.pop(key, None)), made)
    return _known[key][1]


def _block(schedule: Schedule, block: Block) -> Prepared:
    offsets, flat = block.steps.args()
    column = {name: flat[offsets[:-1] + i] for i, name in enumerate(FIELDS)}
    unit, start = block.steps.column("unit"), block.steps.column("start")
    persistent = schedule.plan["style"] == "megakernel"
    order = np.lexsort((unit, start) if persistent else (start, unit, column["stage"]))
    waits, raised = _synchronised(block)
    column = {k: v[order] for k, v in column.items()}
    unit = unit[order]
    stage, kernel, join = column["stage"], column["kernel"], column["join"]
    chip = unit // (len(schedule.units) // schedule.chips)
    joined = np.where(join >= 0, join * schedule.chips + chip, -1)
    heads = np.zeros(int(stage.max()) + 1, np.int64)
    owner = np.full(len(heads), -1)
    owner[stage] = kernel
    heads[:] = np.concatenate([[1], owner[1:] != owner[:-1]])
    stages = Stages(stage, unit, ranks(stage, unit), joined, heads)
    far = block.steps.column("bytes")[order]
    return Prepared(
        far,
        column["near"],
        column["work"],
        column["engine"],
        column["sharers"],
        column["lead"],
        stages,
        block.repeat,
        [waits[i] for i in order.tolist()],
        [raised[i] for i in order.tolist()],
    )


def _synchronised(block: Block) -> tuple[list[list[int]], list[list[int]]]:
    """(counters waited for, counters raised) of each row."""
    offsets, flat = block.steps.args()
    values, at = flat.tolist(), (offsets + len(FIELDS)).tolist()
    waits = [values[a + 1 : a + 1 + 3 * values[a] : 3] for a in at[:-1]]
    ends = offsets[1:].tolist()
    raised = [values[a + 2 + 3 * values[a] : end] for a, end in zip(at[:-1], ends, strict=True)]
    return waits, raised
