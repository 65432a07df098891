"""Choosing the next token from logits: greedy, or drawn with temperature, top-k, top-p and min-p.

A draw follows the renormalised distribution over the tokens that are kept:

- temperature T: p = softmax(logits / T); 0 takes the largest logit, the first of equal ones;
- top-k: the k most probable tokens;
- top-p (nucleus; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"): the fewest most
  probable tokens whose probabilities, of those that top-k kept, sum to top_p or more;
- min-p (Nguyen et al. 2024, "Turning Up the Heat"): tokens at least min_p times as probable as the first.

Equal probabilities are ordered by token id, so that which tokens are kept depends on the logits alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault, UsageError

Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `top_k` 0, `top_p` 1 and `min_p` 0 keep every token. Raises UsageError for what
    is out of range, and for options that a temperature of 0 leaves without a meaning."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p must be 0 to 1, not {self.min_p}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}")
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise UsageError("top-k, top-p and min-p take a temperature above 0; at 0 decoding is greedy")

    def sampler(self) -> Sampler:
        """A sequence of choices from the start of the seed."""
        return Sampler(self, np.random.default_rng(self.seed))


@dataclass(frozen=True)
class Sampler:
    """Draws tokens; the same options, seed and logits give the same tokens."""

    options: Sampling
    generator: np.random.Generator

    def __call__(self, logits: npt.NDArray[Any]) -> int:
        """A token for logits [V]. Raises ExecutionFault where a draw meets no finite one."""
        if self.options.temperature == 0:
            return int(logits.argmax())
        tokens, p = kept(logits, self.options)
        at = int(np.searchsorted(np.cumsum(p), self.generator.random(), side="right"))
        return int(tokens[min(at, len(tokens) - 1)])


def kept(logits: npt.NDArray[Any], options: Sampling) -> tuple[Tokens, Floats]:
    """The tokens that may be drawn from logits [V], and their probabilities, which sum to 1. Raises
    ExecutionFault where the largest logit is not finite."""
    scaled = np.asarray(logits, np.float64)
    best = scaled.max()
    if not np.isfinite(best):
        raise ExecutionFault(f"no token can be drawn: the largest logit is {best}")
    weight = np.exp((scaled - best) / options.temperature)
    tokens: Tokens = np.arange(len(weight))
    if 0 < options.top_k < len(weight):
        tokens = _largest(weight, options.top_k)
    if options.top_p < 1:
        tokens = tokens[_nucleus(weight[tokens], options.top_p)]
    tokens = tokens[weight[tokens] >= options.min_p]
    chosen = weight[tokens]
    return tokens, chosen / chosen.sum()


def _largest(weight: Floats, count: int) -> Tokens:
    """Indices of the `count` largest, largest first, of equal ones the first: without sorting the others."""
    bar = np.partition(weight, -count)[-count]
    above = np.flatnonzero(weight > bar)
    level = np.flatnonzero(weight == bar)[: count - len(above)]
    found = np.concatenate([above, level])
    return found[np.argsort(-weight[found], kind="stable")]


def _nucleus(weight: Floats, share: float) -> Tokens:
    """Indices of the fewest largest that sum to `share` of all."""
    wanted = share * float(weight.sum())
    for count in (256, 4096, len(weight)):  # the nucleus is small nearly always
        first = _largest(weight, min(count, len(weight)))
        sums = np.cumsum(weight[first])
        if sums[-1] >= wanted:
            break
    return first[: int(np.searchsorted(sums, wanted)) + 1]
