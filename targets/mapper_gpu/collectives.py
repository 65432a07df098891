"""Time of collectives between chips, as pure functions of bytes, chips, latency and bandwidth.

The alpha-beta model (Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH", 2005): a step that moves b bytes takes latency + b / bandwidth. `latency` is that of one
synchronised exchange between chips, kernel entry included, in seconds; `bandwidth` is what one chip sends
into the fabric while it receives as much, in bytes per second. `size` is the bytes of the whole vector that
each chip holds or ends up with.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from mapper.errors import UsageError


@dataclass(frozen=True)
class Fabric:
    """What joins `chips` chips: groups of `node` chips on fast links, and a slower network between groups.

    Each chip has its own port into both. `switched`: any chip reaches any other at full rate in one step;
    else neighbours only, and vectors go round rings.
    """

    node: int
    latency: float
    bandwidth: float
    network_latency: float = 0.0
    network_bandwidth: float = 0.0
    switched: bool = True


def one_shot(size: float, chips: int, latency: float, bandwidth: float) -> float:
    """All-reduce where each chip reads all others' vectors at once: one step of (chips - 1) x size."""
    return latency + (chips - 1) * size / bandwidth


def two_shot(size: float, chips: int, latency: float, bandwidth: float) -> float:
    """All-reduce as a direct reduce-scatter and a direct all-gather: two steps, 2 (chips - 1) / chips x
    size."""
    return 2 * latency + 2 * (chips - 1) / chips * size / bandwidth


def ring(size: float, chips: int, latency: float, bandwidth: float) -> float:
    """All-reduce round a ring: 2 (chips - 1) steps of size / chips, the fewest bytes that any algorithm sends
    (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009)."""
    return 2 * (chips - 1) * (latency + size / chips / bandwidth)


ALL_REDUCE = MappingProxyType({"one-shot": one_shot, "two-shot": two_shot, "ring": ring})


def gather(size: float, chips: int, latency: float, bandwidth: float, switched: bool = True) -> float:
    """All-gather, or reduce-scatter, which moves as much: each chip sends (chips - 1) / chips x size, in one
    direct step or round a ring."""
    steps = 1 if switched else chips - 1
    return steps * latency + (chips - 1) / chips * size / bandwidth


def send(size: float, latency: float, bandwidth: float) -> float:
    """One chip to another: the hand-over between two pipeline stages."""
    return latency + size / bandwidth


def all_reduce(size: float, chips: int, fabric: Fabric) -> float:
    """The quickest way to give all of `chips` chips the sum of their vectors of `size` bytes; 0 for one chip.

    Over several nodes: reduce-scatter inside each, all-reduce of each chip's share between them, all-gather
    inside. Raises UsageError where whole nodes do not make up `chips`.
    """
    inside, nodes = _split(chips, fabric)
    if nodes == 1:
        return _flat(size, inside, fabric.latency, fabric.bandwidth, fabric.switched)
    around = (
        2 * gather(size, inside, fabric.latency, fabric.bandwidth, fabric.switched) if inside > 1 else 0.0
    )
    return around + _flat(size / inside, nodes, fabric.network_latency, fabric.network_bandwidth, True)


def all_gather(size: float, chips: int, fabric: Fabric) -> float:
    """Time until each of `chips` chips holds all of a vector of `size` bytes of which it had 1 / chips."""
    inside, nodes = _split(chips, fabric)
    seconds = 0.0
    if nodes > 1:
        seconds += gather(size / inside, nodes, fabric.network_latency, fabric.network_bandwidth)
    if inside > 1:
        seconds += gather(size, inside, fabric.latency, fabric.bandwidth, fabric.switched)
    return seconds


def all_to_all(size: float, chips: int, fabric: Fabric) -> float:
    """Time for each of `chips` chips to send an equal share of its `size` bytes to every one, itself
    included.

    Without a switch a share travels chips / 4 links on average round a two-way ring, all links busy.
    """
    inside, nodes = _split(chips, fabric)
    if chips == 1:
        return 0.0
    near = (inside - 1) / chips * size
    hops = max(1.0, inside / 4) if not fabric.switched else 1.0
    seconds = fabric.latency + near * hops / fabric.bandwidth if inside > 1 else 0.0
    if nodes > 1:
        far = (chips - inside) / chips * size
        seconds = max(seconds, fabric.network_latency + far / fabric.network_bandwidth)
    return seconds


def _flat(size: float, chips: int, latency: float, bandwidth: float, switched: bool) -> float:
    if chips == 1:
        return 0.0
    ways = ALL_REDUCE.values() if switched else (ring,)
    return min(way(size, chips, latency, bandwidth) for way in ways)


def _split(chips: int, fabric: Fabric) -> tuple[int, int]:
    inside = min(chips, fabric.node)
    if chips < 1 or chips % inside:
        raise UsageError(f"{chips} chips are not whole nodes of {fabric.node}")
    if chips > inside and not fabric.network_bandwidth > 0:
        raise UsageError(f"{chips} chips exceed one node of {fabric.node}, and the machine has no network")
    return inside, chips // inside
