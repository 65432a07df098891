"""The judge of narrow arithmetic: float64 agrees with onnxruntime; the error allowed is the format's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper.forward import Formats
from mapper.frontend.load import load
from mapper.judge import SLACK, FormatJudge
from mapper.runtime.caches import Entry
from mapper.runtime.inputs import interface
from mapper.runtime.oracle import Oracle, oracle

Array = npt.NDArray[Any]
CACHES = {(kind, layer): (1, 4, 128, 32) for layer in range(4) for kind in ("key", "value")}


def judge(model: Path, formats: Formats) -> FormatJudge:
    graph = load(model)
    return FormatJudge(graph, interface(graph.roles), formats, {})


@pytest.fixture(scope="module")
def beside(example_model: Path) -> Oracle:
    return oracle(example_model, interface(load(example_model).roles), CACHES)


def steps(beside: Oracle, tokens: int = 2) -> list[tuple[Array, int, Array, dict[Entry, Array]]]:
    """(ids, past, logits, new cache entries) of a prompt of 6 and some greedy steps, from onnxruntime."""
    ids, past, caches = np.arange(40, 46)[None], 0, dict[Entry, Array]()
    found = []
    for _ in range(tokens + 1):
        logits, after = beside.step(ids, past, caches)
        found.append((ids, past, logits, {e: a[:, :, past:] for e, a in after.items()}))
        past, caches, ids = past + ids.shape[1], after, logits[:, -1].argmax(-1)[:, None]
    return found


def test_float64_agrees_with_onnxruntime_at_each_step(example_model: Path, beside: Oracle) -> None:
    chosen = judge(example_model, Formats("float16", key_cache="float16"))
    for ids, past, logits, entries in steps(beside):
        wanted = chosen.judge(ids, past, logits, entries)
        np.testing.assert_allclose(wanted.logits, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
        for entry, array in entries.items():
            np.testing.assert_allclose(wanted.entries[entry], array, rtol=0, atol=1e-4)


def test_the_error_allowed_is_that_of_the_format(example_model: Path, beside: Oracle) -> None:
    first = steps(beside, 0)[0]
    allowed = {
        kind: judge(example_model, Formats(kind)).judge(*first).logits_error / SLACK
        for kind in ("float32", "float16")
    }
    largest = np.abs(first[2]).max()
    # half an ulp of the format, of operands of a few hundred products, spread by a dozen layers of operations
    assert 0 < allowed["float32"] < 2.0**-24 * largest * 100
    assert 2.0**-11 * largest / 10 < allowed["float16"] < 2.0**-11 * largest * 100
    assert allowed["float16"] > 100 * allowed["float32"]


def test_narrow_caches_are_counted(example_model: Path, beside: Oracle) -> None:
    first = steps(beside, 0)[0]
    wide = judge(example_model, Formats("float32")).judge(*first)
    narrow = judge(example_model, Formats("float32", key_cache="float16")).judge(*first)
    for layer in range(4):
        assert narrow.entry_error["key", layer] > 10 * wide.entry_error["key", layer]
        # half a unit in the last place of the largest key: float16 has 11 bits of mantissa
        assert (
            narrow.entry_error["key", layer] >= SLACK * 2.0**-11 * np.abs(first[3]["key", layer]).max() * 0.99
        )
    assert narrow.entry_error["value", 0] == wide.entry_error["value", 0]
