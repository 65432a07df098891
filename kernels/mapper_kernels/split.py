"""How work is shared between threads, and how a thread waits for the others."""

from __future__ import annotations

import sys

from numba import types

from mapper_kernels.jit import inline, jit

SPINS = 2000
"""How often a waiting thread looks before it lets others have its core."""


@inline
def share(n: int, grain: int, part: int, parts: int) -> tuple[int, int]:
    """[low, high) of share number `part` of n items in `parts` shares, cut at multiples of `grain`."""
    blocks = (n + grain - 1) // grain
    low = blocks * part // parts * grain
    high = blocks * (part + 1) // parts * grain
    return min(low, n), min(high, n)


if sys.platform == "win32":

    @jit
    def give_way() -> None:
        """Keep looking: this system has no call to yield that compiled code finds by name."""

else:
    _yield = types.ExternalFunction("sched_yield", types.int32())

    @jit
    def give_way() -> None:
        """Let another thread run on this core."""
        _yield()
