"""Choices of experts that rounding decides: which ones a router could have made instead.

A router takes the experts of the largest scores. Where two of them are nearer to each other than a target's
rounding moves them, either choice is right, and everything behind it follows from the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mapper.forward import Choices, Routed
from mapper.ir.op import DataflowOp
from mapper.ir.reference_experts import best_of
from mapper.ir.types import Array


@dataclass(frozen=True)
class NearTie:
    """Other experts that a router could take for a token."""

    router: int
    token: int
    experts: tuple[int, ...]


def choices(routed: Sequence[Routed]) -> Choices:
    """What all routers chose."""
    return {(i, t): row for i, r in enumerate(routed) for t, row in enumerate(r.index.tolist())}


def near_ties(exact: Sequence[Routed], stored: Sequence[Routed], slack: float) -> list[NearTie]:
    """All choices that an error of `slack` times the largest one between the scores of two passes can make,
    where both made the same choices before."""
    found = []
    for number, (one, other) in enumerate(zip(exact, stored, strict=True)):
        error = slack * float(np.abs(one.scores - other.scores).max(initial=0.0))
        for token, (scores, index) in enumerate(zip(one.scores, one.index.tolist(), strict=True)):
            for experts in _others(one.op, scores, error, frozenset(index)):
                found.append(NearTie(number, token, experts))
    return found


def _others(op: DataflowOp, scores: Array, error: float, own: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Sets of experts that become the best ones where an expert, or a group of experts, is scored too high or
    too low by `error`, and all others are off by that to the other side."""
    seen = {own}
    runs = [slice(e, e + 1) for e in range(len(scores))]
    if op.attr("groups"):
        size = len(scores) // op.attr("groups")
        runs += [slice(first, first + size) for first in range(0, len(scores), size)]
    for run in runs:
        for shift in (2 * error, -2 * error):
            moved = scores.copy()
            moved[run] += shift
            experts = tuple(best_of(op, moved).tolist())
            if frozenset(experts) not in seen:
                seen.add(frozenset(experts))
                yield experts
