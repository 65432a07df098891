"""Matrix-vector products of the host's kernels against the rate at which this computer reads memory.

    python -m benchmarks.host_gemv [--k 2048 4096] [--mb 256] [--rounds 15] [--json]

The product and a plain read of the same bytes (the sum of all elements, in four streams) alternate; medians.
Rounds in which the read was slower than 1.5 times its best were disturbed by other load, and are left out.
One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def _read(x: Any) -> Any:
    """Sum of four streams; x [4, n]."""
    a = np.float32(0)
    b = np.float32(0)
    c = np.float32(0)
    d = np.float32(0)
    for i in range(x.shape[1]):
        a += x[0, i]
        b += x[1, i]
        c += x[2, i]
        d += x[3, i]
    return a + b + c + d


def measure(k: int, megabytes: int, rounds: int) -> dict[str, float]:
    """Bytes per second of products with [N, K] and [K, N] weights, and of the read; and their ratios."""
    from mapper_kernels.gemm import gemm_kn, gemm_nk

    compiler: Any = numba.njit
    read: Any = compiler(fastmath=True)(_read)
    n = megabytes * (1 << 20) // (4 * k)
    w = np.random.default_rng(0).standard_normal((n, k), np.float32)
    x, y = np.ones((1, k), np.float32), np.empty((1, n), np.float32)
    flat, other = w.reshape(4, -1), w.reshape(k, n)
    runs: dict[str, Callable[[], Any]] = {
        "read": lambda: read(flat),
        "nk": lambda: gemm_nk(x, w, y, 0, 1),
        "kn": lambda: gemm_kn(x, other, y, 0, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    best = min(times["read"])
    kept = [i for i in range(rounds) if times["read"][i] <= 1.5 * best]
    rate = {name: w.nbytes / statistics.median(found[i] for i in kept) for name, found in times.items()}
    return {
        "k": k,
        "rounds": len(kept),
        "read_gb_per_s": rate["read"] / 1e9,
        "nk_gb_per_s": rate["nk"] / 1e9,
        "kn_gb_per_s": rate["kn"] / 1e9,
        "nk_fraction": rate["nk"] / rate["read"],
        "kn_fraction": rate["kn"] / rate["read"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for k in given.k:
        found = measure(k, given.mb, given.rounds)
        print(json.dumps(found) if given.json else "  ".join(f"{n} {v:.3g}" for n, v in found.items()))


if __name__ == "__main__":
    main()
