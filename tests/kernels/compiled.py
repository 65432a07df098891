"""The few functions that the tests compile: kernels as Python calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mapper_kernels import fused
from mapper_kernels.dot import dot
from mapper_kernels.flash import attend, merge
from mapper_kernels.jit import entry, jit
from mapper_kernels.linear import prepare_rows
from mapper_kernels.memory import f32

_HERE = Path(__file__)
_ONE: Any = np.int64(1)


@entry(_HERE)
def prepared_rows(code: int, x: int, m: int, k: int, out: int) -> None:
    """Prepared rows of x [m, k]."""
    prepare_rows(code, x, 4 * k, m, k, out)


def _portable(name: str) -> Any:
    one, four = dot(name, 1, False), dot(name, 4, False)

    @jit
    def _rows(
        w: int, s: int, z: int, w_row: int, s_row: int, z_row: int, x: int, x_row: int, m: int, k: int,
        y: int, y_row: int,
    ) -> None:  # fmt: skip
        if m == 1:
            one(w, w_row, s, s_row, z, z_row, x, x_row, k, y, 4, y_row, _ONE)
        else:
            four(w, w_row, s, s_row, z, z_row, x, x_row, k, y, 4, y_row, m)

    return _rows


_int8, _int4, _mxfp4 = _portable("int8"), _portable("int4"), _portable("mxfp4")
_int8row, _int8f, _int4f = _portable("int8row"), _portable("int8f"), _portable("int4f")


@entry(_HERE)
def portable_rows(
    code: int, w: int, s: int, z: int, w_row: int, s_row: int, z_row: int, x: int, x_row: int, m: int, k: int,
    y: int, y_row: int,
) -> None:  # fmt: skip
    """Four rows of an integer format times m rows of x, without instructions of one processor."""
    if code == 4:
        _int8(w, s, z, w_row, s_row, z_row, x, x_row, m, k, y, y_row)
    elif code == 5:
        _int4(w, s, z, w_row, s_row, z_row, x, x_row, m, k, y, y_row)
    elif code == 6:
        _mxfp4(w, s, z, w_row, s_row, z_row, x, x_row, m, k, y, y_row)
    elif code == 7:
        _int8row(w, s, z, w_row, s_row, z_row, x, x_row, m, k, y, y_row)
    elif code == 8:
        _int8f(w, s, z, w_row, s_row, z_row, x, x_row, m, k, y, y_row)
    elif code == 9:
        _int4f(w, s, z, w_row, s_row, z_row, x, x_row, m, k, y, y_row)


@entry(_HERE)
def attend_pieces(
    code: int, q: int, k: int, k_step: int, k_scales: int, v: int, v_step: int, v_scales: int, bounds: Any,
    d: int, dv: int, scale: Any, softcap: Any, slope: Any, slopes: int, last: int, sink: Any, has_sink: bool,
    scratch: int, partial: int, out: int,
) -> None:  # fmt: skip
    """Attention over the pieces between neighbouring `bounds`, merged; partial [pieces, dv + 2]."""
    pieces = bounds.shape[0] - 1
    step = 4 * (dv + 2)
    f32(slopes, 1)[0] = slope
    for p in range(pieces):
        attend(
            code, q, 0, 1, k, k_step, k_scales, v, v_step, v_scales, bounds[p], bounds[p + 1], d, dv, scale,
            softcap, slopes, last, scratch, partial + p * step, 0,
        )  # fmt: skip
    merge(partial, step, pieces, dv, has_sink, sink, out)


@entry(_HERE)
def cached_parts(r: Any, a: Any, f: Any, past: int, scratch: int, parts: int) -> None:
    """`fused.attend_cached`, all parts."""
    for part in range(parts):
        fused.attend_cached(r, a, f, past, scratch, part, parts)


@entry(_HERE)
def merged_parts(r: Any, a: Any, parts: int) -> None:
    """`fused.merge_splits`, all parts."""
    for part in range(parts):
        fused.merge_splits(r, a, part, parts)
