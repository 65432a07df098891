"""`mapper quantise`: perplexity as onnxruntime gives it, errors of the weights as NumPy gives them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

from mapper.perplexity import windows
from tests.command import inside

WINDOW, TOKENS = 32, 150


def said(*args: str) -> Any:
    done = inside("quantise", *args, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def nats(model: Path, ids: list[int]) -> float:
    """Negative log-likelihood of all ids but the first, by onnxruntime, window after window."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    total, scored = 0.0, 0
    while scored < len(ids) - 1:
        begin = max(0, scored - WINDOW // 2)
        feed = np.array([ids[begin : begin + WINDOW]][0][: len(ids) - 1 - begin])[None]
        past = {
            i.name: np.zeros((1, 4, 0, 32), np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        where = np.arange(feed.shape[1])[None]
        inputs = {"input_ids": feed, "attention_mask": np.ones_like(feed), "position_ids": where, **past}
        logits = session.run(["logits"], inputs)[0][0].astype(np.float64)
        for place in range(scored - begin, feed.shape[1]):
            row = logits[place]
            total += math.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[begin + place + 1]]
        scored = begin + feed.shape[1]
    return total


def test_perplexity_is_onnxruntimes_and_errors_are_numpys(example_model: Path) -> None:
    record = said(
        str(example_model), "--weights", "int4,f16", "--tokens", str(TOKENS), "--window", str(WINDOW)
    )
    assert [row["format"] for row in record["formats"]] == ["original", "int4", "f16"]
    assert (record["tokens"], record["window"]) == (TOKENS, WINDOW)
    original, four, half = record["formats"]

    tokenizer = Tokenizer.from_file(str(example_model.parent / "tokenizer.json"))
    text = (example_model.parent / "heldout.txt").read_text()
    first = tokenizer.token_to_id("<|endoftext|>")
    assert first is not None
    ids = [first, *tokenizer.encode(text).ids][: TOKENS + 1]
    assert original["perplexity"] == pytest.approx(math.exp(nats(example_model, ids) / TOKENS), rel=1e-5)
    characters = len(tokenizer.decode(ids[1:], skip_special_tokens=False))
    bits = nats(example_model, ids) / math.log(2) / characters
    assert original["bits_per_character"] == pytest.approx(bits, rel=1e-5)

    assert (original["bits_per_weight"], original["weight_error"]) == (32, 0)
    assert half["bits_per_weight"] == 16
    assert four["bits_per_weight"] == 4 + 16 / 32 + 4 / 32  # all rows are even numbers of blocks
    assert 0 < half["weight_error"] < 2**-11 < 0.05 < four["weight_error"] < 0.12
    assert four["worst_error"] >= four["weight_error"]
    assert four["worst_weight"].startswith("model.")
    assert abs(half["perplexity"] / original["perplexity"] - 1) < 1e-3
    assert four["perplexity"] != original["perplexity"]


def test_the_table_names_every_format(example_model: Path) -> None:
    done = inside("quantise", str(example_model), "--weights", "all", "--tokens", "20", "--window", "16")
    assert done.returncode == 0, done.stderr
    for name in (
        "original",
        "f32",
        "bf16",
        "int8",
        "int8row",
        "int4",
        "f8e4m3",
        "mxfp4",
        "perplexity",
        "20 tokens",
    ):
        assert name in done.stdout


def test_each_token_is_scored_once_with_half_a_window_before_it() -> None:
    for tokens in (1, 7, 8, 9, 12, 13, 100):
        found = windows(tokens, 8)
        scored = [t for begin, stop, first in found for t in range(first, stop)]
        assert scored == list(range(tokens))
        assert all(stop - begin <= 8 and (first == 0 or first - begin == 4) for begin, stop, first in found)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--weights", "int3"), "host has no weight format 'int3'; it has f32, f16"),
        (("--text", "none.txt"), "there is no text none.txt"),
        (("--tokens", "0"), "tokens must be at least 1"),
        (("--window", "1"), "window must be at least 2"),
    ],
)
def test_what_cannot_be_done_is_one_line(args: tuple[str, ...], says: str, example_model: Path) -> None:
    done = inside("quantise", str(example_model), *args)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_a_model_without_tokenizer_is_refused(example_model: Path, tmp_path: Path) -> None:
    done = inside("quantise", "zoo:gpt2", "--text", str(example_model.parent / "heldout.txt"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "tokenizer.json" in done.stderr
    other = tmp_path / "a.txt"
    other.write_bytes(b"\xff\xfe\xff")
    done = inside("quantise", str(example_model), "--text", str(other))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
