"""How far logits are from another model's on the same tokens: what quantised weights cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mapper.runtime.caches import Entry
from mapper.runtime.compare import compare

if TYPE_CHECKING:
    from mapper.runtime.verify import Stepper

Array = npt.NDArray[Any]


@dataclass
class Deviation:
    """Collects logits beside those of `original`, which is fed the same tokens and keeps `caches` of its own.

    `tokens` counts the greedy tokens compared (the last position of each step and sequence).
    """

    original: Stepper
    caches: Mapping[Entry, Array]
    max_relative: float = 0.0
    tokens: int = 0
    differing: int = 0
    _squares: list[tuple[float, float]] = field(default_factory=list)

    def add(self, ids: Array, past: int, got: Array) -> None:
        """Compare one step: logits `got` [B, S, V] of tokens `ids` [B, S] after `past` positions."""
        logits, self.caches = self.original.step(ids, past, self.caches)
        self.max_relative = max(self.max_relative, compare("logits", got, logits, np.inf).max_rel)
        wanted = np.asarray(logits, np.float64)
        self._squares.append((float(((got - wanted) ** 2).sum()), float((wanted**2).sum())))
        self.tokens += len(got)
        self.differing += int((got[:, -1].argmax(-1) != logits[:, -1].argmax(-1)).sum())

    @property
    def relative_rms(self) -> float:
        """Root of the summed squared differences over the summed squares."""
        error, size = (math.fsum(column) for column in zip(*self._squares, strict=True))
        return math.sqrt(error / size) if size else 0.0

    def record(self) -> dict[str, Any]:
        """The stable JSON: `max_relative` is over the original's largest magnitude of a step."""
        return {
            "max_relative": self.max_relative,
            "relative_rms": self.relative_rms,
            "tokens_equal": self.differing == 0,
            "tokens": self.tokens,
            "tokens_differing": self.differing,
        }
