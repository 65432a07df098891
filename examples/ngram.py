"""A character n-gram model with interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1999).

It is the baseline that the example model has to beat.  The highest order uses raw counts, the lower orders
continuation counts; each order has three discounts estimated from its counts of counts.
"""

from __future__ import annotations

import math
from collections import Counter


class KneserNey:
    """A character model of the given order: ``order - 1`` characters of context predict the next one."""

    def __init__(self, text: str, order: int = 5) -> None:
        self.order = order
        # One more symbol than was seen, so that an unseen character still has a probability.
        self.uniform = 1.0 / (len(set(text)) + 1)
        self.counts: list[Counter[str]] = [Counter() for _ in range(order + 1)]
        self.counts[order] = Counter(text[i : i + order] for i in range(len(text) - order + 1))
        for length in range(order - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])
        self.discounts = [self._discounts(counts) for counts in self.counts]
        self.contexts = list(map(self._contexts, self.counts, self.discounts))
        self._cache: dict[str, float] = {}

    @staticmethod
    def _discounts(counts: Counter[str]) -> tuple[float, float, float, float]:
        """Discounts for counts of 0, 1, 2 and 3 or more."""
        seen = Counter(counts.values())
        n1, n2, n3, n4 = (seen[count] for count in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            discounts = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
            if all(0 < discount < count for count, discount in enumerate(discounts, 1)):
                return 0.0, *discounts
        # Single characters have too few rare ones to estimate from: one mild discount for all.
        return 0.0, 0.5, 0.5, 0.5

    @staticmethod
    def _contexts(
        counts: Counter[str], discounts: tuple[float, float, float, float]
    ) -> dict[str, tuple[float, float]]:
        """For every context, the sum of its counts and the mass that discounting frees."""
        totals: Counter[str] = Counter()
        freed: dict[str, float] = {}
        for gram, count in counts.items():
            context = gram[:-1]
            totals[context] += count
            freed[context] = freed.get(context, 0.0) + discounts[min(count, 3)]
        return {context: (total, freed[context] / total) for context, total in totals.items()}

    def probability(self, gram: str) -> float:
        """Probability of the last character of ``gram`` after the characters before it."""
        if not gram:
            return self.uniform
        known = self._cache.get(gram)
        if known is None:
            known = self.probability(gram[1:]) if len(gram) > 1 else self.uniform
            context = self.contexts[len(gram)].get(gram[:-1])
            if context is not None:
                total, freed = context
                count = self.counts[len(gram)][gram]
                known = (count - self.discounts[len(gram)][min(count, 3)]) / total + freed * known
            self._cache[gram] = known
        return known

    def bits(self, text: str) -> float:
        """Bits that the model spends on a text; its first characters have less context."""
        return -sum(
            math.log2(self.probability(text[max(0, i - self.order + 1) : i + 1])) for i in range(len(text))
        )
