"""Python's cyclic garbage collector, paused: tables of steps and tasks are many small objects, none of them
in cycles, which it would walk again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Runs its body without the collector, and leaves it as it was."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
