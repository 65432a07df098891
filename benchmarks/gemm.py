"""Products with many rows of x (prefill) against NumPy's BLAS, in alternation: GFLOP/s and their ratio.

    python -m benchmarks.gemm [--m 128] [--k 2048] [--n 2048] [--threads 1 2] [--json]

BLAS takes its number of threads from the environment when it is loaded, so every number of threads runs in a
process of its own. The ratio is the median over rounds; a round is disturbed, and left out, where BLAS was
below 0.85 of its best.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

DISTURBED = 0.85
"""A BLAS product below this part of the best one was disturbed."""


def measure(m: int, k: int, n: int, name: str, threads: int, rounds: int) -> dict[str, Any]:
    """In this process, whose BLAS has as many threads."""
    import numpy as np

    from benchmarks.gemv import seconds
    from benchmarks.products import Product, Threads, huge, random_weight

    x = np.random.default_rng(1).standard_normal((m, k), np.float32)
    weight = random_weight(name, n, k, huge((4 * n * k + (1 << 22)) >> 21 << 21))
    dense = np.random.default_rng(2).standard_normal((n, k), np.float32)
    out = np.empty((m, n), np.float32)
    run = Product.of(Threads.start(threads), x, weight)

    def blas() -> None:
        np.matmul(x, dense.T, out=out)

    run()
    blas()
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(run))
        theirs.append(seconds(blas))
    kept = [i for i in range(rounds) if theirs[i] <= min(theirs) / DISTURBED]
    work = 2 * m * k * n / 1e9
    return {
        "m": m,
        "k": k,
        "n": n,
        "format": name,
        "threads": threads,
        "rounds": rounds,
        "kept": len(kept),
        "gflop_per_s": work / statistics.median(ours[i] for i in kept),
        "best_gflop_per_s": work / min(ours),
        "blas_gflop_per_s": work / statistics.median(theirs[i] for i in kept),
        "best_blas_gflop_per_s": work / min(theirs),
        "ratio": statistics.median(theirs[i] / ours[i] for i in kept),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (("--m", 128), ("--k", 2048), ("--n", 2048), ("--rounds", 15)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--format", default="f32")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        found = measure(given.m, given.k, given.n, given.format, given.threads[0], given.rounds)
        print(json.dumps(found) if given.json else "  ".join(f"{n} {v}" for n, v in found.items()))
        return
    for threads in given.threads:
        count = str(threads)
        names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gemm",
            "--here",
            "--threads",
            count,
            "--format",
            given.format,
        ]
        for option in ("m", "k", "n", "rounds"):
            command += [f"--{option}", str(getattr(given, option))]
        command += ["--json"] if given.json else []
        subprocess.run(command, check=True, env=os.environ | dict.fromkeys(names, count))


if __name__ == "__main__":
    main()
