"""How long a task takes on its SM, and a grid of tasks on all of them: the formulas of the whole target.

A task moves `far` bytes from HBM and `near` bytes that L2 holds, and does `work` operations on an engine. All
three overlap in its pipeline, so the slowest one counts. While `sharers` SMs run, an SM gets

    min(port, in_flight / HBM latency, HBM rate / sharers)   bytes/s from HBM    (Little's law)
    min(port, L2 rate / sharers)                             bytes/s from L2

A kernel adds its start (first instruction to first load), the latency of the first bytes, and that of the
last write; between kernels lies the launch gap. In a persistent kernel the next task's bytes are fetched
while the last one computes: it pays the queue's fetch and, where it waits, the signal."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_gpu.hardware import ENGINES, Gpu

Float = npt.NDArray[np.float64]
LEADS = ("none", "kernel", "merge", "queue", "link", "network")
"""What comes before a task's bytes: nothing, the start of its kernel, a signal of its own kernel, the queue
of a persistent kernel, the flags of a collective, those between link domains. By number."""
NONE, KERNEL, MERGE, QUEUE, LINK, NETWORK = range(len(LEADS))


def lead_seconds(gpu: Gpu) -> Float:
    """Seconds before the first byte, by lead."""
    first = gpu.start + gpu.hbm_latency + gpu.l2_latency
    network = gpu.link_latency + gpu.network_latency
    return np.array([0.0, first, gpu.signal + gpu.l2_latency, gpu.fetch, gpu.link_latency, network])


def rates(gpu: Gpu) -> Float:
    """Sustained operations per second of one SM by engine number; infinite where there is no such engine."""
    return np.array([gpu.rate(e) if e == "vector" or e in gpu.tensor else np.inf for e in ENGINES])


def stream_seconds(gpu: Gpu, far: Any, near: Any, sharers: Any) -> Any:
    """Seconds to bring in a task's bytes (arrays or numbers)."""
    shared = np.maximum(sharers, 1)
    hbm = np.minimum(gpu.sm_stream, gpu.stream / shared)
    l2 = np.minimum(gpu.port, gpu.l2_bandwidth / shared)
    return np.maximum(far / hbm, np.maximum((far + near) / gpu.port, (far + near) / l2))


def task_seconds(gpu: Gpu, far: Any, near: Any, work: Any, engine: Any, sharers: Any, lead: Any) -> Any:
    """Seconds of tasks (arrays or numbers); `engine` and `lead` by number. Tasks of a collective run at the
    link's rate, or at the network's."""
    compute = work / rates(gpu)[engine]
    busy = np.maximum(stream_seconds(gpu, far, near, sharers), compute)
    busy = np.where(np.asarray(lead) == LINK, near / gpu.link + far / gpu.stream, busy)
    slow = near / min(gpu.link, gpu.network) + far / gpu.stream
    busy = np.where(np.asarray(lead) == NETWORK, slow, busy)
    return lead_seconds(gpu)[lead] + busy


def waves(tasks: int, sms: int) -> list[tuple[int, int]]:
    """(how many waves, tasks in each) of `tasks` equal tasks: full waves, then the ragged one."""
    full, rest = divmod(tasks, sms)
    return [w for w in ((full, sms), (1 if rest else 0, rest)) if w[0] and w[1]]


def grid_seconds(gpu: Gpu, tasks: int, far: float, near: float, work: float, engine: int) -> float:
    """Seconds of a grid of equal tasks on all SMs, wave after wave, without leads; `far` and the others are
    per task. SMs of the ragged last wave share the bandwidth among fewer."""
    return float(
        sum(n * task_seconds(gpu, far, near, work, engine, k, NONE) for n, k in waves(tasks, gpu.sms))
    )


def spread(durations: Sequence[float], sms: int) -> tuple[float, list[int]]:
    """List scheduling in the given order: (makespan, SM of each task), always on the SM that is free
    first."""
    free = [(0.0, i) for i in range(sms)]
    placed, end = [], 0.0
    for d in durations:
        at, sm = heapq.heappop(free)
        placed.append(sm)
        end = max(end, at + d)
        heapq.heappush(free, (at + d, sm))
    return end, placed
