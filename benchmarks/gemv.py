"""Matrix-vector products of every weight format against the rate at which this computer reads memory.

    python -m benchmarks.gemv [--k 2048 4096] [--formats f32 int4] [--mb 1536] [--json]

The product and a plain read of the same bytes (four streams per thread, prefetched) alternate. Rounds in
which one of the two reads around a product was below 0.85 of the best were disturbed by other load, and are
left out; the fraction is the median of (bytes / time) over the mean of the two reads. The bytes must be well
beyond the last-level cache. GOALS: what the project aims at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.products import LINE, Array, Product, Threads, huge, plain_read, random_weight
from mapper_kernels.formats import FORMATS

GOALS = {"f32": 0.85, "bf16": 0.80, "int8": 0.85, "int4": 0.70}
"""Format -> fraction of the read rate."""
DISTURBED = 0.85
"""A read below this part of the best one was disturbed."""
LEAST = 3
"""Rounds without disturbance that a median needs; with fewer none is given."""


def seconds(run: Callable[[], None]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def weight_bytes(name: str, n: int, k: int) -> int:
    """Bytes of a weight: its values in whole cache lines, and its scales."""
    layout = FORMATS[name]
    return -(-n * layout.value_bytes(k) // LINE) * LINE + n * layout.scale_bytes(k)


def measure(name: str, k: int, space: Array, threads: Threads, rounds: int) -> dict[str, Any]:
    """One format at one K, as large as fits `space`: rates in GB/s, and their ratio."""
    layout = FORMATS[name]
    n = (len(space) - LINE) // (layout.value_bytes(k) + layout.scale_bytes(k)) // 64 * 64
    weight = random_weight(name, n, k, space)
    size = weight_bytes(name, n, k)
    x = np.random.default_rng(1).standard_normal((1, k), np.float32)
    run = Product.of(threads, x, weight)
    read = plain_read(threads, space[:size])
    run()
    read()
    reads, products = [seconds(read)], []
    for _ in range(rounds):
        products.append(seconds(run))
        reads.append(seconds(read))
    best = min(reads)
    kept = [i for i in range(rounds) if max(reads[i], reads[i + 1]) <= best / DISTURBED]
    kept = kept if len(kept) >= LEAST else []
    fractions = [(reads[i] + reads[i + 1]) / 2 / products[i] for i in kept]
    return {
        "format": name,
        "k": k,
        "n": n,
        "mb": size >> 20,
        "threads": threads.count,
        "rounds": rounds,
        "kept": len(kept),
        "read_gb_per_s": size / statistics.median(reads) / 1e9,
        "best_read_gb_per_s": size / best / 1e9,
        "gb_per_s": size / statistics.median(products[i] for i in kept) / 1e9 if kept else None,
        "fraction": statistics.median(fractions) if kept else None,
        "goal": GOALS.get(name),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--mb", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    space, threads = huge(given.mb << 20), Threads.start(given.threads)
    for name in given.formats:
        for k in given.k:
            found = measure(name, k, space, threads, given.rounds)
            if given.json:
                print(json.dumps(found), flush=True)
                continue
            fraction = (
                "too many rounds disturbed"
                if not found["kept"]
                else f"{found['fraction']:.2f} of the read rate"
            )
            goal = f" (goal {found['goal']:.2f})" if found["goal"] else ""
            print(
                f"{name:8} K {k:5}  {fraction}{goal}; read {found['read_gb_per_s']:.1f} GB/s, "
                f"{found['kept']} of {given.rounds} rounds",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
