"""Experts and latent attention in bf16: every cached value is that of an independent evaluation which rounds
at the same places, near ties of routers included; a choice that rounding cannot make is rejected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper import driver, execution
from mapper.judge import SLACK, FormatJudge
from mapper.runtime.caches import Entry
from mapper.runtime.inputs import Decoder, interface
from mapper.runtime.verify import seeded_prompt
from mapper.zoo import families, files
from mapper_gpu import execute
from tests.gpu.common import built

Array = npt.NDArray[Any]
Chosen = list[list[frozenset[int]]]


def toy(name: str, seed: int, folder: Path) -> Path:
    layers = 4 if name == "deepseek-v3" else 2
    path = folder / f"{name}.onnx"
    files.write(families.shortened(families.tiny(families.config(name)), layers), path, "f32", seed=seed)
    return path


@contextmanager
def routers(monkeypatch: pytest.MonkeyPatch, worst: bool = False) -> Iterator[Chosen]:
    """What the executor's routers choose, token by token; with `worst`, they take the experts that score
    lowest."""
    plain, found = execute.MEANINGS["top_k"], []

    def top_k(task: Any, r: dict[str, Any], out: str, logits: str, *rest: Any) -> None:
        if worst:
            r[logits] = -r[logits]
        plain(task, r, out, logits, *rest)
        found.append([frozenset(row[: rest[1]].astype(int).tolist()) for row in r[out]])

    with monkeypatch.context() as patch:
        patch.setitem(execute.MEANINGS, "top_k", top_k)
        yield found


@pytest.mark.parametrize(("name", "seed"), [("deepseek-v3", 1), ("deepseek-v3", 2), ("gpt-oss-20b", 5)])
def test_values_are_those_that_rounding_gives(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each step: the caches against the judge's pass in bf16, within what another order of float32
    sums makes of a last place; the executor's choices against those that the judge found from the results."""
    built(toy(name, seed, tmp_path), weights="bf16", prompt=6, context=16, out=tmp_path / "s")
    schedule = driver.describe(tmp_path / "s").schedule
    path, names = execution.model_file(schedule, None), interface(schedule.roles)
    ids, past, differing = seeded_prompt(schedule), 0, 0
    caches: dict[Entry, Array] = {}
    with execution.oracles(schedule, path, names, {}) as (beside, judge, _):
        assert isinstance(judge, FormatJudge)
        decoder = Decoder(execution.session(schedule))
        decoder.fill({})
        for _ in range(5):
            logits, caches = beside.step(ids, past, caches)
            with routers(monkeypatch) as chosen:
                got = decoder.feed(ids, past)
            entries = decoder.entries(past, past + ids.shape[1])
            new = {e: a[:, :, past:] for e, a in caches.items()}
            wanted = judge.judge(ids, past, logits, new, (got, entries))
            assert judge.last is not None
            taken = {(i, t): e for i, tokens in enumerate(chosen) for t, e in enumerate(tokens)}
            assert taken == {place: frozenset(e) for place, e in judge.last.chosen.items()}
            differing += wanted.other_choices
            assert np.abs(got - wanted.logits).max() <= 1.2 * wanted.logits_error / SLACK
            for e, stored in judge.last.stored.items():
                last = np.abs(entries[e] - stored[:, :, past:]) / np.maximum(
                    np.abs(stored[:, :, past:]), 1e-2
                )
                assert last.max() <= 2.0**-7 and (last > 0).mean() < 0.05, e
            past, ids = past + ids.shape[1], logits[:, -1].argmax(-1)[:, None]
    assert differing == {("deepseek-v3", 1): 2, ("deepseek-v3", 2): 0, ("gpt-oss-20b", 5): 1}[name, seed]


def test_verification_counts_the_near_ties(tmp_path: Path) -> None:
    """The toy's flipped choice moves the logits by a quarter of their size."""
    built(toy("deepseek-v3", 1, tmp_path), weights="bf16", prompt=4, context=12, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=5)
    assert found.ok, found.failures
    assert found.max_rel_err > 0.2
    record = found.record()
    assert record["expert_near_ties"] >= record["expert_choices_differing"] == 1


def test_a_choice_that_rounding_cannot_make_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(toy("mixtral-8x7b", 1, tmp_path), weights="bf16", prompt=4, context=12, out=tmp_path / "s")
    with routers(monkeypatch, worst=True):
        found = driver.verify(tmp_path / "s", tokens=2)
    assert not found.ok


def test_one_token_of_a_wrong_expert_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last choice of one token in one layer is replaced by an expert that is far from being chosen."""
    built(toy("qwen3-30b-a3b", 1, tmp_path), weights="bf16", prompt=4, context=12, out=tmp_path / "s")
    plain, calls = execute.MEANINGS["top_k"], []

    def top_k(task: Any, r: dict[str, Any], out: str, logits: str, *rest: Any) -> None:
        plain(task, r, out, logits, *rest)
        calls.append(0)
        if len(calls) == 1:
            r[out][1, rest[1] - 1] = int(np.argmin(r[logits][1]))

    monkeypatch.setitem(execute.MEANINGS, "top_k", top_k)
    found = driver.verify(tmp_path / "s", tokens=2)
    assert not found.ok and "positions 0..3" in found.reason


def test_a_long_prompt_is_judged_in_few_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the near ties of 48 tokens those are tried that the first token which is off can have made."""
    passes: list[int] = []
    one = FormatJudge._pass

    def counted(self: FormatJudge, *rest: Any) -> Any:
        passes.append(1)
        return one(self, *rest)

    monkeypatch.setattr(FormatJudge, "_pass", counted)
    model = toy("mixtral-8x7b", 2, tmp_path)
    built(model, prompt=48, context=50, weights="bf16", phase="prefill", out=tmp_path / "s")
    found = driver.verify(tmp_path / "s")
    assert found.ok, found.failures
    assert found.near_ties > 20 and len(passes) < 4 * found.other_choices + 8
