"""VXM: operands from immediates, streams and output registers; results to streams and the output register."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import jit
from mapper_lpu.chip.codes import (
    ACC,
    AGAINST,
    ARGS,
    CAST,
    F16,
    I8,
    I16,
    IMMEDIATE,
    LANES,
    LOCAL,
    NEG,
    NO_RESULT,
    NO_VECTOR,
    NOT_INNER,
    OK,
    OPERATION,
    OTHER_WIDTH,
    OUT_ROW,
    OUT_WIDTH,
    OUTER,
    UNIT,
)
from mapper_lpu.chip.numerics import binary_lanes, cast_lanes, unary_lanes
from mapper_lpu.chip.state import DIAGONAL, MAKER, WHEN, Chip, Row, copy, diagonal, inline, look

RANKS = 4


@inline
def width(kind: int) -> int:
    """Bytes of a type."""
    return 1 if kind == I8 else 2 if kind in (I16, F16) else 4


@inline
def _acc(chip: Chip, alu: int, size: int, t: int, target: Any) -> int:
    """The result of the ALU's last instruction that has left its pipeline."""
    depth = chip.kept.shape[1]
    for back in range(1, min(depth, chip.issued[alu]) + 1):
        slot = (chip.issued[alu] - back) % depth
        if chip.kept_at[alu, slot] <= t - chip.timing.alu:
            if chip.kept_bytes[alu, slot] != size:
                return OTHER_WIDTH
            copy(chip.kept[alu, slot], target)
            return OK
    return NO_RESULT


@inline
def _inner(registers: Any, row: Row, direction: int, stream: int, t: int) -> int:
    """Fault number of an inner operand's byte stream."""
    path = diagonal(direction, 0, t)
    register = registers[direction, stream, path % registers.shape[2]]
    if register[DIAGONAL] != path:
        return NO_VECTOR
    if register[WHEN] != t:
        return NOT_INNER
    maker = (register[MAKER] - row[UNIT] + row[LOCAL]) % RANKS
    own = row[LOCAL] % RANKS
    right = maker < own if direction == 0 else maker > own
    return OK if right else AGAINST


@inline
def _operand(chip: Chip, row: Row, which: int, size: int, t: int) -> int:
    """Fetch operand A (0) or B (1) into the operand registers."""
    target = chip.operands[which]
    kind, direction, stream = row[ARGS + 3 * which], row[ARGS + 3 * which + 1], row[ARGS + 3 * which + 2]
    if kind == IMMEDIATE:
        for i in range(LANES):
            target[i] = np.uint32(direction)
        return OK
    if kind == ACC:
        return _acc(chip, row[LOCAL], size, t, target)
    for k in range(size):
        if kind == OUTER:
            entered = t - chip.timing.entry
            source = chip.past[entered % chip.past.shape[0], direction, stream + k] if entered >= 0 else -1
        else:
            fault = _inner(chip.registers, row, direction, stream + k, t)
            if fault != OK:
                return fault
            source = look(chip.registers, direction, stream + k, 0, t)
        if source < 0:
            return NO_VECTOR
        _gather_byte(chip.pool[source], target, np.uint32(8 * k), k == 0)
    return OK


@jit
def _gather_byte(source: Any, target: Any, shift: Any, first: bool) -> None:
    if first:
        for i in range(LANES):
            target[i] = source[i]
    else:
        for i in range(LANES):
            target[i] |= np.uint32(source[i]) << shift


@inline
def execute(chip: Chip, row: Row, t: int) -> int:
    """One VXM instruction. Returns a fault number."""
    operation = row[OPERATION]
    kind, to = row[ARGS + 8], row[ARGS + 9]
    fault = _operand(chip, row, 0, width(kind), t)
    if fault == OK and operation < NEG:
        fault = _operand(chip, row, 1, width(kind), t)
    if fault != OK:
        return fault
    result = chip.operands[2]
    if operation < NEG:
        binary_lanes(operation, chip.operands[0], chip.operands[1], result)
    elif operation < CAST:
        unary_lanes(operation, chip.operands[0], result)
    else:
        cast_lanes(chip.operands[0], result, kind, to)
    alu = row[LOCAL]
    slot = chip.issued[alu] % chip.kept.shape[1]
    chip.issued[alu] += 1
    copy(result, chip.kept[alu, slot])
    chip.kept_at[alu, slot] = t
    chip.kept_bytes[alu, slot] = width(to)
    split(chip.pool, row, result)
    return OK


@jit
def split(pool: Any, row: Row, lanes: Any) -> None:
    """Spread the bytes of a result over its vectors of the pool, low byte first."""
    for k in range(row[OUT_WIDTH]):
        target = pool[(row[OUT_ROW] + k) % pool.shape[0]]
        shift = np.uint32(8 * k)
        for i in range(LANES):
            target[i] = np.uint8(lanes[i] >> shift)
