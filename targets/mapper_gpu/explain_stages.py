"""What a pipeline's stages take, and what leaves it with several micro-batches in flight."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper.backend import Finding
from mapper.schedule.tables import Schedule
from mapper_gpu.hardware import Gpu


def stages(schedule: Schedule, phase: str, chip: Gpu) -> tuple[Finding, ...]:
    """A row per stage: layers (embedding and head counted as blocks), time, bytes on each of its chips, and
    how many micro-batches' caches fit beside the weights. The title has the step's latency, which is the
    stages' sum, and the rate with a micro-batch in every stage: one leaves per time of the slowest."""
    plan: Any = schedule.plan
    count = int(plan.get("stages", 1))
    if count == 1:
        return ()
    program = schedule.programs[phase]
    numbers = np.array([int(r["stage"]) for r in plan["blocks"][phase]])
    begin = [min(b.start for b, n in zip(program.blocks, numbers, strict=True) if n == s)
             for s in range(count)]  # fmt: skip
    ends = [*begin[1:], program.cycles]
    held, caches = _held(schedule)
    room, size = chip.capacity * (1 - chip.reserved), schedule.chips // count
    rows: list[tuple[str | float, ...]] = []
    for s in range(count):
        mine = [b for b, n in zip(program.blocks, numbers, strict=True) if n == s]
        fit = 1 + int((room - held[s * size]) // caches[s * size]) if caches[s * size] else 0
        us = 1e6 * (ends[s] - begin[s]) / schedule.clock_hz
        runs = sum(b.repeat for b in mine)
        rows.append((s, runs, us, held[s * size] / 1e9, caches[s * size] / 1e9, fit if fit else "any"))
    tokens = schedule.request.batch * program.sequence
    seconds, slowest = program.cycles / schedule.clock_hz, max(float(r[2]) for r in rows) / 1e6
    title = (
        f"pipeline of {count} stages of {size} chips: one micro-batch takes {1e6 * seconds:.1f} us "
        f"({tokens / seconds:.1f} tokens/s); with {count} in flight {tokens / slowest:.1f} tokens/s in all"
    )
    columns = ("stage", "blocks run", "us", "GB per chip", "of it caches", "micro-batches that fit")
    return (Finding(title, columns, tuple(rows)),)


def _held(schedule: Schedule) -> tuple[list[float], list[float]]:
    """(bytes of all buffers, bytes of caches) on each chip."""
    memory = schedule.buffers.column("memory").to_numpy()
    size = schedule.buffers.column("bytes").to_numpy().astype(np.float64)
    state = np.zeros(len(size), bool)
    for port in schedule.ports:
        if port.kind == "state":
            state[list(port.buffers)] = True
    whole = np.bincount(memory, size, minlength=schedule.chips)
    caches = np.bincount(memory[state], size[state], minlength=schedule.chips)
    return whole.tolist(), caches.tolist()
