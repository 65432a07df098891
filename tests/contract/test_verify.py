"""Verification notices what is wrong, excuses near ties only, and works with either program alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper import driver
from mapper.errors import ModelError, UsageError
from mapper.execution import session
from mapper.runtime.caches import Entry
from mapper.runtime.inputs import interface, states
from mapper.runtime.oracle import Oracle, oracle
from mapper.runtime.verify import OracleJudge, verify
from mapper.schedule.tables import Schedule

Array = npt.NDArray[Any]
PLUGIN = "scalar"


@dataclass(frozen=True)
class Skewed:
    """An oracle that is wrong by `by` in one logit, or one cache entry, after `after` positions."""

    inner: Oracle
    after: int
    logit: float = 0.0
    entry: float = 0.0

    @property
    def name(self) -> str:
        return "skewed"

    @property
    def sha256(self) -> str:
        return self.inner.sha256

    def step(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> tuple[Array, dict[Entry, Array]]:
        logits, present = self.inner.step(ids, past, caches)
        if past >= self.after:
            logits[0, -1, 5] += self.logit
            present = {e: a.copy() for e, a in present.items()}
            present[("value", 1)][0, 0, -1, 3] += self.entry
        return logits, present


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    model = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama-op18.onnx"
    return driver.compile(model, PLUGIN, prompt=4, context=12)


@pytest.fixture(scope="module")
def beside(schedule: Schedule) -> Oracle:
    return oracle(schedule.model.path, interface(schedule.roles), states(schedule))


def outcome(schedule: Schedule, beside: Any, tokens: int = 4) -> Any:
    return verify(session(schedule), beside, OracleJudge(), tokens)


def test_agreement(schedule: Schedule, beside: Oracle) -> None:
    found = outcome(schedule, beside)
    assert found.ok and found.tokens_equal and found.tokens == 4
    assert found.record()["first_difference"] is None
    assert found.runs == 5


def test_a_wrong_logit_is_found_where_it_is(schedule: Schedule, beside: Oracle) -> None:
    found = outcome(schedule, Skewed(beside, 6, logit=0.5))
    assert not found.ok
    assert found.reason.startswith("position 6: logits[0, 0, 5] is ")
    assert found.max_abs_err == pytest.approx(0.5, rel=1e-3)


def test_a_wrong_cache_entry_is_found_where_it_is(schedule: Schedule, beside: Oracle) -> None:
    found = outcome(schedule, Skewed(beside, 5, entry=0.5))
    assert found.reason.startswith("position 5: cache.value.1[0, 0, 0, 3] is ")
    assert found.max_cache_err == pytest.approx(0.5, rel=1e-3)


def test_another_token_is_wrong_unless_the_margin_is_small(schedule: Schedule, beside: Oracle) -> None:
    far = outcome(schedule, Skewed(beside, 7, logit=1e3))
    assert far.tokens_differing >= 1 and far.tokens_excused == 0 and not far.tokens_equal
    assert any("greedy token" in f for f in far.failures)

    logits, _ = beside.step(np.array([[1, 2, 3, 4]]), 0, {})
    top = np.sort(logits[0, -1])[-2:]
    lead = float(top[1] - logits[0, -1, 5])
    tie: Any = Skewed(beside, 0, logit=lead * 1.00001)
    near = verify(session(schedule), tie, OracleJudge(10.0), 0, np.array([[1, 2, 3, 4]]))
    assert (near.tokens_differing, near.tokens_excused, near.ok) == (1, 1, True)


def test_decode_alone_starts_from_an_empty_cache_and_prefill_alone_is_compared(example_model: Path) -> None:
    decode = driver.compile(example_model, PLUGIN, phase="decode", context=8)
    face = oracle(example_model, interface(decode.roles), states(decode))
    found = outcome(decode, face)
    assert found.ok and found.tokens == 4 and found.runs == 5
    prefill = driver.compile(example_model, PLUGIN, phase="prefill", prompt=4, context=8)
    found = outcome(prefill, face)
    assert found.ok and found.tokens == 1 and found.runs == 1


def test_a_prompt_with_a_past_and_several_sequences(example_model: Path) -> None:
    made = driver.compile(example_model, PLUGIN, batch=2, prompt=4, context=12)
    face = oracle(example_model, interface(made.roles), states(made))
    ids = np.random.default_rng(1).integers(0, 2000, (2, 5))
    _, caches = face.step(ids, 0, {})
    found = verify(session(made), face, OracleJudge(), 3, ids[:, :2], caches)
    assert found.ok, found.failures
    assert found.tokens == 6


def test_another_model_or_too_many_tokens_are_refused(schedule: Schedule, beside: Oracle) -> None:
    other = Oracle(beside.session, beside.model, beside.caches, "0" * 64)
    with pytest.raises(ModelError, match="not the model"):
        outcome(schedule, other)
    with pytest.raises(UsageError, match="context is 12"):
        outcome(schedule, beside, 9)
