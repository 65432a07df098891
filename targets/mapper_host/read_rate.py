"""How fast this computer reads memory: the physical limit of decoding, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt

from mapper.errors import MapperError

_BYTES = 256 << 20
"""Working set: more than last-level caches hold."""
_STREAMS = 4
"""Places that each thread reads from in turn: one stream leaves a tenth to a fifth of the rate unused."""
_SECONDS = 0.2
_LIMIT = 60
"""Seconds after which the measuring process is given up; it takes one, more when its kernel is compiled."""


def read_rate() -> float:
    """Bytes per second that all threads of this process's CPUs read together, the best of some passes over
    256 MB in about 0.3 s; a fresh process measures. Raises MapperError where it fails."""
    paths = os.pathsep.join(p for p in sys.path if p)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mapper_host.read_rate"], capture_output=True, text=True, timeout=_LIMIT,
            check=True, env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise MapperError(f"the read rate could not be measured: {error}") from error


@numba.njit(nogil=True, fastmath=True, cache=True)
def _total(a: npt.NDArray[np.float32]) -> float:  # pragma: no cover
    n = len(a) // _STREAMS
    t0 = t1 = t2 = t3 = np.float32(0)
    for i in range(n):
        t0 += a[i]
        t1 += a[n + i]
        t2 += a[2 * n + i]
        t3 += a[3 * n + i]
    return float(t0 + t1 + t2 + t3)


def measure() -> float:
    """The rate, in this process."""
    from mapper.runtime.memories import empty

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = empty(_BYTES)
    whole.fill(0)
    parts = np.array_split(whole.view(np.float32), threads)
    _total(parts[0][:64])
    best = np.inf
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            begin = time.perf_counter()
            list(pool.map(_total, parts))
            best = min(best, time.perf_counter() - begin)
    return _BYTES / best


if __name__ == "__main__":
    print(measure())
