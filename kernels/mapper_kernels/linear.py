"""Products with weights in their stored format: y = x W^T, one row of x or many, rows of W shared by threads.

Weights are [N, K], row-major, in one of `FORMATS`; `low` and `high` say which rows of W (columns of y) to
do. The rows are read as four streams, each a quarter of the range, so that memory sees four long runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mapper_kernels.dot import ROWS, dot
from mapper_kernels.formats import FORMATS
from mapper_kernels.jit import jit
from mapper_kernels.prepare import prepare

_X: Any = 4
"""Rows of x per pass over the weights, where there are several."""


def _driver(name: str, vnni: bool | None) -> Callable[..., None]:
    one, four = dot(name, 1, vnni), dot(name, 4, vnni)

    @jit
    def _rows(
        w: int, w_row: int, s: int, s_row: int, z: int, z_row: int, x: int, x_row: int, m: int, k: int,
        y: int, y_row: int, low: int, high: int,
    ) -> None:  # fmt: skip
        quarter = (high - low) // ROWS
        j = low
        while j < high:
            # full streams first; the few rows that are left over are done one by one, four times the same
            step = quarter if j < low + quarter else 0
            if step == 0 and j < low + ROWS * quarter:
                j = low + ROWS * quarter
                continue
            at_z = z + j * z_row if z != 0 else 0
            if m == 1:
                one(
                    w + j * w_row, step * w_row, s + j * s_row, step * s_row, at_z, step * z_row, x, x_row, k,
                    y + 4 * j, 4 * step, y_row, m,
                )  # fmt: skip
            else:
                for i in range(0, m, _X):
                    four(
                        w + j * w_row, step * w_row, s + j * s_row, step * s_row, at_z, step * z_row,
                        x + i * x_row, x_row, k, y + 4 * j + i * y_row, 4 * step, y_row, m - i,
                    )  # fmt: skip
            j += 1

    made: Callable[..., None] = _rows
    return made


def _preparer(name: str) -> Callable[..., None]:
    emitted = prepare(name)

    @jit
    def _prepare(x: int, k: int, out: int) -> None:
        emitted(x, k, out)

    made: Callable[..., None] = _prepare
    return made


def _names() -> list[str]:
    return sorted(FORMATS, key=lambda name: FORMATS[name].code)


_ROWS = tuple(_driver(name, None) for name in _names())
_PREPARE = tuple(_preparer(name) for name in _names())
(
    _rows_f32, _rows_f16, _rows_bf16, _rows_f8e4m3, _rows_int8, _rows_int4, _rows_mxfp4, _rows_int8row,
    _rows_int8f, _rows_int4f,
) = _ROWS  # fmt: skip
(
    _x_f32, _x_f16, _x_bf16, _x_f8e4m3, _x_int8, _x_int4, _x_mxfp4, _x_int8row, _x_int8f, _x_int4f,
) = _PREPARE  # fmt: skip
_VALUES = np.array([FORMATS[name].chunk.values for name in _names()])
_X_BYTES = np.array([FORMATS[name].chunk.x_bytes for name in _names()])
_SUMS = np.array([FORMATS[name].zeros for name in _names()])
_WIDTH = np.array([FORMATS[name].bits for name in _names()])
_SCALE = np.array([FORMATS[name].scale for name in _names()])
_BLOCKED = np.array([FORMATS[name].blocked for name in _names()])


@jit
def prepared_bytes(code: int, k: int) -> int:
    """Bytes of one row of x [K], prepared for a format."""
    chunks = (k + _VALUES[code] - 1) // _VALUES[code]
    size: int = chunks * _X_BYTES[code] + ((k + 511) // 512 * 64 if _SUMS[code] else 0)
    return size


@jit
def row_bytes(code: int, k: int) -> tuple[int, int, int]:
    """Bytes of the elements, the scales and the zero points of a row of K (see `formats.Format`)."""
    blocks = (k + 31) // 32
    values = (blocks * 32 if _BLOCKED[code] else k) * _WIDTH[code] // 8
    return values, _SCALE[code] * (blocks if _BLOCKED[code] else 1), (blocks + 1) // 2


@jit
def prepare_rows(code: int, x: int, x_row: int, m: int, k: int, out: int) -> None:
    """Prepare m rows of x [K] float32, `x_row` bytes apart, at `out`, `prepared_bytes` apart."""
    step = prepared_bytes(code, k)
    for r in range(m):
        source, target = x + r * x_row, out + r * step
        if code == 0:
            _x_f32(source, k, target)
        elif code == 1:
            _x_f16(source, k, target)
        elif code == 2:
            _x_bf16(source, k, target)
        elif code == 3:
            _x_f8e4m3(source, k, target)
        elif code == 4:
            _x_int8(source, k, target)
        elif code == 5:
            _x_int4(source, k, target)
        elif code == 6:
            _x_mxfp4(source, k, target)
        elif code == 7:
            _x_int8row(source, k, target)
        elif code == 8:
            _x_int8f(source, k, target)
        else:
            _x_int4f(source, k, target)


@jit
def product(
    code: int, w: int, s: int, z: int, x: int, m: int, k: int, y: int, y_row: int, low: int, high: int
) -> None:
    """Columns low..high - 1 of y [m, N] float32, rows `y_row` bytes apart, from prepared rows of x.

    Addresses of the elements, the scales and the zeros (0: none) of W.
    """
    w_row, s_row, z_row = row_bytes(code, k)
    x_row = prepared_bytes(code, k)
    if code == 0:
        _rows_f32(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 1:
        _rows_f16(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 2:
        _rows_bf16(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 3:
        _rows_f8e4m3(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 4:
        _rows_int8(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 5:
        _rows_int4(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 6:
        _rows_mxfp4(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 7:
        _rows_int8row(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    elif code == 8:
        _rows_int8f(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
    else:
        _rows_int4f(w, w_row, s, s_row, z, z_row, x, x_row, m, k, y, y_row, low, high)
