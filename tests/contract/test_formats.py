"""Every target, in every weight format that it takes: legal, right, and wrong where a stored bit is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper import backend as targets
from mapper import driver
from mapper.errors import UsageError
from mapper.lowbit import FORMATS, Scheme, quantise
from mapper.schedule import values

Array = npt.NDArray[Any]
CONTEXT = 4
BOUND = {"f32": 1e-6, "f16": 2e-3, "bf16": 2e-2, "int8": 4e-2, "int8row": 6e-2, "f8e4m3": 0.2}
"""Most that logits may be off by, relative root mean square: some times the weights' own error. Formats of 4
bits: below 1, or nothing of the model would be left."""


def made(target: str, name: str, model: Path, folder: Path) -> Path:
    driver.compile(model, target, phase="decode", context=CONTEXT, weights=name, out=folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_refused_or_compiled_and_verified(
    target: str, name: str, example_model: Path, tmp_path: Path
) -> None:
    backend = targets.load(target)
    if name not in backend.formats:
        with pytest.raises(UsageError, match=f"{target} has no weight format '{name}'; it has") as caught:
            made(target, name, example_model, tmp_path / "out")
        assert all(known in str(caught.value) for known in backend.formats)
        assert "\n" not in str(caught.value)
        return
    folder = made(target, name, example_model, tmp_path / "out")
    assert driver.check(folder).ok
    found = driver.verify(folder, tokens=2)
    assert found.ok, found.failures
    assert found.oracle.startswith("onnxruntime")
    record = found.record()
    if name == backend.formats[0]:
        assert "against_original" not in record
        return
    assert found.oracle.endswith(f" on {name} weights")
    against = record["against_original"]
    assert against["tokens"] == 3
    assert 0 < against["relative_rms"] < BOUND.get(name, 1.0)
    assert against["max_relative"] > 0


def flipped(right: Callable[..., dict[str, Array]]) -> Callable[..., dict[str, Array]]:
    """`right`, with the highest bit of one stored element of each small matrix the other way round."""

    def wrong(scheme: Scheme, weight: Array, parts: Any) -> dict[str, Array]:
        found = right(scheme, weight, parts)
        if "values" in found and weight.shape == (128, 256):  # keys' and values' matrices
            found["values"] = found["values"].copy()
            found["values"][5, 7] ^= np.uint8(0x80)
        return found

    return wrong


@pytest.mark.parametrize("name", [n for n, how in FORMATS.items() if isinstance(how, Scheme)])
def test_a_flipped_bit_of_a_quantised_value_is_caught(
    target: str, name: str, example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in targets.load(target).formats:
        pytest.skip(f"{target} has no {name}")
    folder = made(target, name, example_model, tmp_path / "out")
    with monkeypatch.context() as broken:  # what the executor loads, not what the oracle is given
        broken.setattr(values, "quantise", flipped(quantise))
        found = driver.verify(folder, tokens=0)
    assert not found.ok
    assert "cache." in " ".join(found.failures)


def test_an_unknown_format_names_those_of_the_target(
    target: str, example_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        made(target, "int3", example_model, tmp_path / "out")
    known = ", ".join(targets.load(target).formats)
    assert str(caught.value) == f"{target} has no weight format 'int3'; it has {known}"
    assert not (tmp_path / "out").exists()


def test_the_default_is_the_targets_first_format(target: str, example_model: Path) -> None:
    """Asking for it changes nothing but what the schedule says was asked for."""
    first = targets.load(target).formats[0]
    asked, default = (
        driver.compile(example_model, target, phase="decode", context=CONTEXT, weights=name)
        for name in (first, None)
    )
    assert (asked.request.weights, default.request.weights) == (first, None)
    assert asked.ports == default.ports
    assert asked.buffers.equals(default.buffers)
    assert asked.ops.equals(default.ops)
    for one, other in zip(asked.programs["decode"].blocks, default.programs["decode"].blocks, strict=True):
        assert one.steps.table.equals(other.steps.table)
