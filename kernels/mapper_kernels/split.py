"""How work is shared between threads."""

from __future__ import annotations

from mapper_kernels.jit import inline


@inline
def share(n: int, grain: int, part: int, parts: int) -> tuple[int, int]:
    """[low, high) of share number `part` of n items in `parts` shares, cut at multiples of `grain`."""
    blocks = (n + grain - 1) // grain
    low = blocks * part // parts * grain
    high = blocks * (part + 1) // parts * grain
    return min(low, n), min(high, n)
