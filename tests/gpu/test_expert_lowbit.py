"""Experts in low bits: each expert's rows of codes, scales and zero points out of stacks, decoded by the tile
that works through its block."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper import driver
from mapper.errors import MapperError
from mapper.lowbit import FORMATS, Scheme, quantise
from mapper.lowbit import dequantise as from_parts
from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.zoo import families, files
from mapper_gpu import BACKEND, lowbit_ops
from tests.gpu.common import built, h100

MIXTURES = ("mixtral-8x7b", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v3")
"""Gate and up in halves of a stack; in alternating rows, with biases; several experts; beside shared ones."""
INNER = 64
"""Inner columns of an expert: two chips have a whole block of 32 each."""


def toy(name: str, folder: Path, inner: int = INNER) -> Path:
    made = families.shortened(families.tiny(families.config(name)), 4 if name == "deepseek-v3" else 2)
    layers = tuple(
        replace(x, experts=replace(x.experts, inner=inner)) if x.experts is not None else x
        for x in made.layers
    )
    path = folder / f"{name}.onnx"
    files.write(replace(made, layers=layers), path, "f32", seed=2)
    return path


def stacks(done: driver.Compiled) -> dict[str, int]:
    """Bytes on one chip of each stack of a part, by the part's name."""
    size = done.schedule.buffers.column("bytes").to_numpy()
    found: dict[str, int] = {}
    for port in done.schedule.ports:
        if port.kind == "weight" and port.layout["kind"] == "stack":
            part = port.name.rsplit(".", 1)[1]
            found[part] = found.get(part, 0) + int(size[port.buffers[0]])
    return found


@pytest.mark.parametrize("form", ["int8", "int4", "f8e4m3", "mxfp4", "int8row"])
@pytest.mark.parametrize("name", MIXTURES)
def test_prefill_and_decode_equal_onnxruntime(name: str, form: str, tmp_path: Path) -> None:
    done = built(toy(name, tmp_path), weights=form, prompt=5, context=12, out=tmp_path / "s")
    assert set(stacks(done)) == {"values", "scales"} | ({"zeros"} if form == "int4" else set())
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures
    record = found.record()
    assert record["oracle"].endswith(f" on {form} weights")
    rounding = found.max_rel_err if not found.other_choices else 0  # what another expert does is no rounding
    assert record["against_original"]["relative_rms"] > 2 * rounding
    assert all(p.ratio >= 1 for p in done.result.phases.values())


@pytest.mark.parametrize("megakernel", [False, True])
@pytest.mark.parametrize("form", ["int4", "f8e4m3"])
@pytest.mark.parametrize("name", MIXTURES[:3])
def test_two_chips_share_every_expert(name: str, form: str, megakernel: bool, tmp_path: Path) -> None:
    """Inner columns are cut between blocks; zero points of 4 bits are packed again for each chip."""
    model = toy(name, tmp_path)
    built(model, weights=form, chips=2, machine=h100(megakernel), prompt=5, context=12, batch=2,
          out=tmp_path / "s")  # fmt: skip
    found = driver.verify(tmp_path / "s", tokens=3)
    assert found.ok, found.failures


@pytest.mark.parametrize("form", ["int8", "int4", "f8e4m3", "mxfp4"])
@pytest.mark.parametrize("chips", [1, 2])
def test_stacks_take_the_bytes_of_their_format(form: str, chips: int, tmp_path: Path) -> None:
    """Mixtral's toy: 8 experts of 48 x 64 in each of two layers; counted from the format alone."""
    hidden, experts, layers = 48, 8, 2
    scheme = FORMATS[form]
    assert isinstance(scheme, Scheme)
    inner = INNER // chips
    expected = 0
    # gate and up are rows of K = hidden, of which 48 are padded to whole blocks; down has K = inner
    for rows, k in ((2 * inner, hidden), (hidden, inner)):
        blocks = math.ceil(k / scheme.block) if scheme.block else 1
        scale = {"int8": 2, "int4": 2, "f8e4m3": 4, "mxfp4": 1}[form]
        zeros = math.ceil(blocks / 2) if form == "int4" else 0
        expected += layers * experts * rows * (k * scheme.bits // 8 + blocks * scale + zeros)
    done = built(toy("mixtral-8x7b", tmp_path), weights=form, chips=chips, prompt=4, context=8)
    assert sum(stacks(done).values()) == expected


def test_a_step_reads_fewer_bytes_and_works_more() -> None:
    model = {"phase": "decode", "context": 64, "chips": 2}
    steps = {f: built("zoo:mixtral-8x7b", weights=f, **model) for f in ("bf16", "f8e4m3", "int4")}
    kernels = {
        f: [k for b in s.schedule.plan["blocks"]["decode"] for k in b["kernels"] if "experts" in k]
        for f, s in steps.items()
    }
    for number, whole in enumerate(kernels["bf16"]):
        coded = kernels["int4"][number]
        assert coded["experts"]["element"] == pytest.approx(0.5 + 2.5 / 32)
        assert whole["experts"]["element"] == 2
    cycles = {f: s.schedule.programs["decode"].cycles for f, s in steps.items()}
    assert cycles["int4"] < cycles["f8e4m3"] < cycles["bf16"]


def test_chips_that_would_cut_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MapperError, match="2 chips would cut the blocks of 32 along its 24 columns"):
        driver.compile(toy("mixtral-8x7b", tmp_path, 24), "gpu", chips=2, weights="int4", prompt=4, context=8)


@pytest.mark.parametrize("form", ["int4", "f8e4m3"])
@pytest.mark.parametrize("name", ["gpt-oss-20b", "qwen3-30b-a3b"])
def test_mutants_die(name: str, form: str, tmp_path: Path) -> None:
    schedule = built(toy(name, tmp_path), chips=2, prompt=6, context=10, weights=form).schedule
    case = decoder_case(BACKEND.semantics(), 4)
    report = MutationTest(schedule, case, BACKEND.checks(), BACKEND.mutations(), seed=7).run(34)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert "other_decoding" in {o.kind for o in report.outcomes}


@pytest.mark.parametrize("form", ["int8", "int4", "f8e4m3", "mxfp4"])
def test_the_executor_decodes_one_expert_of_a_stack(form: str) -> None:
    """Against `mapper.lowbit`, which the executor does not use, bit for bit in float32."""
    scheme = FORMATS[form]
    assert isinstance(scheme, Scheme)
    weight = np.random.default_rng(3).standard_normal((3, 6, 96)).astype(np.float32)
    parts = quantise(scheme, weight)
    whole = from_parts(scheme, weight.shape, **parts)
    blocks = 3 if scheme.block else 1
    codes = {"values": (scheme.bits, 96), "zeros": (4, blocks)}

    class Part:
        def __init__(self, name: str) -> None:
            self.name, self.columns = name, 6

        def read(self, task: Any, expert: int) -> Any:
            one = parts[self.name][expert]
            return lowbit_ops.unpacked(one, *codes[self.name]) if self.name in codes else one

    scale = {"uint8": "u8", "float16": "f16", "float32": "f32"}[parts["scales"].dtype.name]
    task: Any = type("At", (), {"at": (0, 1, 0, 6, 0, 96)})()
    r: dict[str, Any] = {name: Part(name) for name in parts}
    zeros = "zeros" if "zeros" in parts else None
    lowbit_ops.dequantise(task, r, "w", "values", "scales", zeros, scheme.kind, scheme.bits, scheme.block,
                          scale, "f32")  # fmt: skip
    for expert in range(3):
        np.testing.assert_array_equal(r["w"].read(task, expert), whole[expert])
