"""Products with many rows of x, weights in their stored formats: tiles (AMX), AVX-512, and BLAS in float32.

    python -m benchmarks.prefill [--rows 16 64 128 512] [--k 2048] [--n 2048] [--threads 1 2]
                                 [--formats f32 bf16 ...] [--rounds 9] [--json]

GFLOP/s of y [M, N] = x [M, K] W^T with random weights. `tiles` and `vectors` are our two paths, 128 rows of x
prepared at a time as in a program, the preparation counted; `blas` is NumPy's product of the same matrices in
float32. The three alternate; medians over the rounds, and the best round apart, because other load on the
computer only ever adds time. Threads share the columns of y.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np


@cache
def _compiled() -> Any:
    import numba

    from mapper_kernels import linear, prefill
    from mapper_kernels.sizes import ROWS_AT_ONCE

    at_once = ROWS_AT_ONCE

    @numba.njit(nogil=True)
    def run(
        tiles: Any, code: Any, w: Any, s: Any, x: Any, m: Any, k: Any, n: Any, y: Any, low: Any, high: Any,
        memory: Any,
    ) -> None:  # fmt: skip
        for first in range(0, m, at_once):
            rows = min(at_once, m - first)
            at, to = x + 4 * k * first, y + 4 * n * first
            if tiles:
                prefill.tile_rows(code, at, 4 * k, rows, k, memory)
                prefill.tiled(code, w, s, 0, memory, rows, k, to, 4 * n, low, high)
            else:
                linear.prepare_rows(code, at, 4 * k, rows, k, memory)
                linear.product(code, w, s, 0, memory, rows, k, to, 4 * n, low, high)

    return run


def _stored(name: str, n: int, k: int) -> tuple[Any, Any]:
    """Random weights of a format: elements and scales."""
    from mapper_kernels.formats import FORMATS

    rng, f = np.random.default_rng(0), FORMATS[name]
    dense = rng.standard_normal((n, k)).astype(np.float32) / np.float32(np.sqrt(k))
    if name in ("f32", "f16"):
        return dense.astype(name.replace("f", "float")), np.zeros(1, np.float32)
    if name == "bf16":
        return (dense.view(np.uint32) >> 16).astype(np.uint16), np.zeros(1, np.float32)
    elements = rng.integers(0, 256, (n, f.value_bytes(k))).astype(np.uint8)
    if name == "f8e4m3":
        elements[(elements & 127) == 127] = 0
    blocks = f.scale_bytes(k) // f.scale
    if f.scale == 1:
        return elements, rng.integers(115, 120, (n, blocks)).astype(np.uint8)
    return elements, rng.uniform(1e-4, 1e-3, (n, blocks)).astype(np.float16 if f.scale == 2 else np.float32)


def measure(name: str, m: int, n: int, k: int, threads: int, rounds: int) -> dict[str, Any]:
    """GFLOP/s of the three, for one format and number of rows. NumPy's threads: set before it was loaded."""
    from mapper_kernels.amx import usable
    from mapper_kernels.formats import FORMATS
    from mapper_kernels.sizes import project_scratch

    run, (w, s) = _compiled(), _stored(name, n, k)
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    y, dense = np.empty((m, n), np.float32), np.ones((n, k), np.float32) / np.float32(k)
    memory = [np.zeros(project_scratch(m, k, n, 0) + 64, np.uint8) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def ours(tiles: bool) -> None:
        def one(part: int) -> None:
            low, high = (n // 16 * p // threads * 16 for p in (part, part + 1))
            at = memory[part].ctypes.data + -memory[part].ctypes.data % 64
            places = (w.ctypes.data, s.ctypes.data, x.ctypes.data, m, k, n, y.ctypes.data)
            run(tiles, FORMATS[name].code, *places, low, high, at)

        list(pool.map(one, range(threads))) if threads > 1 else one(0)

    runs: dict[str, Callable[[], Any]] = {
        "vectors": lambda: ours(False),
        "blas": lambda: np.matmul(x, dense.T, out=y),
    }
    if usable():
        runs = {"tiles": lambda: ours(True), **runs}
    times: dict[str, list[float]] = {path: [] for path in runs}
    for i in range(rounds + 1):
        for path, call in runs.items():
            begin = time.perf_counter()
            call()
            if i:
                times[path].append(time.perf_counter() - begin)
    work = 2 * m * n * k / 1e9
    found: dict[str, Any] = {"format": name, "rows": m, "n": n, "k": k, "threads": threads}
    for path, taken in times.items():
        found[path] = round(work / statistics.median(taken), 1)
        found[f"{path}_best"] = round(work / min(taken), 1)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 64, 128, 512])
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--formats", nargs="*", default=["f32", "f16", "bf16", "f8e4m3", "int8", "int4", "mxfp4"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if len(given.threads) > 1:  # NumPy's BLAS reads its number of threads when it is loaded
        for threads in given.threads:
            subprocess.run(_command(given, threads), env=_environment(threads), check=True)
        return
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(given.threads[0]):
        subprocess.run(_command(given, given.threads[0]), env=_environment(given.threads[0]), check=True)
        return
    for name in given.formats:
        for m in given.rows:
            found = measure(name, m, given.n, given.k, given.threads[0], given.rounds)
            print(
                json.dumps(found) if given.json else "  ".join(f"{k} {v}" for k, v in found.items()),
                flush=True,
            )


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}


def _command(given: argparse.Namespace, threads: int) -> list[str]:
    """This program again, for one number of threads."""
    numbers = {
        "rows": given.rows,
        "k": [given.k],
        "n": [given.n],
        "threads": [threads],
        "rounds": [given.rounds],
    }
    words = [w for name, values in numbers.items() for w in (f"--{name}", *map(str, values))]
    return [
        sys.executable, "-m", "benchmarks.prefill", *words, "--formats", *given.formats,
        *(["--json"] if given.json else []),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
