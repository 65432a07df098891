"""Who asks: a closed loop that keeps a number of requests in flight, or arrivals at a rate."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from mapper.errors import UsageError


@dataclass(frozen=True)
class Arrival:
    """A request: when it arrives (seconds), tokens of its prompt and of its output."""

    time: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Workload:
    """`requests` requests of `prompt` tokens in and `output` tokens out.

    `concurrency`: so many are in flight at any time, the next arriving as one leaves; else `rate` per second
    arrive, as a Poisson process. `spread`: lengths are uniform between (1 - spread) times the given and the
    given ones. Random numbers come from `seed` alone.
    """

    requests: int
    prompt: int
    output: int
    concurrency: int | None = None
    rate: float | None = None
    spread: float = 0.0
    seed: int = 0

    def source(self) -> Source:
        """The requests, ready to arrive. Raises UsageError for a workload without meaning."""
        if (self.concurrency is None) == (self.rate is None):
            raise UsageError("a workload has either a concurrency or an arrival rate")
        if min(self.requests, self.prompt, self.output, self.concurrency or 1) < 1 or (self.rate or 1) <= 0:
            raise UsageError("requests, tokens in and out, concurrency and rate must be positive")
        if not 0 <= self.spread < 1:
            raise UsageError(f"the spread of lengths must be in 0..1, not {self.spread}")
        draw = random.Random(self.seed)
        lengths = [
            (self._length(draw, self.prompt), self._length(draw, self.output)) for _ in range(self.requests)
        ]
        times = list(self._times(draw))
        return Source([Arrival(t, i, o) for t, (i, o) in zip(times, lengths, strict=True)], self.concurrency)

    def _length(self, draw: random.Random, most: int) -> int:
        return most if not self.spread else max(1, round(most * (1 - self.spread * draw.random())))

    def _times(self, draw: random.Random) -> Iterator[float]:
        now = 0.0
        for _ in range(self.requests):
            yield now
            now += draw.expovariate(self.rate) if self.rate else 0.0


@dataclass
class Source:
    """Requests that have not arrived yet; `limit` in flight at most, where it is given."""

    requests: Sequence[Arrival]
    limit: int | None
    sent: int = field(default=0)

    def arrived(self, now: float, finished: int) -> Iterator[Arrival]:
        """Requests that arrive up to `now`, when `finished` have left."""
        while self.sent < len(self.requests):
            if self.limit is None:
                if self.requests[self.sent].time > now:
                    return
                request = self.requests[self.sent]
            elif self.sent - finished < self.limit:
                plan = self.requests[self.sent]
                request = Arrival(now, plan.prompt, plan.output)
            else:
                return
            self.sent += 1
            yield request

    def next_arrival(self) -> float:
        """When the next one arrives: infinity in a closed loop, where that hangs on who leaves."""
        if self.limit is not None or self.sent == len(self.requests):
            return inf
        return self.requests[self.sent].time
