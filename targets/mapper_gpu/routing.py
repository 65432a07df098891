"""How many experts, blocks and rows a step's tokens make, and the fullest of several groups of experts.

Even routing: each of `rows` tokens chooses `chosen` of `count` experts, all choices equally likely. On one
group of chips that has all experts

    distinct = count (1 - (1 - chosen / count)^rows)                    experts are read, and
    blocks   = count E[ceil(Binomial(rows, chosen / count) / tile)]     blocks are worked through.

With `owners` groups that have count / owners experts each, the step takes as long as the fullest. That the
union of all choices has s experts has a probability by a Markov chain over tokens (a token's choice meets
Hypergeometric many of those that are there); given s, all sets of s experts are equally likely, so that

    P(no group has more than m) = [x^s] (sum over j <= m of C(count / owners, j) x^j)^owners / C(count, s)

exactly. Blocks of more than one per expert, and rows, are taken as independent from group to group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mapper.errors import LoweringError

Float = npt.NDArray[np.float64]
TALLEST = 128
"""Rows of a block at most: those of a tensor-core tile."""
SHORT = 8
"""Rows that cost a tensor core the same as one."""


@dataclass(frozen=True)
class Routing:
    """Of one step: `rows` tokens, `count` experts, `chosen` per token, blocks of `tile` rows; `owners` groups
    of chips have count / owners experts each, and `blocks`, `distinct` and `fullest` are of one of them."""

    rows: int
    count: int
    chosen: int
    tile: int
    owners: int = 1

    @property
    def pairs(self) -> int:
        """(token, choice) pairs, of all groups."""
        return self.rows * self.chosen

    @property
    def owned(self) -> int:
        """Experts of a group."""
        return self.count // self.owners

    @property
    def most(self) -> int:
        """Blocks of a group at most: one of a single pair for as many experts as it has, the other pairs in
        full ones. An expert has at most all rows, a token at most all experts of the group."""
        pairs = self.rows * min(self.chosen, self.owned)
        first = min(pairs, self.owned)
        if self.rows <= self.tile:
            return first
        return first + (pairs - first) // self.tile

    @property
    def distinct(self) -> float:
        """Experts that some token chose, on average; of the fullest group."""
        if self.owners == 1:
            return self.count * (1 - (1 - self.chosen / self.count) ** self.rows)
        return _distinct(self.rows, self.count, self.chosen, self.owners)

    @property
    def blocks(self) -> int:
        """Blocks of an average routing, rounded up; of the fullest group."""
        return max(1, min(self.most, math.ceil(_blocks(self) - 1e-9)))

    @property
    def fullest(self) -> float:
        """Pairs of the fullest group, on average."""
        if self.owners == 1:
            return float(self.pairs)
        return _pairs(self.rows, self.count, self.chosen, self.owners)

    def shared(self, rows: int, owners: int) -> Routing:
        """With other rows, and as many groups. Raises LoweringError where experts do not divide."""
        if self.count % owners:
            raise LoweringError(f"gpu: {self.count} experts do not divide among ep={owners} groups")
        made = routing_of(rows, self.count, self.chosen)
        return Routing(rows, self.count, self.chosen, made.tile, owners)


def routing_of(rows: int, count: int, chosen: int) -> Routing:
    """With blocks as tall as an expert's rows on average, but at least what a tensor core takes anyway; an
    expert has at most all rows."""
    mean = rows * chosen / (count * (1 - (1 - chosen / count) ** rows)) if chosen < count else rows
    tile = SHORT
    while tile < min(mean, TALLEST):
        tile *= 2
    return Routing(rows, count, chosen, min(tile, rows))


@lru_cache(maxsize=1 << 12)
def _blocks(r: Routing) -> float:
    if r.rows <= r.tile:
        return r.distinct
    if r.chosen >= r.count:
        return r.owned * math.ceil(r.rows / r.tile)
    taken = _binomial(r.rows, r.chosen / r.count)
    needed = -(-np.arange(r.rows + 1) // r.tile)
    if r.owners == 1:
        return float(r.count * (needed * taken).sum())
    each = np.asarray(np.bincount(needed, taken), np.float64)
    return _largest(_several(each, r.owned), r.owners)


@lru_cache(maxsize=1 << 12)
def _pairs(rows: int, count: int, chosen: int, owners: int) -> float:
    own = count // owners
    if rows == 1:
        return _distinct(1, count, chosen, owners)
    low, high = max(0, chosen - (count - own)), min(chosen, own)
    each = np.zeros(high + 1)
    for j in range(low, high + 1):
        each[j] = math.comb(own, j) * math.comb(count - own, chosen - j) / math.comb(count, chosen)
    return _largest(_several(each, rows), owners)


@lru_cache(maxsize=1 << 12)
def _distinct(rows: int, count: int, chosen: int, owners: int) -> float:
    chance = _union(rows, count, chosen)
    own = count // owners
    total = 0.0
    ways = [math.comb(count, s) for s in range(count + 1)]
    for most in range(own):
        # E[max] is the sum over m of P(max > m)
        poly = _power([math.comb(own, j) for j in range(most + 1)], owners, count)
        for s in np.flatnonzero(chance > 1e-12).tolist():
            total += chance[s] * (1.0 - (poly[s] / ways[s] if s < len(poly) else 0.0))
    return total


def _union(rows: int, count: int, chosen: int) -> Float:
    """P(the union of all tokens' choices has s experts), for s = 0 .. count."""
    step = np.zeros((count + 1, count + 1))
    for s in range(count + 1):
        for new in range(max(0, chosen - s), min(chosen, count - s) + 1):
            step[s, s + new] = (
                math.comb(s, chosen - new) * math.comb(count - s, new) / math.comb(count, chosen)
            )
    return np.asarray(np.linalg.matrix_power(step, rows)[0])


def _power(base: list[int], exponent: int, degree: int) -> list[int]:
    """A polynomial to a power, in whole numbers, without terms beyond a degree."""
    made = [1]
    while exponent:
        if exponent & 1:
            made = _times(made, base, degree)
        exponent >>= 1
        base = _times(base, base, degree) if exponent else base
    return made


def _times(a: list[int], b: list[int], degree: int) -> list[int]:
    made = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b[: len(made) - i]):
            made[i + j] += x * y
    return made


def _binomial(n: int, p: float) -> Float:
    k = np.arange(n + 1)
    table = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log = table[n] - table[k] - table[n - k]
    return np.asarray(np.exp(log + k * math.log(p) + (n - k) * math.log1p(-p)))


def _several(chance: Float, count: int) -> Float:
    """The distribution of the sum of `count` independent numbers, each with `chance`."""
    made = np.ones(1)
    while count:
        if count & 1:
            made = np.convolve(made, chance)
        count >>= 1
        if count:
            chance = np.convolve(chance, chance)
    return made


def _largest(chance: Float, count: int) -> float:
    """E[max] of `count` independent numbers with a distribution."""
    below = np.minimum(1.0, np.cumsum(chance))
    return float((1 - below**count).sum())
