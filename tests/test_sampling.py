"""Sampling, against the distribution written down again in float64, and against what draws show."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mapper.errors import ExecutionFault, UsageError
from mapper.sampling import Sampling, kept

Floats = npt.NDArray[np.float64]
OPTIONS = [
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.9, top_k=5),
    Sampling(1.0, top_p=0.8),
    Sampling(1.3, min_p=0.1),
    Sampling(1.5, top_k=9, top_p=0.9, min_p=0.02),
]


def distribution(logits: Floats, o: Sampling) -> Floats:
    """Probability of every token, by a full sort and the definitions in turn."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    p = np.exp(logits / o.temperature - np.logaddexp.reduce(logits / o.temperature))
    order = order[: o.top_k or None]
    total, sum_, nucleus = sum(p[i] for i in order), 0.0, []
    for i in order:
        if o.top_p < 1 and sum_ >= o.top_p * total:
            break
        nucleus.append(i)
        sum_ += p[i]
    nucleus = [i for i in nucleus if p[i] >= o.min_p * p.max()]
    out = np.zeros(len(logits))
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options: Sampling) -> None:
    """Pearson's statistic over the tokens that are kept stays below its mean by 6 standard deviations above:
    about 1e-6 of right samplers would fail, and the seed is fixed."""
    logits = np.random.default_rng(3).normal(0, 1.5, 24)
    wanted, draws = distribution(logits, options), 20_000
    sampler = options.sampler()
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=len(logits))
    assert not counts[wanted == 0].any()
    live = wanted > 0
    expected = draws * wanted[live]
    chi2 = float(((counts[live] - expected) ** 2 / expected).sum())
    freedom = int(live.sum()) - 1
    assert chi2 <= freedom + 6 * np.sqrt(2 * freedom)
    wrong = draws * distribution(logits, Sampling(options.temperature * 1.2))[live]
    assert ((counts[live] - wrong) ** 2 / wrong).sum() > freedom + 6 * np.sqrt(2 * freedom), "no power"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 300, 6000]), st.floats(0.3, 2.0), st.integers(0, 400),
    st.floats(0.05, 1.0), st.floats(0.0, 0.3), st.booleans(),
)  # fmt: skip
def test_kept_tokens_are_those_of_the_definitions(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, ties: bool
) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, size)
    logits = np.round(logits * 4) / 4 if ties else logits
    options = Sampling(temperature, top_k, top_p, min_p)
    sums = np.cumsum(np.sort(distribution(logits, Sampling(temperature, top_k)))[::-1])
    assume(not np.isclose(sums, top_p, rtol=1e-9, atol=0).any())  # the order of summing decides there
    tokens, p = kept(logits, options)
    wanted = distribution(logits, options)
    assert len(set(tokens.tolist())) == len(tokens)
    assert np.isclose(p.sum(), 1)
    got = np.zeros(size)
    got[tokens] = p
    assert np.allclose(got, wanted, rtol=1e-9, atol=0)


def test_a_nucleus_is_minimal_and_covering() -> None:
    for seed in range(50):
        logits = np.random.default_rng(seed).normal(0, 2, 5000)
        p = np.exp(logits - np.logaddexp.reduce(logits))
        tokens, _ = kept(logits, Sampling(1.0, top_p=0.83))
        assert p[tokens].sum() >= 0.83 - 1e-12
        assert p[tokens].sum() - p[tokens].min() < 0.83
        assert p[tokens].min() >= np.delete(p, tokens).max()


def test_greedy_takes_the_first_largest() -> None:
    assert Sampling().sampler()(np.array([1.0, 5.0, 5.0], np.float32)) == 1


def test_a_seed_decides() -> None:
    logits = np.random.default_rng(0).normal(0, 1, 1000)

    def draws(seed: int) -> list[int]:
        sampler = Sampling(1.0, seed=seed).sampler()
        return [sampler(logits) for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "top_k": -1}, {"temperature": 1.0, "min_p": 1.5}, {"seed": -1}, {"top_p": 0.5},
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


def test_logits_without_a_number_are_a_fault() -> None:
    with pytest.raises(ExecutionFault, match="nan"):
        Sampling(1.0).sampler()(np.array([0.0, np.nan]))
    assert Sampling(1.0).sampler()(np.array([-np.inf, 0.0, -np.inf])) == 1
