"""MXM: load buffers, installed arrays, activations and their results."""

from __future__ import annotations

import numpy as np

from mapper_lpu.chip.codes import (
    ACTIVATE,
    ARGS,
    F16,
    I8,
    LANES,
    LOAD,
    LOCAL,
    NO_ACTIVATION,
    NO_PAIR,
    NO_VECTOR,
    NO_WEIGHTS,
    NOT_LOADED,
    OK,
    OPERATION,
    X,
)
from mapper_lpu.chip.numerics import dot_rows, signed_bytes, split_halves, widen
from mapper_lpu.chip.state import Chip, Row, copy, inline, look
from mapper_lpu.chip.vxm import split

GROUP = 16


@inline
def _settle(chip: Chip, plane: int, t: int) -> None:
    """Carry out an install whose time has come: as late as it matters, since nothing is loaded in between."""
    if chip.pending[plane] < 0 or t < chip.pending[plane]:
        return
    for n in range(LANES):
        copy(chip.buffer[plane, n], chip.array[plane, n])
    chip.pending[plane] = -1
    chip.ready[plane] = True
    chip.decoded[plane] = -1
    if chip.decoded[plane ^ 1] == F16:
        chip.decoded[plane ^ 1] = -1


@inline
def _load(chip: Chip, row: Row, t: int, outward: int) -> int:
    plane = row[LOCAL]
    for i in range(GROUP):
        source = look(chip.registers, outward, row[ARGS + 1] + i, row[X], t)
        if source < 0:
            return NO_VECTOR
        n = GROUP * row[ARGS] + i
        copy(chip.pool[source], chip.buffer[plane, n])
        chip.loaded[plane, n] = True
    return OK


@inline
def _decode(chip: Chip, plane: int, kind: int) -> None:
    """Make `weights` hold the installed bytes as numbers of this type."""
    if chip.decoded[plane] == kind:
        return
    if kind == I8:
        signed_bytes(chip.array[plane], chip.weights[plane])
        chip.decoded[plane] = I8
        return
    low, high = plane & 2, plane | 1
    split_halves(chip.array[low], chip.array[high], chip.weights[low], chip.weights[high])
    chip.decoded[low] = F16
    chip.decoded[high] = F16


@inline
def _activate(chip: Chip, row: Row, t: int, outward: int) -> int:
    plane, kind, stream = row[LOCAL], row[ARGS], row[ARGS + 1]
    _settle(chip, plane ^ 1, t)
    if not chip.ready[plane] or (kind == F16 and not chip.ready[plane ^ 1]):
        return NO_WEIGHTS
    low = look(chip.registers, outward, stream, row[X], t)
    high = look(chip.registers, outward, stream + 1, row[X], t) if kind == F16 else low
    if low < 0 or high < 0:
        return NO_VECTOR
    vector, sums = chip.vector[0], chip.vector[1]
    first, second = chip.pool[low], chip.pool[high]
    for k in range(LANES):
        if kind == F16:
            vector[k] = widen(np.uint32(first[k]) | np.uint32(second[k]) << 8)
        else:
            vector[k] = np.int8(first[k])
    _decode(chip, plane, kind)
    dot_rows(chip.weights[plane], vector, chip.partial, sums)
    slot = t % chip.results.shape[1]
    result = chip.results[plane, slot]
    for n in range(LANES):
        result[n] = np.float32(sums[n]).view(np.uint32) if kind == F16 else np.uint32(np.int32(sums[n]))
    chip.results_at[plane, slot] = t
    chip.accepted[plane, 0] = t
    chip.accepted[plane, 1] = kind
    chip.accepted[plane, 2] = stream
    return OK


@inline
def execute(chip: Chip, row: Row, t: int) -> int:
    """mxm.load, mxm.install or mxm.activate at issue. Returns a fault number."""
    plane = row[LOCAL]
    outward = 0 if row[X] > 0 else 1
    _settle(chip, plane, t)
    if row[OPERATION] == LOAD:
        return _load(chip, row, t, outward)
    if row[OPERATION] == ACTIVATE:
        return _activate(chip, row, t, outward)
    for n in range(LANES):
        if not chip.loaded[plane, n]:
            return NOT_LOADED
    chip.pending[plane] = t + chip.timing.install
    return OK


@inline
def pair(chip: Chip, row: Row, t: int) -> int:
    """Fault number at the end of an activation's cycle: both planes of an fp16 pair must take the same."""
    own, other = chip.accepted[row[LOCAL]], chip.accepted[row[LOCAL] ^ 1]
    if own[1] != F16:
        return OK
    return OK if other[0] == t and other[1] == F16 and other[2] == own[2] else NO_PAIR


@inline
def emit(chip: Chip, row: Row, t: int) -> int:
    """mxm.emit: fill the vectors that are produced in this very cycle."""
    plane = row[LOCAL]
    accepted = t - chip.timing.mxm
    slot = accepted % chip.results.shape[1]
    if accepted < 0 or chip.results_at[plane, slot] != accepted:
        return NO_ACTIVATION
    split(chip.pool, row, chip.results[plane, slot])
    return OK
