"""Products with many rows of x in the tiles of AMX, where `in_tiles` says that they win; `linear` does the
others.

What is prepared lies in one region of `tiled_size` bytes; behind x there is room for 32 packed weight rows. K
is done in stretches of `STRETCH`, so that the tiles of x stay in the second-level cache; sums of later
stretches are added to y.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.amx import PLANES, TILE, floats, integers, usable
from mapper_kernels.dot import OFFSET
from mapper_kernels.formats import FORMATS
from mapper_kernels.jit import jit
from mapper_kernels.memory import f32
from mapper_kernels.sizes import FEWEST, STRETCH
from mapper_kernels.tiles import WEIGHT_PLANES, pack, pack_scales, row, turn, write

_NAMES = sorted(FORMATS, key=lambda name: FORMATS[name].code)
LEAST = dict.fromkeys(FORMATS, FEWEST) | {"f32": 48, "f16": 32}
"""Fewest rows of x for which tiles win, by format (python -m benchmarks.prefill --threads 1 --rows 16 32 48
64): weights in several planes take longest to pack."""
_LEAST = np.array([LEAST[name] for name in _NAMES])
_INTEGER = np.array([name in OFFSET for name in _NAMES])
_W_PLANES = np.array([WEIGHT_PLANES.get(name, 1) for name in _NAMES])
_X_PLANES = np.array([2 if name in OFFSET else PLANES for name in _NAMES])
_CHUNK = np.array([64 if name in OFFSET else 32 for name in _NAMES])
_BITS = np.array([FORMATS[name].bits for name in _NAMES])
_SCALE = np.array([FORMATS[name].scale for name in _NAMES])
_BLOCKED = np.array([FORMATS[name].blocked for name in _NAMES])
_FACTOR = np.array([256.0 if name == "f8e4m3" else 1.0 for name in _NAMES], np.float32)
"""What the sums of weights are multiplied by: see `dot.weights_f`."""
_F8: Any = FORMATS["f8e4m3"].code
_ONE: Any = np.int64(1)
_ROWS: Any = 32
"""Weight rows, and rows of x, at a time."""


_floats1, _floats2, _floats3 = (floats(planes) for planes in (1, 2, 3))
_row_floats, _row_integers = row(False), row(True)


@jit
def _pack_rows(
    code: int, w: int, w_row: int, s: int, s_row: int, z: int, z_row: int, rows: int, k: int, out: int,
    scales: int,
) -> None:  # fmt: skip
    pack(code, w, w_row, z, z_row, rows, k, out)
    if _INTEGER[code]:
        pack_scales(code, s, s_row, rows, k, scales)


@jit
def _turn(at: int, tiles: int) -> None:
    turn(at, tiles)


@jit
def in_tiles(code: int, m: int) -> bool:
    """Whether a product with m rows of x takes the tiles."""
    if m < _LEAST[code]:
        return False
    found: bool = usable()
    return found


@jit
def _tile_bytes(code: int, k: int) -> int:
    """Bytes of 16 rows of x in tiles."""
    size: int = (k + _CHUNK[code] - 1) // _CHUNK[code] * _X_PLANES[code] * TILE
    return size


@jit
def _scales_at(code: int, m: int, k: int) -> int:
    """Where the scales of x lie behind its tiles."""
    size: int = (m + _ROWS - 1) // _ROWS * 2 * _tile_bytes(code, k)
    return size


@jit
def _room_at(code: int, m: int, k: int) -> int:
    """Where the room for weights begins."""
    scales = (m + _ROWS - 1) // _ROWS * 2 * ((k + 63) // 64 * 128) if _INTEGER[code] else 0
    size: int = _scales_at(code, m, k) + scales
    return size


@jit
def tiled_size(code: int, m: int, k: int) -> int:
    """Bytes of m prepared rows of x [K], with the room that the product needs."""
    stretch = min((k + 63) // 64 * 64, STRETCH)
    weights = 32 * stretch * 2 * _W_PLANES[code]
    size: int = _room_at(code, m, k) + weights + 4 * stretch + 128 + 8 * TILE
    return size


@jit
def tile_row(code: int, x: int, r: int, m: int, k: int, out: int) -> None:
    """Prepare row r of m, x [K] float32. `tile_end` must follow the last one."""
    to = out + r // 16 * _tile_bytes(code, k) + r % 16 * 64
    if _INTEGER[code]:
        scales = out + _scales_at(code, m, k) + r // 16 * ((k + 63) // 64 * 128) + r % 16 * 4
        _row_integers(x, k, to, scales)
    else:
        _row_floats(x, k, to, 0)


@jit
def tile_end(code: int, m: int, k: int, out: int) -> None:
    """All m rows are there: make them what the product takes."""
    _turn(out, (m + 15) // 16 * _tile_bytes(code, k) // TILE)


@jit
def tile_rows(code: int, x: int, x_row: int, m: int, k: int, out: int) -> None:
    """Prepare m rows of x [K] float32, `x_row` bytes apart, in `tiled_size` bytes at `out`."""
    for r in range(m):
        tile_row(code, x + r * x_row, r, m, k, out)
    tile_end(code, m, k, out)


@jit
def _write(sums: int, factors: int, y: int, y_row: int, rows: int, columns: int, more: int) -> None:
    if rows > 0 and columns > 0:
        _turn(sums, _ONE)
        write(sums, factors, y, y_row, rows, columns, more)


@jit
def _floats_group(
    code: int, w: int, x: int, x_step: int, chunks: int, sums: int, factors: int, y: int, y_row: int,
    m: int, rows: int, more: int,
) -> None:  # fmt: skip
    """y [m, rows] from 32 packed weight rows."""
    for t in range(0, m, _ROWS):
        at = x + t // 16 * x_step
        if _W_PLANES[code] == 1:
            _floats1(w, at, x_step, chunks, sums)
        elif _W_PLANES[code] == 2:
            _floats2(w, at, x_step, chunks, sums)
        else:
            _floats3(w, at, x_step, chunks, sums)
        for i in range(2):
            for j in range(2):
                part, to = sums + (2 * i + j) * TILE, y + (t + 16 * j) * y_row + 64 * i
                _write(part, factors + 64 * i, to, y_row, m - t - 16 * j, rows - 16 * i, more)


@jit
def _integers_group(
    w: int, ws: int, x: int, x_step: int, xs: int, xs_step: int, chunks: int, sums: int, factors: int, y: int,
    y_row: int, m: int, rows: int, more: int,
) -> None:  # fmt: skip
    for t in range(0, m, 16):
        at, scales = x + t // 16 * x_step, xs + t // 16 * xs_step
        for i in range((rows + 15) // 16):
            integers(w + i * TILE, ws + 64 * i, at, scales, chunks, sums, sums + TILE)
            _write(sums, factors, y + t * y_row + 64 * i, y_row, m - t, rows - 16 * i, more)


@jit
def tiled(
    code: int, w: int, s: int, z: int, x: int, m: int, k: int, y: int, y_row: int, low: int, high: int
) -> None:
    """As `linear.product`, from m rows of x prepared here."""
    blocks = (k + 31) // 32
    w_row = (blocks * 32 if _BLOCKED[code] else k) * _BITS[code] // 8
    s_row = _SCALE[code] * (blocks if _BLOCKED[code] else 1)
    z_row = (blocks + 1) // 2
    x_step, xs_step = _tile_bytes(code, k), (k + 63) // 64 * 128
    room = x + _room_at(code, m, k)
    stretch = min((k + 63) // 64 * 64, STRETCH)
    ws = room + 32 * stretch * 2 * _W_PLANES[code]
    factors = ws + 4 * stretch
    sums = factors + 128
    factor = f32(factors, _ROWS)
    for first in range(0, k, STRETCH):
        some = min(STRETCH, k - first)
        chunks = (some + _CHUNK[code] - 1) // _CHUNK[code]
        at_w, at_x = first * _BITS[code] // 8, first // _CHUNK[code] * _X_PLANES[code] * TILE
        at_s = first // 32 * _SCALE[code] if _BLOCKED[code] else 0
        for j in range(low, high, _ROWS):
            rows = min(_ROWS, high - j)
            for r in range(_ROWS):
                factor[r] = _FACTOR[code]
                if code == _F8 and r < rows:
                    factor[r] *= f32(s + (j + r) * s_row, 1)[0]
            at_z = z + j * z_row + first // 64 if z != 0 else 0
            _pack_rows(
                code, w + j * w_row + at_w, w_row, s + j * s_row + at_s, s_row, at_z, z_row, rows, some,
                room, ws,
            )  # fmt: skip
            to = y + 4 * j
            if _INTEGER[code]:
                xs = x + _scales_at(code, m, k) + first // 32 * 64
                _integers_group(
                    room, ws, x + at_x, x_step, xs, xs_step, chunks, sums, factors, to, y_row, m, rows, first
                )
            else:
                _floats_group(
                    code, room, x + at_x, x_step, chunks, sums, factors, to, y_row, m, rows, first
                )  # fmt: skip
