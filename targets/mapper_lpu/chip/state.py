"""The state of the chip while a program runs, and what every unit does with it: streams and memory bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from mapper_kernels.jit import jit
from mapper_lpu.chip.codes import (
    ALUS,
    LANES,
    PLANES,
    STREAMS,
)
from mapper_lpu.chip.numerics import PARTIALS

Array = npt.NDArray[Any]
Row = npt.NDArray[np.int64]

DIAGONAL, POOL, WHEN, MAKER = range(4)

F = TypeVar("F", bound=Callable[..., Any])


def inline(function: F) -> F:
    """Compile into the caller: for functions that take the whole Chip, which would be costly to pass."""
    return cast(F, njit(forceinline=True)(function))


class Timing(NamedTuple):
    """Constants of the machine in cycles, and X, the position of the MXM."""

    entry: int
    alu: int
    mxm: int
    install: int
    edge: int


class Chip(NamedTuple):
    """Everything that changes during a run. A vector on a stream is a row of `pool`; registers hold numbers.

    A stream register moves with its vector: the one of direction E that is at x in cycle t has number x - t
    modulo the number of positions, of direction W x + t. It is valid at (x, t) where its DIAGONAL is exactly
    x -+ t.
    """

    timing: Timing
    registers: Array  # int64 [2, 32, 2X+1, 4]: DIAGONAL, POOL row, WHEN produced, MAKER (unit)
    past: Array  # int64 [entry+1, 2, 32]: pool rows at x = 0 in the last cycles, -1 = invalid
    pool: Array  # uint8 [rows, 320]
    data: Array  # int64 [memories]: address of the bytes
    written: Array  # int64 [memories]: address of the flags
    size: Array  # int64 [memories]: bytes
    busy: Array  # int64 [units]: first cycle in which the queue may issue again
    operands: Array  # uint32 [3, 320]: A, B, result
    kept: Array  # uint32 [16, alu+1, 320]: latest results of each ALU
    kept_at: Array  # int64 [16, alu+1]: their issue cycles
    kept_bytes: Array  # int64 [16, alu+1]: their widths
    issued: Array  # int64 [16]: instructions issued so far
    buffer: Array  # uint8 [4, 320, 320]: load buffers, row n = weights of output n
    loaded: Array  # bool [4, 320]
    array: Array  # uint8 [4, 320, 320]: installed weights
    pending: Array  # int64 [4]: cycle from which the load buffer counts as installed; -1: none
    ready: Array  # bool [4]: something is installed
    weights: Array  # float32 [4, 320, 320]: the array as numbers
    decoded: Array  # int64 [4]: type for which `weights` holds; -1: none
    accepted: Array  # int64 [4, 3]: cycle, type and stream of the last activation
    results: Array  # uint32 [4, latency+1, 320]
    results_at: Array  # int64 [4, latency+1]: cycle of the activation
    vector: Array  # float64 [2, 320]: activation, sums
    partial: Array  # float64: scratch of the dot product
    permutes: Array  # int64 [maps, 320]


def empty_chip(
    timing: Timing, pool: int, units: int, permutes: Array, memories: tuple[Array, Array, Array]
) -> Chip:
    """A chip with nothing valid in it. `memories`: addresses of data, of flags, and sizes in bytes."""
    tile = (PLANES, LANES, LANES)
    depth = timing.alu + 1
    return Chip(
        timing,
        np.full((2, STREAMS, 2 * timing.edge + 1, 4), -(1 << 60), np.int64),
        np.full((timing.entry + 1, 2, STREAMS), -1, np.int64),
        np.zeros((pool, LANES), np.uint8),
        *memories,
        np.zeros(units, np.int64),
        np.zeros((3, LANES), np.uint32),
        np.zeros((ALUS, depth, LANES), np.uint32),
        np.zeros((ALUS, depth), np.int64),
        np.zeros((ALUS, depth), np.int64),
        np.zeros(ALUS, np.int64),
        np.zeros(tile, np.uint8),
        np.zeros((PLANES, LANES), np.bool_),
        np.zeros(tile, np.uint8),
        np.full(PLANES, -1, np.int64),
        np.zeros(PLANES, np.bool_),
        np.zeros(tile, np.float32),
        np.full(PLANES, -1, np.int64),
        np.full((PLANES, 3), -1, np.int64),
        np.zeros((PLANES, timing.mxm + 1, LANES), np.uint32),
        np.full((PLANES, timing.mxm + 1), -1, np.int64),
        np.zeros((2, LANES), np.float64),
        np.zeros(PARTIALS, np.float64),
        permutes,
    )


def _as_pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for numba.carray."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> ir.Value:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_as_pointer)


@inline
def view(address: Any, size: Any) -> Any:
    """The `size` bytes at `address` as a uint8 array."""
    return carray(_pointer(address), (size,), np.uint8)


@inline
def diagonal(direction: int, x: int, t: int) -> int:
    """The number that a vector keeps while it moves."""
    return x - t if direction == 0 else x + t


@inline
def look(registers: Any, direction: int, stream: int, x: int, t: int) -> Any:
    """Pool row of the vector on a stream register in cycle t; -1 where there is none."""
    path = diagonal(direction, x, t)
    slot = path % registers.shape[2]
    if registers[direction, stream, slot, DIAGONAL] != path:
        return -1
    return registers[direction, stream, slot, POOL]


@jit
def copy(source: Any, target: Any) -> None:
    """Copy one row of lanes, element by element."""
    for i in range(LANES):
        target[i] = source[i]
