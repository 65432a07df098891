"""Matrix-vector products of every weight format, for `make bench`; the read of the same bytes beside them.

`benchmarks.gemv` compares the two in alternation, which is what to quote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from benchmarks.gemv import weight_bytes
from benchmarks.products import Array, Product, Threads, huge, plain_read, random_weight
from mapper_kernels.formats import FORMATS

MEGABYTES, K = 1536, 2048
ROUNDS = 5


@pytest.fixture(scope="module")
def space() -> Array:
    """Bytes beyond the last-level cache."""
    return huge(MEGABYTES << 20)


@pytest.fixture(scope="module")
def threads() -> Iterator[Threads]:
    """As many threads as this process may use processors, at most two."""
    made = Threads.start(min(2, len(os.sched_getaffinity(0))))
    yield made
    made.pool.shutdown()


@pytest.mark.benchmark(group="gemv")
@pytest.mark.parametrize("name", FORMATS)
def test_gemv(benchmark: Any, name: str, space: Array, threads: Threads) -> None:
    layout = FORMATS[name]
    n = (len(space) - 64) // (layout.value_bytes(K) + layout.scale_bytes(K)) // 64 * 64
    weight = random_weight(name, n, K, space)
    run = Product.of(threads, np.ones((1, K), np.float32), weight)
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["gb_per_s"] = weight_bytes(name, n, K) / benchmark.stats.stats.median / 1e9
    assert np.isfinite(run.y).all()


@pytest.mark.benchmark(group="gemv")
def test_read(benchmark: Any, space: Array, threads: Threads) -> None:
    space[:] = 1
    benchmark.pedantic(plain_read(threads, space), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["gb_per_s"] = len(space) / benchmark.stats.stats.median / 1e9
