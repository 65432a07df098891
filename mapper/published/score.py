"""Errors of predictions, gathered: by framework, by source, by system, over all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mapper.published.evaluate import Outcome
from mapper.published.points import group


@dataclass(frozen=True)
class Score:
    """Of `rows` predictions: mean, median and 90th percentile of the absolute error, and the median error."""

    rows: int
    mape: float
    median: float
    p90: float
    bias: float

    def record(self) -> dict[str, float]:
        """As JSON; errors are fractions of the published value."""
        return {
            "rows": self.rows,
            "mape": self.mape,
            "median": self.median,
            "p90": self.p90,
            "bias": self.bias,
        }


def score(errors: Sequence[float]) -> Score | None:
    """The score of signed relative errors; None where there are none."""
    if not errors:
        return None
    sizes, n = sorted(abs(e) for e in errors), len(errors)
    return Score(n, sum(sizes) / n, _median(sizes), sizes[-(-9 * n // 10) - 1], _median(sorted(errors)))


def _median(ordered: Sequence[float]) -> float:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


KEYS: dict[str, Callable[[Outcome], str]] = {
    "framework": lambda o: o.framework or "none",
    "source": lambda o: group(o.row.source),
    "system": lambda o: o.row.system,
    "model": lambda o: o.row.model,
}


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """{"all" | "fitted" | "left_out": {"over_all": score, "framework": {name: score}, ...}}."""
    predicted = [o for o in outcomes if o.error is not None]
    subsets = {
        "all": predicted,
        "fitted": [o for o in predicted if o.fitted],
        "left_out": [o for o in predicted if not o.fitted],
    }
    return {name: _scores(subset) for name, subset in subsets.items()}


def _scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "over_all": _record(outcomes),
        **{
            key: {
                name: _record([o for o in outcomes if of(o) == name]) for name in sorted({*map(of, outcomes)})
            }
            for key, of in KEYS.items()
        },
    }


def _record(outcomes: Iterable[Outcome]) -> dict[str, float] | None:
    found = score([o.error for o in outcomes if o.error is not None])
    return None if found is None else found.record()


def record(outcome: Outcome) -> dict[str, Any]:
    """A row as JSON: what was published, what is predicted, the error or the reason of the exclusion."""
    row = outcome.row
    return {
        "line": row.line,
        "system": row.system,
        "chips": row.chips,
        "model": row.model,
        "precision": row.weights,
        "batch": row.batch,
        "context_in": row.prompt,
        "context_out": row.output,
        "framework": outcome.framework,
        "source": row.source,
        "target": outcome.target,
        "machine": outcome.machine,
        "metric": row.metric,
        "published": row.published,
        "predicted": outcome.predicted,
        "error": outcome.error,
        "ttft_ms": None if row.ttft is None else row.ttft * 1e3,
        "predicted_ttft_ms": None if outcome.ttft is None else outcome.ttft * 1e3,
        "excluded": outcome.predicted is None,
        "reason": outcome.reason,
        "fitted": outcome.fitted,
    }
