"""Collectives between chips: algorithms, and which one takes least time.

`rounds` exchanges of flags each cost the link's latency; bytes pass each chip's link once per `share`:

    one-shot all-reduce      every chip reads all others' partial sums:   1 round,  (n - 1) S
    two-shot all-reduce      reduce a share each, then gather the shares: 2 rounds, 2 (n - 1) / n S
    ring all-reduce          neighbour to neighbour:              2 (n - 1) rounds, 2 (n - 1) / n S
    all-gather               every chip reads all others' parts:          1 round,  (n - 1) / n S
    all-to-all               every chip sends each other chip its part:   1 round,  (n - 1) / n S

S is the size of the whole result. The first two need every pair connected at full rate (a switch). Beyond
the link's domain the slowest tier counts: the bytes that leave a domain pass its chips' network adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mapper_gpu.hardware import Gpu

ONE_SHOT, TWO_SHOT, RING, GATHER, EXCHANGE = "one-shot", "two-shot", "ring", "all-gather", "all-to-all"
SEND = "send"
"""A chip reads what its peer in an earlier stage of a pipeline made."""


@dataclass(frozen=True)
class Collective:
    """The chosen algorithm, its seconds, and the bytes that pass each chip's link; `across` where these go
    through the network between link domains."""

    algorithm: str
    seconds: float
    bytes: float
    across: bool = False


def _tier(gpu: Gpu, chips: int) -> tuple[float, float]:
    """(bytes/s of a chip, seconds of a round) inside the domain or across domains."""
    if chips <= gpu.domain:
        return gpu.link, gpu.link_latency
    return min(gpu.link, gpu.network), gpu.link_latency + gpu.network_latency


def allreduce(gpu: Gpu, chips: int, size: float) -> Collective:
    """Sum of `size` bytes on each of `chips` chips, on all of them."""
    if chips < 2:
        return Collective(ONE_SHOT, 0.0, 0.0)
    if chips > gpu.domain:
        return _two_tiers(gpu, chips, size)
    rate, latency = _tier(gpu, chips)
    share = 2 * (chips - 1) / chips * size
    options = [Collective(RING, 2 * (chips - 1) * latency + share / rate, share)]
    if gpu.switched:
        whole = (chips - 1) * size
        options += [
            Collective(ONE_SHOT, latency + whole / rate, whole),
            Collective(TWO_SHOT, 2 * latency + share / rate, share),
        ]
    return min(options, key=lambda c: c.seconds)


def _two_tiers(gpu: Gpu, chips: int, size: float) -> Collective:
    """Reduce inside a domain, all-reduce each chip's share across domains, gather inside."""
    inside = min(gpu.domain, chips)
    domains = math.ceil(chips / inside)
    local = 2 * (inside - 1) / inside * size
    far = 2 * (domains - 1) / domains * size / inside
    rounds = 2 * gpu.link_latency + 2 * (domains - 1) * gpu.network_latency
    return Collective(RING, rounds + local / gpu.link + far / gpu.network, local + far, True)


def allgather(gpu: Gpu, chips: int, size: float) -> Collective:
    """`size` bytes on every chip, of which each has made a share."""
    if chips < 2:
        return Collective(GATHER, 0.0, 0.0)
    rate, latency = _tier(gpu, chips)
    moved = (chips - 1) / chips * size
    rounds = 1 if gpu.switched or chips > gpu.domain else chips - 1
    return Collective(GATHER, rounds * latency + moved / rate, moved, chips > gpu.domain)


def exchange(gpu: Gpu, replicas: int, stride: int, size: float) -> Collective:
    """A chip reads `size` bytes evenly from the chips of its rank in all `replicas`, `stride` chips apart,
    its own included. Those in its link domain and those beyond it come at once, each at their rate;
    `bytes` are what takes as long at the slower rate."""
    near = min(replicas, max(1, gpu.domain // stride))
    inside, beyond = ((n / replicas) * size for n in (near - 1, replicas - near))
    if not gpu.switched:  # on a ring a share travels a quarter of the way round on average
        inside *= max(1.0, near / 4)
    if replicas == near:
        rounds = 1 if gpu.switched else max(1, replicas - 1)
        return Collective(EXCHANGE, rounds * gpu.link_latency + inside / gpu.link, inside)
    slow = min(gpu.link, gpu.network)
    moved = max(beyond, inside * slow / gpu.link)
    return Collective(EXCHANGE, gpu.link_latency + gpu.network_latency + moved / slow, moved, True)


def send(gpu: Gpu, size: float, across: bool) -> float:
    """Seconds to hand `size` bytes to the next stage of a pipeline, inside a domain or `across` domains."""
    rate, latency = _tier(gpu, gpu.domain + 1 if across else 2)
    return latency + size / rate
