"""In-flight batching as a discrete-event model: requests arrive, wait, prefill, decode, and leave.

Time is the sum of the iterations' times, which a target gives (`Phases`). Iterations that only decode, with
no request joining or leaving, are taken as one run of up to RUN steps whose time is the mean of its first
and its last step's, exact where a step's time is linear in the tokens cached.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

from mapper.errors import CapacityError, UsageError
from mapper.serving.phases import Iteration, Phases, Policy
from mapper.serving.speculative import NONE, Speculation
from mapper.serving.workload import Arrival, Workload

RUN = 256  # steps; a longer run would hide that attention's time is not quite linear in the tokens cached


@dataclass(frozen=True)
class Served:
    """One request's life in seconds. Tokens as the workload gave them."""

    arrival: float
    first: float
    last: float
    prompt: int
    output: int

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.first - self.arrival

    @property
    def latency(self) -> float:
        """Time from arrival to the last token."""
        return self.last - self.arrival

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 where there is one token only."""
        return (self.last - self.first) / (self.output - 1) if self.output > 1 else 0.0


@dataclass
class _Live:
    """A request that is not finished. `done` of `prompt` tokens are in the cache; `left` are to be
    produced."""

    order: int
    request: Arrival
    prompt: int
    left: float
    first: float | None = None
    done: int = 0
    joined: float = 0.0
    room: float = 0.0
    """Cache rows that are reserved for it."""

    @property
    def whole(self) -> float:
        """Cache rows that it holds at the end."""
        return self.prompt + self.left


@dataclass
class _State:
    """The server. Decoding sequences are counted by `ticks`, the tokens each has had since the start: a
    sequence that joined at tick j with c cached tokens has c + ticks - j now, so `offset` sums c - j."""

    waiting: deque[_Live]
    prefilling: deque[_Live] = field(default_factory=deque)
    decoding: list[tuple[float, int, _Live]] = field(default_factory=list)  # a heap, by the last token's tick
    now: float = 0.0
    ticks: float = 0.0
    offset: float = 0.0
    reserved: float = 0.0

    @property
    def cached(self) -> float:
        """Tokens in the cache, of decoding sequences."""
        return self.offset + len(self.decoding) * self.ticks

    @property
    def held(self) -> float:
        """Tokens in the cache, of all sequences."""
        return self.cached + sum(live.done for live in self.prefilling)


def serve(
    phases: Phases, workload: Workload, policy: Policy, speculation: Speculation = NONE
) -> tuple[Served, ...]:
    """Serve all requests of `workload`; their lives, in the order in which they finished.

    Raises CapacityError where a request alone does not fit the cache, UsageError for an empty workload.
    """
    source = workload.source()
    largest = max((r.prompt + r.output for r in source.requests), default=0)
    if not largest:
        raise UsageError("a workload needs at least one request with at least one token")
    if largest > phases.capacity:
        raise CapacityError(
            f"a request of {largest} tokens does not fit the cache, which holds {phases.capacity} tokens"
        )
    state, count = _State(deque()), 0
    finished: list[Served] = []
    while len(finished) < len(source.requests):
        for arrival in source.arrived(state.now, len(finished)):
            state.waiting.append(_Live(count, arrival, arrival.prompt, arrival.output))
            count += 1
        if not _busy(state):
            state.now = source.next_arrival()
            continue
        _admit(state, phases, policy)
        _advance(state, phases, policy, speculation, source.next_arrival())
        finished += _leave(state)
    return tuple(finished)


def _busy(state: _State) -> bool:
    return bool(state.waiting or state.prefilling or state.decoding)


def _admit(state: _State, phases: Phases, policy: Policy) -> None:
    while state.waiting and len(state.prefilling) + len(state.decoding) < policy.sequences:
        live = state.waiting[0]
        if policy.reserve:
            fits = state.reserved + live.whole <= phases.capacity
        else:
            coming = sum(p.prompt for p in state.prefilling)
            room = phases.capacity - state.cached - coming - len(state.decoding)
            fits = live.prompt < room or not (state.prefilling or state.decoding)
        if not fits:
            return
        live.room = live.whole
        state.reserved += live.room
        state.prefilling.append(state.waiting.popleft())


def _advance(state: _State, phases: Phases, policy: Policy, speculation: Speculation, arrival: float) -> None:
    decode = len(state.decoding)
    width = speculation.draft + 1
    chunks = _chunks(state, policy, decode * width)
    if not chunks:
        _decode(state, phases, policy, speculation, arrival)
        return
    tokens = sum(size for _, size in chunks)
    seen = sum(size * (live.done + (size + 1) / 2) for live, size in chunks) / tokens
    together = decode if policy.mixed else 0
    if together and not policy.reserve:
        together = _make_room(state, phases, speculation)
    context = state.cached / together if together else 0.0
    state.now += phases.seconds(Iteration(together, context, width, tokens, seen, len(chunks)))
    if together:
        state.now += speculation.seconds(together)
        state.ticks += speculation.gain
    for live, size in chunks:
        live.done += size
        if live.done == live.prompt:
            state.prefilling.remove(live)
            _join(state, live)


def _chunks(state: _State, policy: Policy, decode: int) -> list[tuple[_Live, int]]:
    budget = policy.tokens - (decode if policy.mixed else 0)
    taken: list[tuple[_Live, int]] = []
    for live in state.prefilling:
        size = live.prompt - live.done
        if size > budget:
            if policy.chunked and budget > 0:
                taken.append((live, budget))
            elif not policy.chunked and not taken:
                taken.append((live, size))
            break
        taken.append((live, size))
        budget -= size
    return taken


def _join(state: _State, live: _Live) -> None:
    """The prompt is in: its last token gave the first token of output (unless it was computed once
    before)."""
    if live.first is None:
        live.first = state.now
        live.left -= 1
    live.joined = state.ticks
    state.offset += live.prompt - state.ticks
    heapq.heappush(state.decoding, (state.ticks + live.left, live.order, live))


def _decode(state: _State, phases: Phases, policy: Policy, speculation: Speculation, arrival: float) -> None:
    batch = len(state.decoding)
    if not policy.reserve:
        batch = _make_room(state, phases, speculation)
    gain, width = speculation.gain, speculation.draft + 1
    steps = min(RUN, max(1, math.ceil((state.decoding[0][0] - state.ticks) / gain - 1e-9)))
    if not policy.reserve:
        steps = max(1, min(steps, int((phases.capacity - state.held) / (gain * batch))))
    draft = speculation.seconds(batch)
    first = phases.seconds(Iteration(batch, state.cached / batch, width)) + draft
    if math.isfinite(arrival):
        steps = max(1, min(steps, math.ceil((arrival - state.now) / first)))
    last = first
    if steps > 1:
        context = state.cached / batch + gain * (steps - 1)
        last = phases.seconds(Iteration(batch, context, width)) + draft
    state.now += steps * (first + last) / 2
    state.ticks += gain * steps


def _make_room(state: _State, phases: Phases, speculation: Speculation) -> int:
    """Put the latest sequences back until one more token each fits; how many go on. What they produced is
    part of the prompt that they compute again."""
    while len(state.decoding) > 1 and state.held + speculation.gain * len(state.decoding) > phases.capacity:
        entry = max(state.decoding, key=lambda e: e[1])
        state.decoding.remove(entry)
        heapq.heapify(state.decoding)
        live = entry[2]
        had = state.ticks - live.joined
        state.offset -= live.prompt - live.joined
        state.reserved -= live.room
        live.prompt += round(had)
        live.left = max(live.left - had, 1)
        live.done = 0
        state.waiting.appendleft(live)
    return len(state.decoding)


def _leave(state: _State) -> list[Served]:
    gone: list[Served] = []
    while state.decoding and state.decoding[0][0] <= state.ticks + 1e-9:
        live = heapq.heappop(state.decoding)[2]
        state.offset -= live.prompt - live.joined
        state.reserved -= live.room
        request = live.request
        first = state.now if live.first is None else live.first
        gone.append(Served(request.time, first, state.now, request.prompt, request.output))
    return gone
