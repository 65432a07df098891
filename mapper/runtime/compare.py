"""How far two arrays are apart, where they part first, and when a differing token is excused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """`got` against `wanted`: the largest absolute error, and that over the largest magnitude wanted.

    `where` is the first place, in C order, whose error is above the allowed one (None where there is none).
    """

    name: str
    max_abs: float
    max_rel: float
    allowed: float
    where: tuple[int, ...] | None
    got: float
    wanted: float

    @property
    def ok(self) -> bool:
        """Whether no value is off by more than allowed."""
        return self.where is None

    def __str__(self) -> str:
        if self.ok:
            return f"{self.name}: largest error {self.max_abs:.3g}, allowed {self.allowed:.3g}"
        return (
            f"{self.name}{list(self.where or ())} is {self.got:.6g} instead of {self.wanted:.6g} "
            f"(allowed error {self.allowed:.3g}; largest {self.max_abs:.3g})"
        )


def compare(name: str, got: Array, wanted: Array, allowed: float) -> Difference:
    """Compare two arrays; `allowed` is an absolute error. Another shape, or a value that is not finite where
    the wanted one is, counts as an infinite error. Equal infinities agree."""
    if got.shape != wanted.shape:
        return Difference(name, np.inf, np.inf, allowed, (), float("nan"), float("nan"))
    if not wanted.size:
        return Difference(name, 0.0, 0.0, allowed, None, 0.0, 0.0)
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size else 0.0
    worst = float(error.max())
    relative = worst / scale if scale else (0.0 if worst == 0 else np.inf)
    bad = error > allowed
    if not bad.any():
        return Difference(name, worst, relative, allowed, None, 0.0, 0.0)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
    return Difference(name, worst, relative, allowed, where, float(a[where]), float(b[where]))


@dataclass(frozen=True)
class Tokens:
    """Greedy tokens of one step: how many sequences agree, and how many of the others are excused."""

    equal: int
    excused: int
    wrong: int


def compare_tokens(got: Array, wanted: Array, allowed: float) -> Tokens:
    """Greedy tokens from logits [B, V] of both. A differing token is excused only where the oracle's margin
    between its first and second choice is below the error that is allowed."""
    mine, right = got.argmax(-1), wanted.argmax(-1)
    equal = mine == right
    top = np.sort(np.asarray(wanted, np.float64), axis=-1)[:, -2:]
    margin = top[:, -1] - top[:, 0] if top.shape[1] > 1 else np.full(len(right), np.inf)
    excused = ~equal & (margin < allowed)
    return Tokens(int(equal.sum()), int(excused.sum()), int((~equal & ~excused).sum()))
