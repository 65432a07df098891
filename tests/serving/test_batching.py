"""The serving view against closed forms: what a queue must obey whatever the hardware."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mapper.errors import CapacityError, UsageError
from mapper.serving.batching import serve
from mapper.serving.measures import distribution, measure
from mapper.serving.phases import Iteration, Policy
from mapper.serving.speculative import Speculation
from mapper.serving.workload import Workload


@dataclass(frozen=True)
class Linear:
    """An iteration of `base` seconds, plus so much per sequence, cached token and prompt token."""

    base: float = 1e-3
    sequence: float = 0.0
    cached: float = 0.0
    token: float = 0.0
    capacity: int = 1 << 30

    def seconds(self, i: Iteration) -> float:
        return (
            self.base + self.sequence * i.decode * i.width + self.cached * i.decode * i.context
            + self.token * i.prefill
        )  # fmt: skip


def test_alone_the_time_per_token_is_the_step_time() -> None:
    served = serve(Linear(token=1e-5), Workload(3, 100, 50, concurrency=1), Policy())
    for one in served:
        assert one.ttft == pytest.approx(1e-3 + 100e-5)
        assert one.tpot == pytest.approx(1e-3)
    assert measure(served).tokens_per_s == pytest.approx(50 / (1e-3 + 100e-5 + 49e-3))


def test_attention_time_is_summed_over_the_growing_context() -> None:
    served = serve(Linear(cached=1e-6), Workload(1, 100, 1000, concurrency=1), Policy())
    steps = sum(1e-3 + 1e-6 * (100 + i) for i in range(999))
    assert served[0].last - served[0].first == pytest.approx(steps, rel=1e-12)


def test_a_static_batch_prefills_together_and_ends_together() -> None:
    served = serve(Linear(sequence=1e-5, token=1e-6), Workload(8, 64, 32, concurrency=8), Policy())
    prefill = 1e-3 + 8 * 64 * 1e-6
    assert {round(s.last, 12) for s in served} == {round(prefill + 31 * (1e-3 + 8e-5), 12)}


def test_a_prompt_longer_than_an_iteration_is_chunked() -> None:
    policy = Policy(tokens=256)
    served = serve(Linear(token=1e-6), Workload(1, 1000, 1, concurrency=1), policy)
    assert served[0].ttft == pytest.approx(4 * 1e-3 + 1000e-6)
    whole = serve(Linear(token=1e-6), Workload(1, 1000, 1, concurrency=1), Policy(256, chunked=False))
    assert whole[0].ttft == pytest.approx(1e-3 + 1000e-6)


def test_prompts_taken_alone_stop_decoding_and_mixed_ones_do_not() -> None:
    work = Workload(40, 200, 40, concurrency=4, spread=0.5, seed=3)
    model = Linear(token=1e-5)
    mixed = measure(serve(model, work, Policy()))
    alone = measure(serve(model, work, Policy(mixed=False)))
    assert mixed.seconds < alone.seconds


LIVES = st.builds(
    Workload,
    requests=st.integers(1, 60),
    prompt=st.integers(1, 300),
    output=st.integers(1, 80),
    concurrency=st.integers(1, 20),
    spread=st.floats(0, 0.9),
    seed=st.integers(0, 9),
)
POLICIES = st.builds(
    Policy,
    tokens=st.integers(32, 512),
    sequences=st.integers(1, 30),
    mixed=st.booleans(),
    chunked=st.booleans(),
    reserve=st.booleans(),
)


@given(LIVES, POLICIES, st.integers(400, 4000))
@example(  # what a request reserves is given back whole
    Workload(requests=60, prompt=300, output=80, concurrency=1, spread=0.0),
    Policy(tokens=32, sequences=1, mixed=False, chunked=False, reserve=True),
    400,
)
@settings(max_examples=200, deadline=None)
def test_littles_law_holds_exactly_and_every_request_is_served(
    work: Workload, policy: Policy, cache: int
) -> None:
    model = Linear(sequence=1e-5, cached=1e-8, token=1e-6, capacity=cache)
    served = serve(model, work, policy)
    found = measure(served)
    assert len(served) == work.requests
    assert all(s.arrival <= s.first <= s.last for s in served)
    rate, latency = found.requests / found.seconds, found.latency.mean
    assert found.inside == pytest.approx(rate * latency, rel=1e-9)
    assert found.inside <= (work.concurrency or 0) * (1 + 1e-9)


def test_a_closed_loop_at_saturation_keeps_its_concurrency() -> None:
    work = Workload(4000, 64, 64, concurrency=16)
    found = measure(serve(Linear(sequence=1e-5, token=1e-6), work, Policy()))
    assert found.inside == pytest.approx(16, rel=0.01)
    rate = found.requests / found.seconds
    assert rate * found.latency.mean == pytest.approx(16, rel=0.01)


def test_arrivals_at_a_low_rate_meet_an_idle_server() -> None:
    model = Linear(token=1e-5)
    found = measure(serve(model, Workload(200, 100, 5, rate=1e-3), Policy()))
    assert found.ttft.p99 == pytest.approx(2e-3, rel=1e-6)
    busy = measure(serve(model, Workload(200, 100, 5, rate=2000.0), Policy(sequences=4)))
    assert busy.ttft.mean > 10 * found.ttft.mean


@dataclass
class Watching:
    """Notes how many tokens an iteration's decoding sequences have in the cache, at its end."""

    capacity: int
    most: float = 0.0

    def seconds(self, i: Iteration) -> float:
        self.most = max(self.most, i.decode * (i.context + i.width))
        return 1e-3


@pytest.mark.parametrize("reserve", [True, False])
def test_the_cache_never_overflows(reserve: bool) -> None:
    model = Watching(1000)
    served = serve(model, Workload(30, 100, 150, concurrency=30), Policy(reserve=reserve))
    assert len(served) == 30
    assert 500 < model.most <= 1000


def test_a_growing_cache_admits_more_than_a_reserved_one() -> None:
    work = Workload(60, 20, 200, concurrency=60)
    grown = measure(serve(Linear(capacity=2000), work, Policy(reserve=False)))
    kept = measure(serve(Linear(capacity=2000), work, Policy(reserve=True)))
    assert grown.ttft.mean < kept.ttft.mean


def test_a_request_that_cannot_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match="300 tokens"):
        serve(Linear(capacity=299), Workload(1, 200, 100, concurrency=1), Policy())


@pytest.mark.parametrize(("draft", "acceptance", "gain"), [(3, 0.0, 1.0), (3, 1.0, 4.0), (2, 0.5, 1.75)])
def test_speculation_yields_what_its_formula_says(draft: int, acceptance: float, gain: float) -> None:
    plain = serve(Linear(), Workload(1, 10, 1401, concurrency=1), Policy())
    fast = serve(Linear(), Workload(1, 10, 1401, concurrency=1), Policy(), Speculation(draft, acceptance))
    assert plain[0].tpot / fast[0].tpot == pytest.approx(gain, rel=2e-3)


def test_speculation_pays_for_the_width_and_the_draft() -> None:
    work = Workload(1, 10, 1001, concurrency=1)
    speculation = Speculation(3, 0.0, step=1e-4, step_each=1e-5)
    slow = serve(Linear(sequence=1e-4), work, Policy(), speculation)
    assert slow[0].tpot == pytest.approx(1e-3 + 4e-4 + 3 * 1.1e-4)


@pytest.mark.parametrize(
    "work",
    [Workload(0, 1, 1, concurrency=1), Workload(1, 1, 1), Workload(1, 1, 1, concurrency=1, spread=1.0),
     Workload(1, 1, 1, concurrency=1, rate=1.0), Workload(1, 1, 1, rate=-1.0)],
)  # fmt: skip
def test_workloads_without_meaning_are_refused(work: Workload) -> None:
    with pytest.raises(UsageError):
        serve(Linear(), work, Policy())
    with pytest.raises(UsageError):
        Speculation(-1)


def test_quantiles() -> None:
    found = distribution([float(i) for i in range(1, 101)])
    assert (found.p50, found.p90, found.p99, found.mean) == (50, 90, 99, 50.5)
    assert distribution([]).p99 == 0
