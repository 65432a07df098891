"""The task tables execute in time order on poisoned memories and equal onnxruntime: chips, styles, splits,
formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper import driver
from mapper.errors import MapperError
from mapper.runtime.oracle import oracle
from mapper.zoo import families, files
from mapper_gpu import product
from tests.gpu.common import EXAMPLE, built, h100


@pytest.mark.parametrize("chips", [1, 2, 8])  # the example has four key/value heads
@pytest.mark.parametrize("megakernel", [False, True])
def test_decode_and_prefill_equal_onnxruntime(chips: int, megakernel: bool, tmp_path: Path) -> None:
    done = built(machine=h100(megakernel), chips=chips, prompt=5, context=16, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=8)
    assert found.ok, found.failures
    assert found.tokens == 8 and found.max_rel_err < 1e-4
    assert done.schedule.chips == chips
    assert done.schedule.plan["style"] == ("megakernel" if megakernel else "graph")


def test_split_k_and_split_cache_merge_exactly(tmp_path: Path) -> None:
    done = built(prompt=48, context=2048, out=tmp_path / "s")
    kinds = {done.schedule.opcodes[o] for p in done.schedule.programs.values() for b in p.blocks
             for o in b.steps.column("opcode").tolist()}  # fmt: skip
    assert {"attention_merge", "product"} <= kinds
    found = driver.verify(tmp_path / "s", tokens=3)
    assert found.ok, found.failures


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("megakernel", [False, True])
def test_split_k(chips: int, megakernel: bool, tmp_path: Path) -> None:
    """SMs that keep few bytes in flight make it worth cutting K, so that more of them stream."""
    machine = h100(megakernel, sm__in_flight=512)
    done = built(machine=machine, chips=chips, prompt=4, context=64, out=tmp_path / "s")
    tiles = [
        k["tile"]
        for r in done.schedule.plan["blocks"].values()
        for b in r
        for k in b["kernels"]
        if "tile" in k
    ]
    assert sum(t["splits"] > 1 for t in tiles) > 3
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures


@pytest.mark.parametrize("batch", [2, 3])
def test_several_sequences(batch: int, tmp_path: Path) -> None:
    built(batch=batch, prompt=40, context=64, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures
    assert found.tokens == 4 * batch


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_narrow_weights_stay_within_their_formats_error(form: str, tmp_path: Path) -> None:
    built(weights=form, prompt=4, context=16, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=6)
    assert found.ok, found.failures
    assert found.max_rel_err > 1e-6, "nothing was narrow"


def test_a_byte_that_nothing_wrote_is_a_fault() -> None:
    from mapper.runtime.execute import Session
    from mapper.runtime.inputs import interface, states
    from mapper_gpu import BACKEND

    schedule = built(prompt=4, context=8).schedule
    session = Session(schedule, BACKEND.semantics(), EXAMPLE.parent)
    names = [p.name for p in schedule.ports if p.kind == "state"]
    assert names
    memory = session._memories
    port = next(p for p in schedule.ports if p.name == names[0])
    row = schedule.buffers.slice(port.buffers[0], 1)
    low = int(row.column("offset")[0].as_py())
    memory.written(0).remove(low, low + 4)
    beside = oracle(EXAMPLE, interface(schedule.roles), states(schedule))
    assert beside.name
    with pytest.raises(MapperError, match="never written"):
        session.run("decode", {"input_ids": np.zeros((1, 1), np.int64), "past_length": np.array(3)})


def test_what_is_not_built_is_refused() -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"weights": "int3"}, "no weight format"),
        ({"chips": 3}, "do not divide"),
    )
    for options, words in refused:
        with pytest.raises(MapperError, match=words):
            driver.compile(EXAMPLE, "gpu", prompt=4, context=8, **options)


def test_chips_auto_takes_the_fewest_that_hold_the_model() -> None:
    small = h100(memory__hbm__capacity=12e6)
    done = built(machine=small, chips=None, prompt=4, context=8)
    assert done.schedule.chips == 2
    with pytest.raises(MapperError, match="bytes of each of 1 chips"):
        driver.compile(EXAMPLE, "gpu", machine=small, prompt=4, context=8)


def test_split_tiles_of_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of several row tiles, K split, 200 columns of logits: a merge reads its own tile alone."""
    monkeypatch.setattr(product, "SPLITS", (2,))
    product.choose.cache_clear()
    config = replace(families.shortened(families.tiny(families.config("llama-3.1-8b")), 1), vocab=200)
    files.write(config, tmp_path / "m.onnx", "f32", seed=1)
    done = built(tmp_path / "m.onnx", prompt=300, context=304, phase="prefill", out=tmp_path / "s")
    product.choose.cache_clear()
    tiles = [k["tile"] for b in done.schedule.plan["blocks"]["prefill"] for k in b["kernels"] if "tile" in k]
    assert any(t["splits"] == 2 and t["rows"] > t["m"] for t in tiles)
    found = driver.verify(tmp_path / "s")
    assert found.ok, found.failures
