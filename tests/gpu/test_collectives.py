"""Collectives against an exchange simulated step by step, and against what no algorithm can beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapper.errors import UsageError
from mapper_gpu import collectives as c

LATENCY, BANDWIDTH = 3e-6, 4e11
FABRIC = c.Fabric(8, LATENCY, BANDWIDTH, 5e-6, 5e10)


def played(
    size: int, chips: int, moves: Callable[[int], list[tuple[int, int, slice, bool]]], steps: int
) -> float:
    """Play an all-reduce of real vectors: (from, to, which part, add or replace) per step. Every chip must
    end with the sum; the time is that of the chip that sends most in each step."""
    held = np.random.default_rng(0).integers(0, 99, (chips, size)).astype(float)
    wanted, time = held.sum(0), 0.0
    for step in range(steps):
        before, sent = held.copy(), np.zeros(chips)
        for source, target, part, add in moves(step):
            held[target, part] = before[source, part] + (held[target, part] if add else 0)
            sent[source] += held[target, part].size
        time += LATENCY + sent.max() / BANDWIDTH
    assert (held == wanted).all()
    return time


@pytest.mark.parametrize("chips", [2, 3, 4, 8])
def test_ring(chips: int) -> None:
    size = 8 * chips

    def part(i: int) -> slice:
        return slice(i % chips * 8, i % chips * 8 + 8)

    def moves(step: int) -> list[tuple[int, int, slice, bool]]:
        back = step >= chips - 1
        shift = step - (chips - 1) if back else step
        return [(k, (k + 1) % chips, part(k + back - shift), not back) for k in range(chips)]

    time = played(size, chips, moves, 2 * (chips - 1))
    assert c.ring(size, chips, LATENCY, BANDWIDTH) == pytest.approx(time)


@pytest.mark.parametrize("chips", [2, 4, 8])
def test_one_shot_and_two_shot(chips: int) -> None:
    size = 8 * chips
    pairs = [(a, b) for a in range(chips) for b in range(chips) if a != b]
    whole = played(size, chips, lambda _: [(a, b, slice(0, size), True) for a, b in pairs], 1)
    assert c.one_shot(size, chips, LATENCY, BANDWIDTH) == pytest.approx(whole)

    def own(k: int) -> slice:
        return slice(8 * k, 8 * k + 8)

    def moves(step: int) -> list[tuple[int, int, slice, bool]]:
        return [(a, b, own(a if step else b), not step) for a, b in pairs]

    time = played(size, chips, moves, 2)
    assert c.two_shot(size, chips, LATENCY, BANDWIDTH) == pytest.approx(time)
    assert 2 * c.gather(size, chips, LATENCY, BANDWIDTH) == pytest.approx(time)


@given(st.integers(1, 5), st.floats(1, 1e9), st.booleans())
def test_no_all_reduce_beats_the_fewest_bytes(power: int, size: float, switched: bool) -> None:
    chips = 2**power
    fabric = c.Fabric(64, LATENCY, BANDWIDTH, switched=switched)
    time = c.all_reduce(size, chips, fabric)
    assert time >= LATENCY + 2 * (chips - 1) / chips * size / BANDWIDTH - 1e-15
    assert time <= c.ring(size, chips, LATENCY, BANDWIDTH)
    assert time <= c.all_reduce(size * 2, chips, fabric)


def test_small_vectors_go_in_one_step_and_large_ones_in_two() -> None:
    assert c.all_reduce(16, 8, FABRIC) == c.one_shot(16, 8, LATENCY, BANDWIDTH)
    assert c.all_reduce(1e9, 8, FABRIC) == c.two_shot(1e9, 8, LATENCY, BANDWIDTH)


def test_between_nodes_each_chip_carries_its_share() -> None:
    size = 1e9
    inside = 2 * (LATENCY + 7 / 8 * size / BANDWIDTH)
    between = 5e-6 + (size / 8) / 5e10  # of two nodes, one step sends no more than two
    assert c.all_reduce(size, 16, FABRIC) == pytest.approx(inside + between)
    assert c.all_reduce(size, 16, FABRIC) > c.all_reduce(size, 8, FABRIC)
    assert c.all_gather(size, 16, FABRIC) == pytest.approx(inside / 2 + 5e-6 + (size / 8) / 2 / 5e10)


def test_all_to_all_is_bound_by_the_slower_fabric() -> None:
    assert c.all_to_all(8e6, 8, FABRIC) == pytest.approx(LATENCY + 7e6 / BANDWIDTH)
    assert c.all_to_all(16e6, 16, FABRIC) == pytest.approx(5e-6 + 8e6 / 5e10)
    ring = c.Fabric(8, LATENCY, BANDWIDTH, switched=False)
    assert c.all_to_all(8e6, 8, ring) == pytest.approx(LATENCY + 2 * 7e6 / BANDWIDTH)


def test_one_chip_needs_no_exchange_and_odd_splits_are_refused() -> None:
    assert c.all_reduce(1e9, 1, FABRIC) == c.all_gather(1e9, 1, FABRIC) == c.all_to_all(1e9, 1, FABRIC) == 0
    assert c.send(1e6, LATENCY, BANDWIDTH) == pytest.approx(LATENCY + 1e6 / BANDWIDTH)
    with pytest.raises(UsageError, match="whole nodes"):
        c.all_reduce(1.0, 12, FABRIC)
    with pytest.raises(UsageError, match="no network"):
        c.all_reduce(1.0, 16, c.Fabric(8, LATENCY, BANDWIDTH))
