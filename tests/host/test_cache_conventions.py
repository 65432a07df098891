"""Every convention of the key-value cache is compiled, verified beside onnxruntime, and executed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mapper import driver
from mapper.errors import UnsupportedModelError, UsageError
from tests.frontend import cached, decoders
from tests.frontend.tiny import oracle, saved, worst

CASES = {
    "axes in another order": cached.growing("LBHD"),
    "keys turned": cached.growing("BHDL"),
    "heads in the batch": cached.merged_heads,
    "heads in the rows": cached.flat_rows(1),
    "stack of a layer": cached.layer_stack,
    "stack of all": cached.full_stack(False),
    "stacks of keys and of values": cached.full_stack(True),
    "half precision": cached.half,
    "beams": cached.beams,
    "static": cached.static("ScatterND"),
    "buffer": cached.buffered("MultiHeadAttention"),
    "lengths": cached.grouped("inputs"),
}


def agrees(model: onnx.ModelProto, case: decoders.Case, folder: Path) -> None:
    """Compiled for the host, a model decodes what onnxruntime does and continues given caches as it does."""
    path, out = saved(model, folder), folder / "out"
    driver.compile(path, "host", prompt=4, context=10, out=out)
    assert driver.verify(out, tokens=3).ok
    feeds = decoders.inputs(case, new=2, past=5, batch=1)
    if "beams" in feeds:
        feeds["beams"][:] = 0
    want = oracle(model, feeds)
    tolerance = 1e-3 if any(n.startswith("half") for n in want) else 1e-5
    assert worst(driver.execute(out, feeds), want) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_convention_is_served(name: str, tmp_path: Path) -> None:
    case = decoders.decoder(CASES[name])
    agrees(case.model(), case, tmp_path)


def test_packed_attention_is_served(tmp_path: Path) -> None:
    case = decoders.packed()
    agrees(case.model(), case, tmp_path)


def test_a_counter_is_served(tmp_path: Path) -> None:
    case = decoders.decoder(cached.counter, positions=False)
    agrees(case.model(), case, tmp_path)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_scattered_caches_are_served(mode: str, tmp_path: Path) -> None:
    case = decoders.decoder(cached.tensor_scatter(mode, mode == "linear"), opset=24)
    agrees(case.model(), case, tmp_path)


def test_a_merged_decoder_is_served_from_both_graphs(tmp_path: Path) -> None:
    agrees(*cached.merged(), tmp_path)


def test_a_context_longer_than_the_caches_is_a_usage_error(tmp_path: Path) -> None:
    path = saved(decoders.decoder(cached.static("ScatterElements")).model(), tmp_path)
    with pytest.raises(UsageError, match=f"caches have {decoders.ROOM} rows"):
        driver.compile(path, "host", prompt=4, context=decoders.ROOM + 1)


def test_rolling_caches_are_not_served(tmp_path: Path) -> None:
    path = saved(decoders.decoder(cached.rolling).model(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="its past is not an input of the graph"):
        driver.compile(path, "host", prompt=4, context=8)


def test_cross_attention_is_not_served(tmp_path: Path) -> None:
    path = saved(decoders.decoder(cached.crossed(False)).model(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="attention"):
        driver.compile(path, "host", prompt=4, context=8)
