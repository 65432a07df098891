"""Which cores there are for threads: those that this process may use, one per physical core, near each
other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from mapper.runtime.numa import SYSTEM, processors_by_node, spread


def allowed() -> list[int]:
    """The processors that this process may run on; [] where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def quota() -> float | None:
    """Processors' worth of time that a control group grants, or None."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


@cache
def _siblings(processor: int) -> tuple[int, ...]:
    """The processors that share a physical core."""
    path = SYSTEM / f"cpu/cpu{processor}/topology/thread_siblings_list"
    try:
        return tuple(spread(path.read_text()))
    except (OSError, ValueError):
        return (processor,)


def first_of_each(processors: Iterable[int]) -> list[int]:
    """One processor per physical core."""
    seen: set[int] = set()
    kept = []
    for p in processors:
        if not seen & set(_siblings(p)):
            kept.append(p)
        seen |= set(_siblings(p))
    return kept


def available() -> list[int]:
    """One processor per physical core that this process may use, no more than its quota grants; those of the
    memory node that has most of them first. At least one."""
    own = first_of_each(allowed()) or list(range(os.cpu_count() or 1))
    groups = [[p for p in own if p in node] for node in processors_by_node().values()]
    rest = [p for p in own if not any(p in g for g in groups)]
    ordered = [p for g in sorted(groups, key=len, reverse=True) for p in g] + rest
    limit = quota()
    return ordered if limit is None else ordered[: max(1, round(limit))]


def choose(threads: int) -> list[int | None]:
    """A processor for each thread, or None where there are more threads than cores, or the system cannot
    tell."""
    own = available()
    if threads > len(own) or not hasattr(os, "sched_setaffinity"):
        return [None] * threads
    return list(own[:threads])
