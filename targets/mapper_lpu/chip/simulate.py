"""The loop over cycles: producers put their vectors on the streams, then consumers see them."""

from __future__ import annotations

from pathlib import Path

from mapper_kernels.jit import entry, jit
from mapper_lpu.chip import mxm, units, vxm
from mapper_lpu.chip.codes import (
    ACTIVATE,
    ADD,
    COLLISION,
    CYCLE,
    EMIT,
    INSTALL,
    LOAD,
    OK,
    OPERATION,
    OUT_CYCLE,
    OUT_DIRECTION,
    OUT_ROW,
    OUT_STREAM,
    OUT_WIDTH,
    PERMUTE,
    STREAMS,
    TAKEN,
    UNIT,
    X,
)
from mapper_lpu.chip.state import DIAGONAL, MAKER, POOL, WHEN, Array, Chip, Row, diagonal, inline, look

_memory, _permute, _vector, _matrix, _pair, _emit = (
    units.memory,
    units.permute,
    vxm.execute,
    mxm.execute,
    mxm.pair,
    mxm.emit,
)


@inline
def _produce(chip: Chip, row: Row, t: int) -> int:
    """Put the vectors of an instruction on their stream registers. Returns a fault number."""
    if row[OPERATION] == EMIT:
        fault = _emit(chip, row, t)
        if fault != OK:
            return fault
    direction = row[OUT_DIRECTION]
    path = diagonal(direction, row[X], t)
    for k in range(row[OUT_WIDTH]):
        stream = row[OUT_STREAM] + k
        register = chip.registers[direction, stream, path % chip.registers.shape[2]]
        if register[DIAGONAL] == path and register[WHEN] == t:
            return COLLISION
        register[DIAGONAL] = path
        register[POOL] = (row[OUT_ROW] + k) % chip.pool.shape[0]
        register[WHEN] = t
        register[MAKER] = row[UNIT]
    return OK


@jit
def _remember(past: Array, registers: Array, t: int) -> None:
    """Keep what is at x = 0 in this cycle: the VXM takes its outer operands `entry` cycles later."""
    slot = t % past.shape[0]
    for direction in range(2):
        for stream in range(STREAMS):
            past[slot, direction, stream] = look(registers, direction, stream, 0, t)


@inline
def _consume(chip: Chip, row: Row, t: int) -> int:
    """One instruction at issue. Returns a fault number."""
    unit, operation = row[UNIT], row[OPERATION]
    if t < chip.busy[unit]:
        return TAKEN
    chip.busy[unit] = t + (chip.timing.install if operation == INSTALL else 1)
    if operation < ADD:
        return _memory(chip, row, t)
    if operation < LOAD:
        return _vector(chip, row, t)
    if operation < EMIT:
        return _matrix(chip, row, t)
    return _permute(chip, row, t) if operation == PERMUTE else OK


@entry(Path(__file__).parent)
def simulate(chip: Chip, program: Array, order: Array, first: int, last: int) -> tuple[int, int]:
    """Run cycles first..last. Returns (fault number, row of `program`) of the first fault, or (0, -1).

    program: int64 [n, COLUMNS] (codes.py), sorted by cycle; order: rows that produce, sorted by OUT_CYCLE.
    """
    begin = 0
    produced = 0
    for t in range(first, last + 1):
        while produced < len(order) and program[order[produced], OUT_CYCLE] == t:
            fault = _produce(chip, program[order[produced]], t)
            if fault != OK:
                return fault, order[produced]
            produced += 1
        _remember(chip.past, chip.registers, t)
        end = begin
        while end < len(program) and program[end, CYCLE] == t:
            fault = _consume(chip, program[end], t)
            if fault != OK:
                return fault, end
            end += 1
        for i in range(begin, end):
            if program[i, OPERATION] == ACTIVATE:
                fault = _pair(chip, program[i], t)
                if fault != OK:
                    return fault, i
        begin = end
    return OK, -1
