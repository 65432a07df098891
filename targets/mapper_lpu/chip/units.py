"""MEM and SXM: what their instructions do at issue. Each returns a fault number, 0 where all is well."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import jit
from mapper_lpu.chip.codes import (
    ADDRESS,
    ARGS,
    BAD_INDEX,
    GATHER,
    LANES,
    MEMORY,
    NO_VECTOR,
    OK,
    OPERATION,
    OUT_ROW,
    OUTSIDE,
    READ,
    ROWS,
    UNWRITTEN,
    WRITE,
    X,
)
from mapper_lpu.chip.state import Chip, Row, inline, look, view

SUPERLANE = 16
SKIPPED = 65535


@inline
def memory(chip: Chip, row: Row, t: int) -> int:
    """mem.read, mem.write, mem.gather, mem.scatter."""
    operation, number, size = row[OPERATION], row[MEMORY], row[ROWS] * LANES
    if row[ADDRESS] + size > chip.size[number]:
        return OUTSIDE
    data = view(chip.data[number] + row[ADDRESS], size)
    flags = view(chip.written[number] + row[ADDRESS], size)
    if operation == READ:
        return _read(data, flags, chip.pool[row[OUT_ROW]])
    registers, args, x = chip.registers, row[ARGS : ARGS + 4], row[X]
    source = 0 if operation == GATHER else look(registers, args[0], args[1], x, t)
    if source < 0:
        return NO_VECTOR
    if operation == WRITE:
        _write(data, flags, chip.pool[source])
        return OK
    low = look(registers, args[2], args[3], x, t)
    high = look(registers, args[2], args[3] + 1, x, t)
    if low < 0 or high < 0:
        return NO_VECTOR
    if operation == GATHER:
        return _gather(data, flags, chip.pool[low], chip.pool[high], chip.pool[row[OUT_ROW]])
    return _scatter(data, flags, chip.pool[low], chip.pool[high], chip.pool[source])


@jit
def _read(data: Any, flags: Any, target: Any) -> int:
    known = np.uint8(1)
    for i in range(LANES):
        target[i] = data[i]
        known &= flags[i]
    return OK if known else UNWRITTEN


@jit
def _write(data: Any, flags: Any, source: Any) -> None:
    for i in range(LANES):
        data[i] = source[i]
        flags[i] = 1


@jit
def _gather(data: Any, flags: Any, low: Any, high: Any, target: Any) -> int:
    for first in range(0, LANES, SUPERLANE):
        start = (int(low[first]) | int(high[first]) << 8) * LANES
        if start >= len(data):
            return BAD_INDEX
        for i in range(first, first + SUPERLANE):
            if not flags[start + i]:
                return UNWRITTEN
            target[i] = data[start + i]
    return OK


@jit
def _scatter(data: Any, flags: Any, low: Any, high: Any, source: Any) -> int:
    for first in range(0, LANES, SUPERLANE):
        index = int(low[first]) | int(high[first]) << 8
        if index == SKIPPED:
            continue
        start = index * LANES
        if start >= len(data):
            return BAD_INDEX
        for i in range(first, first + SUPERLANE):
            data[start + i] = source[i]
            flags[start + i] = 1
    return OK


@inline
def permute(chip: Chip, row: Row, t: int) -> int:
    """sxm.permute: `width` streams, each lane by lane through one map; -1 gives zero."""
    lanes = chip.permutes[row[ARGS + 5]]
    for k in range(row[ARGS + 4]):
        source = look(chip.registers, row[ARGS], row[ARGS + 1] + k, row[X], t)
        if source < 0:
            return NO_VECTOR
        _permute(lanes, chip.pool[source], chip.pool[(row[OUT_ROW] + k) % chip.pool.shape[0]])
    return OK


@jit
def _permute(lanes: Any, source: Any, target: Any) -> None:
    for i in range(LANES):
        target[i] = source[lanes[i]] if lanes[i] >= 0 else 0
