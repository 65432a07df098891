"""MEM and SXM: what their instructions do at issue. Each returns a fault number, 0 where all is well."""

from __future__ import annotations

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
from mapper_lpu.chip.state import Chip, Row, inside, look, read_row, view, write_row

SUPERLANE = 16
SUPERLANES = LANES // SUPERLANE
SKIPPED = 65535


@jit
def memory(chip: Chip, row: Row, t: int) -> int:
    """mem.read, mem.write, mem.gather, mem.scatter."""
    operation = row[OPERATION]
    if operation == READ:
        return read_row(chip, row, chip.pool[row[OUT_ROW]])
    if operation == GATHER:
        return _gather(chip, row, t)
    source = look(chip, row[ARGS], row[ARGS + 1], row[X], t)
    if source < 0:
        return NO_VECTOR
    if operation == WRITE:
        return write_row(chip, row, chip.pool[source])
    return _scatter(chip, row, t, chip.pool[source])


@jit
def _index(low: np.ndarray, high: np.ndarray, superlane: int) -> int:
    lane = superlane * SUPERLANE
    return int(low[lane]) | int(high[lane]) << 8


@jit
def _gather(chip: Chip, row: Row, t: int) -> int:
    low = look(chip, row[ARGS + 2], row[ARGS + 3], row[X], t)
    high = look(chip, row[ARGS + 2], row[ARGS + 3] + 1, row[X], t)
    if low < 0 or high < 0:
        return NO_VECTOR
    if not inside(chip, row):
        return OUTSIDE
    size = row[ROWS] * LANES
    data = view(chip.data[row[MEMORY]] + row[ADDRESS], size)
    flags = view(chip.written[row[MEMORY]] + row[ADDRESS], size)
    target = chip.pool[row[OUT_ROW]]
    for superlane in range(SUPERLANES):
        index = _index(chip.pool[low], chip.pool[high], superlane)
        if index >= row[ROWS]:
            return BAD_INDEX
        first = superlane * SUPERLANE
        for i in range(first, first + SUPERLANE):
            if not flags[index * LANES + i]:
                return UNWRITTEN
            target[i] = data[index * LANES + i]
    return OK


@jit
def _scatter(chip: Chip, row: Row, t: int, source: np.ndarray) -> int:
    low = look(chip, row[ARGS + 2], row[ARGS + 3], row[X], t)
    high = look(chip, row[ARGS + 2], row[ARGS + 3] + 1, row[X], t)
    if low < 0 or high < 0:
        return NO_VECTOR
    if not inside(chip, row):
        return OUTSIDE
    size = row[ROWS] * LANES
    data = view(chip.data[row[MEMORY]] + row[ADDRESS], size)
    flags = view(chip.written[row[MEMORY]] + row[ADDRESS], size)
    for superlane in range(SUPERLANES):
        index = _index(chip.pool[low], chip.pool[high], superlane)
        if index == SKIPPED:
            continue
        if index >= row[ROWS]:
            return BAD_INDEX
        first = superlane * SUPERLANE
        for i in range(first, first + SUPERLANE):
            data[index * LANES + i] = source[i]
            flags[index * LANES + i] = 1
    return OK


@jit
def permute(chip: Chip, row: Row, t: int) -> int:
    """sxm.permute: `width` streams, each lane by lane through one map; -1 gives zero."""
    lanes = chip.permutes[row[ARGS + 5]]
    for k in range(row[ARGS + 4]):
        source = look(chip, row[ARGS], row[ARGS + 1] + k, row[X], t)
        if source < 0:
            return NO_VECTOR
        bytes_in = chip.pool[source]
        bytes_out = chip.pool[(row[OUT_ROW] + k) % chip.pool.shape[0]]
        for i in range(LANES):
            bytes_out[i] = bytes_in[lanes[i]] if lanes[i] >= 0 else 0
    return OK
