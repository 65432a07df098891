"""What a served workload amounts to: distributions of latencies, throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mapper.serving.batching import Served

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Distribution:
    """Mean and quantiles (p50, p90, p99: the smallest value that so large a share does not exceed)."""

    mean: float
    p50: float
    p90: float
    p99: float

    def record(self) -> dict[str, float]:
        """As JSON."""
        return {"mean": self.mean, "p50": self.p50, "p90": self.p90, "p99": self.p99}


def distribution(values: Sequence[float]) -> Distribution:
    """The distribution of `values`; all zero where there are none."""
    if not values:
        return Distribution(0.0, 0.0, 0.0, 0.0)
    ordered, n = sorted(values), len(values)
    quantiles = [ordered[max(0, -int(-share * n // 1) - 1)] for share in SHARES]
    return Distribution(sum(values) / n, *quantiles)


@dataclass(frozen=True)
class Measures:
    """Seconds and tokens per second of all requests of a run, from first arrival to last token.

    `inside` is the mean number of requests in the system over that time.
    """

    requests: int
    seconds: float
    ttft: Distribution
    tpot: Distribution
    latency: Distribution
    tokens_per_s: float
    tokens_per_s_per_user: float
    inside: float

    def record(self) -> dict[str, Any]:
        """As JSON: seconds, tokens per second."""
        return {
            "requests": self.requests,
            "seconds": self.seconds,
            "ttft_s": self.ttft.record(),
            "tpot_s": self.tpot.record(),
            "latency_s": self.latency.record(),
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_user": self.tokens_per_s_per_user,
            "mean_in_system": self.inside,
        }


def measure(served: Sequence[Served]) -> Measures:
    """The measures of a run. Tokens per second per user is the inverse of the mean time per output token,
    tokens per second counts output tokens."""
    start, end = min(s.arrival for s in served), max(s.last for s in served)
    span = end - start
    tpot = distribution([s.tpot for s in served if s.output > 1])
    return Measures(
        requests=len(served),
        seconds=span,
        ttft=distribution([s.ttft for s in served]),
        tpot=tpot,
        latency=distribution([s.latency for s in served]),
        tokens_per_s=sum(s.output for s in served) / span if span else 0.0,
        tokens_per_s_per_user=1 / tpot.mean if tpot.mean else 0.0,
        inside=_area(served) / span if span else 0.0,
    )


def _area(served: Sequence[Served]) -> float:
    """Requests in the system, integrated over time, from the times of arrivals and departures."""
    events = sorted([(s.arrival, 1) for s in served] + [(s.last, -1) for s in served])
    area, inside, before = 0.0, 0, events[0][0]
    for when, change in events:
        area += inside * (when - before)
        inside, before = inside + change, when
    return area
