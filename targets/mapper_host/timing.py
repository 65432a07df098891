"""How long a step takes: one formula, used by the lowering, by retiming and in no bound.

time = step.overhead + max(streamed / stream rate + other bytes / cache.bandwidth, operations / rate of the
opcode)

Streamed bytes are those of weights and state. Their rate follows from the program's working set W (all
weights and state that it reads once) and the last-level cache C: up to 3/4 C everything stays cached from run
to run, from 3/2 C on a cyclic sweep finds nothing in it, in between the share of misses grows linearly.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mapper.machine import Machine
from mapper.schedule.tables import Int
from mapper_host.opcodes import (
    ACTIVATION,
    ATTEND_AT,
    ATTENTION,
    CACHED_ATTENTION,
    CONV,
    EXPERTS_DOWN,
    EXPERTS_UP,
    GATE,
    LINEAR_KN,
    LINEAR_NK,
    MATMUL,
    MERGE_SPLITS,
    MOE,
    NORM,
    OPCODES,
    PROJECT,
    ROPE,
    ROPE_AT,
)

CLOCK_HZ = 1e9
"""The schedule counts nanoseconds: the host's cores have no common, constant clock. One with a step of
more than MOST of them counts microseconds, or milliseconds."""
MOST = 2**31 - 1
"""Most cycles of a step: see STEP_SCHEMA."""

VECTOR = (
    LINEAR_KN, LINEAR_NK, PROJECT, MATMUL, CONV, MOE, EXPERTS_UP, EXPERTS_DOWN, ATTENTION, CACHED_ATTENTION,
    ATTEND_AT,
)  # fmt: skip
ROWS = (NORM, ROPE, ROPE_AT, GATE, ACTIVATION, MERGE_SPLITS)


def rates(machine: Machine) -> npt.NDArray[np.float64]:
    """Operations per second of each opcode."""
    found = np.full(len(OPCODES), machine.value("rate.generic"))
    found[list(VECTOR)] = machine.value("rate.vector")
    found[list(ROWS)] = machine.value("rate.rows")
    return found


def miss_fraction(working_set: float, cache: float) -> float:
    """Share of the streamed bytes that come from memory (see module)."""
    return float(np.clip((working_set - 0.75 * cache) / (0.75 * cache), 0.0, 1.0))


def durations(
    machine: Machine,
    opcode: Int,
    streamed: Int,
    moved: Int,
    flops: Int,
    working_set: float,
    clock_hz: float = CLOCK_HZ,
) -> Int:
    """Cycles of each step (at least 1). `moved` are all bytes of a step, `streamed` those of weights
    and state."""
    miss = miss_fraction(working_set, machine.value("cache.bytes"))
    near = machine.value("cache.bandwidth")
    far = machine.value("memory.bandwidth")
    data = streamed * (miss / far + (1.0 - miss) / near) + (moved - streamed) / near
    seconds = machine.value("step.overhead") + np.maximum(data, flops / rates(machine)[opcode])
    return np.maximum(1, np.ceil(seconds * clock_hz)).astype(np.int64)
