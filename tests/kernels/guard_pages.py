"""Run the kernels with every operand at an end of its pages, next to pages that may not be touched.

    python -m tests.kernels.guard_pages [overread]

A kernel that reads or writes one byte too many kills the process (SIGSEGV). With `overread`, does so on
purpose.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_kernels import fused
from mapper_kernels.cached import KV_FORMATS
from mapper_kernels.formats import FORMATS
from mapper_kernels.front_linear import project_arguments, project_parts
from mapper_kernels.sizes import SCORES, attend_scratch, project_scratch
from tests.kernels.compiled import attend_pieces, cached_parts
from tests.kernels.operands import random_weight
from tests.kernels.test_flash import cache

Array = npt.NDArray[Any]
_HELD: list[Any] = []


def guarded(array: Array, at_end: bool) -> int:
    """Copy an operand between two forbidden pages, against the second where `at_end`; its address."""
    page = mmap.PAGESIZE
    inner = max(page, -(-array.nbytes // page) * page)
    memory = mmap.mmap(-1, inner + 2 * page)
    _HELD.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = base + page + (inner - array.nbytes if at_end else 0)
    ctypes.memmove(start, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for edge in (base, base + page + inner):
        if protect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return start


def aligned(size: int) -> int:
    """Scratch memory: guarded behind, by whole cache lines."""
    return guarded(np.zeros(-(-size // 64) * 64, np.uint8), True)


def products(name: str, at_end: bool) -> None:
    """All tails of K; one row, and rows for whole and broken groups."""
    rng = np.random.default_rng(0)
    for k in (1, 2, 15, 17, 31, 32, 33, 63, 65, 95, 97, 127, 129, 160, 255, 544):
        for m, n in ((1, 5), (3, 4), (65, 1)):
            weight = random_weight(rng, name, n, k, FORMATS[name].zeros)
            x = rng.standard_normal((m, k)).astype(np.float32)
            _, a, f = project_arguments(x, [(weight, None)], None, fused.PLAIN, "identity")
            parts = [x, weight.values, weight.scales, weight.zeros, np.zeros((m, n), np.float32)]
            r = [guarded(part, at_end) for part in parts if part is not None]
            project_parts(np.array(r), a, f, aligned(project_scratch(m, k, n, 1)), 0, 2, 2)
            _HELD.clear()


def attentions(code: int, at_end: bool) -> None:
    """Rows of any length, and every number of rows in a tile."""
    rng = np.random.default_rng(1)
    one, none = np.float32(1), np.float32(0)
    for d, dv in ((1, 1), (7, 13), (16, 16), (31, 37), (80, 64)):
        for rows in (1, 2, 15, 16, 17, 129):
            (k, ks, _), (v, vs, _) = (cache(rng, KV_FORMATS[code], rows, n) for n in (d, dv))
            q, y = rng.standard_normal(d).astype(np.float32), np.zeros(dv, np.float32)
            a = [guarded(part, at_end) for part in (q, k, ks, v, vs, y)]
            attend_pieces(
                code, a[0], a[1], k.strides[0], a[2], a[3], v.strides[0], a[4],
                np.array([0, rows // 2, rows]), d, dv, one, none, none, aligned(4), rows, none, False,
                aligned(SCORES), aligned(8 * (dv + 2)), a[5],
            )  # fmt: skip
            _HELD.clear()
            if code < 3:
                cached(code, d, dv, rows, at_end)


def cached(code: int, d: int, dv: int, rows: int, at_end: bool) -> None:
    """The last row of a cache is appended."""
    rng = np.random.default_rng(2)
    (k, _, _), (v, _, _) = (cache(rng, KV_FORMATS[code], 1, 1, rows, n) for n in (d, dv))
    rotary = d // 2 * 2
    new = [rng.standard_normal(n).astype(np.float32) for n in (d, d, dv)]
    table, y = np.ones((2, rows, rotary // 2), np.float32), np.zeros(dv, np.float32)
    caches = [guarded(part, at_end) for part in (k, v)]
    r = [
        *(guarded(part, at_end) for part in new),
        *caches,
        0,
        *([guarded(table, at_end)] if rotary else []),
        *caches,
    ]
    a = [1, 1, d, 1, rows, dv, 0, 0, 0, 0, 0, rotary, 0, rows, 1, code, 0, 0]
    scratch = aligned(attend_scratch(1, d, dv))
    cached_parts(np.array([*r, guarded(y, at_end)]), np.array(a), np.ones(18), rows - 1, scratch, 1)
    _HELD.clear()


def main() -> None:
    """Everything, at both ends."""
    if sys.argv[1:] == ["overread"]:
        ctypes.string_at(guarded(np.zeros(100, np.uint8), True), 101)
        return
    for at_end in (True, False):
        for name in FORMATS:
            print(name, at_end, flush=True)
            products(name, at_end)
        for code, kind in enumerate(KV_FORMATS):
            print(kind, at_end, flush=True)
            attentions(code, at_end)
    print("done")


if __name__ == "__main__":
    main()
