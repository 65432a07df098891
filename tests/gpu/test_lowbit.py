"""Low-bit weights on the GPU: decoded by tiles, equal to onnxruntime on the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper import driver
from mapper.errors import MapperError
from mapper.lowbit import FORMATS, Scheme, quantise
from mapper.lowbit import dequantise as from_parts
from mapper.runtime.mutation import MutationTest, decoder_case
from mapper.schedule.tables import Schedule
from mapper.zoo import families, files
from mapper_gpu import BACKEND, lowbit_ops
from tests.gpu.common import EXAMPLE, built, h100

LOW = {"int8": (8, 2, 0, 0), "int8row": (8, 0, 0, 4), "int4": (4, 2, 4, 0), "f8e4m3": (8, 0, 0, 4),
       "mxfp4": (4, 1, 0, 0)}  # fmt: skip
"""Format -> bits of a code, bytes of scale and bits of zero point per block of 32, bytes of scale per
row."""
# what the contract test over all targets leaves out: prompts, two chips
PLACES = [(name, chips) for name in ("int8", "int4", "f8e4m3") for chips in (1, 2)]


def matrices(schedule: Schedule) -> int:
    """Bytes of all buffers that hold a part of a low-bit weight."""
    parts = (".values", ".scales", ".zeros")
    size = schedule.buffers.column("bytes").to_numpy()
    return sum(int(size[b]) for p in schedule.ports if p.name.endswith(parts) for b in p.buffers)


@pytest.mark.parametrize(("name", "chips"), [*PLACES, ("mxfp4", 2), ("int8row", 2)])
def test_prefill_and_decode_equal_onnxruntime(name: str, chips: int, tmp_path: Path) -> None:
    built(weights=name, chips=chips, prompt=5, context=12, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures
    record = found.record()
    assert record["oracle"].endswith(f" on {name} weights")
    assert record["tokens"] == 4
    assert record["against_original"]["relative_rms"] > 4 * found.max_rel_err


@pytest.mark.parametrize("name", ["int4", "f8e4m3"])
@pytest.mark.parametrize("megakernel", [False, True])
def test_k_is_cut_between_blocks(name: str, megakernel: bool, tmp_path: Path) -> None:
    machine = h100(megakernel, sm__in_flight=512)
    done = built(machine=machine, weights=name, chips=2, prompt=4, context=16, out=tmp_path / "s")
    tiles = [k for r in done.schedule.plan["blocks"].values() for b in r for k in b["kernels"] if "tile" in k]
    cut = [k for k in tiles if k["tile"]["splits"] > 1]
    assert len(cut) > 1
    scheme = FORMATS[name]
    assert isinstance(scheme, Scheme)
    assert all(w["k"] // k["tile"]["splits"] % max(1, scheme.block) == 0 for k in cut for w in k["weights"])
    found = driver.verify(tmp_path / "s", tokens=3)
    assert found.ok, found.failures


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("chips", [1, 2])
def test_weights_take_the_bytes_of_their_format(name: str, chips: int) -> None:
    """Codes, scales and zero points, counted from the model's sizes. A chip has some rows of a matrix, or
    some of K of all: then a scale per row is on each, and a row's zero points fill whole bytes on each."""
    d, kv, ffn, vocab, layers = 256, 128, 704, 2048, 4
    by_rows = [(d, d), (kv, d), (kv, d), (ffn, d), (ffn, d)] * layers + [(vocab, d)]
    by_k = [(d, d), (d, ffn)] * layers
    bits, scale, zero, per_row = LOW[name]

    def row(k: int) -> int:
        return k * bits // 8 + k // 32 * scale + -(-(k // 32) * zero // 8) + per_row

    expected = sum(n * row(k) for n, k in by_rows) + chips * sum(n * row(k // chips) for n, k in by_k)
    assert matrices(built(weights=name, chips=chips, prompt=4, context=8).schedule) == expected


def test_a_step_reads_fewer_bytes() -> None:
    model = {"phase": "decode", "context": 2048}
    steps = {f: built("zoo:llama-3.1-8b", weights=f, **model) for f in ("bf16", "int8", "int4", "f8e4m3")}
    moved = {
        f: sum(b.repeat * int(b.steps.column("bytes").sum()) for b in s.schedule.programs["decode"].blocks)
        for f, s in steps.items()
    }
    cache = 2 * 2 * 32 * 1024 * 2048
    elements = (moved["bf16"] - cache) / 2
    assert moved["int8"] == pytest.approx(elements * (1 + 2 / 32) + cache, rel=0.01)
    assert moved["int4"] == pytest.approx(elements * (0.5 + 2 / 32 + 1 / 64) + cache, rel=0.01)
    assert moved["f8e4m3"] == pytest.approx(elements + cache, rel=0.01)
    seconds = {f: s.schedule.programs["decode"].cycles for f, s in steps.items()}
    assert seconds["int4"] < seconds["f8e4m3"] < seconds["int8"] < seconds["bf16"]
    assert steps["int4"].schedule.plan["arithmetic"]["matmul"] == "bfloat16"


def test_explain_says_what_products_are_computed_in(tmp_path: Path) -> None:
    done = built(weights="fp8", phase="decode", context=8)
    machine = h100()
    found = BACKEND.explain(done.schedule, machine)["decode"]
    table = next(f for f in found if "stored" in f.columns)
    assert "activations are not quantised" in table.title
    assert {row[0] for row in table.rows} == {"f8e4m3"}
    assert all("f16" in str(row) for row in table.rows)


def test_chips_that_would_cut_a_block_are_refused() -> None:
    with pytest.raises(MapperError, match="4 chips would cut the blocks of 32 along its 704 columns"):
        driver.compile(EXAMPLE, "gpu", chips=4, weights="int4", phase="decode", context=8)


@pytest.mark.parametrize("name", ["int4", "f8e4m3"])
def test_mutants_die(name: str) -> None:
    machine = h100(sm__in_flight=512)
    schedule = built(machine=machine, chips=2, prompt=2, context=4, weights=name).schedule
    case = decoder_case(BACKEND.semantics(), 2)
    report = MutationTest(schedule, case, BACKEND.checks(), BACKEND.mutations(), seed=5).run(34)
    print(report.table())
    assert report.kill_rate() >= 0.98, report.survivors
    assert report.equivalent_share <= 0.05
    assert {"other_scales", "other_decoding"} | ({"cut_block"} if name == "int4" else set()) <= {
        o.kind for o in report.outcomes
    }


def dense_latent(folder: Path) -> Path:
    """DeepSeek-V3's layers before its experts, at toy widths: rows of three matrices are taken apart."""
    path = folder / "latent.onnx"
    files.write(families.shortened(families.tiny(families.config("deepseek-v3")), 3), path, "f32", seed=1)
    return path


@pytest.mark.parametrize(("name", "chips"), [("int4", 1), ("int8", 1), ("f8e4m3", 2), ("int8row", 2)])
def test_latent_attention_is_held_dequantised(name: str, chips: int, tmp_path: Path) -> None:
    """Its up-projection takes two bytes an element, and all other products' weights those of their format."""
    done = built(dense_latent(tmp_path), weights=name, chips=chips, prompt=5, context=12, out=tmp_path / "s")
    found = driver.verify(tmp_path / "s", tokens=4)
    assert found.ok, found.failures
    weights = [w for b in done.schedule.plan["blocks"]["decode"] for k in b["kernels"] for w in k["weights"]
               if k["kind"] == "product"]  # fmt: skip
    latent = [w for w in weights if "latent" in w["name"]]
    assert len(latent) == 2 and not any("stored" in w for w in latent)
    assert all("stored" in w for w in weights if w not in latent)
    assert sum(" of " in w["name"] for w in weights if "stored" in w) == 2


def test_chips_auto_counts_what_is_held(tmp_path: Path) -> None:
    """Where the memory is a little smaller than what two chips hold each, four are chosen. The real widths,
    without weights."""
    path = tmp_path / "wide.onnx"
    files.write(families.shortened(families.config("deepseek-v3"), 3), path, "bf16", seed=None)
    options: dict[str, Any] = {"weights": "f8e4m3", "phase": "decode", "context": 64}
    buffers = built(path, chips=2, **options).schedule.buffers
    memory, size = (buffers.column(k).to_numpy() for k in ("memory", "bytes"))
    need = int(size[memory == 0].sum())
    for room, chips in ((1.01, 2), (0.995, 4)):
        machine = h100(memory__hbm__capacity=need * room, memory__hbm__reserved=0.0)
        assert built(path, machine=machine, chips=None, **options).schedule.chips == chips


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 32, 43])
def test_packing_is_undone(bits: int, columns: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, columns), np.uint8)
    raw = lowbit_ops.packed(codes, bits)
    assert raw.shape == (3, -(-columns * bits // 8))
    np.testing.assert_array_equal(lowbit_ops.unpacked(raw, bits, columns), codes)


@pytest.mark.parametrize("name", LOW)
def test_the_executor_decodes_as_the_formats_say(name: str) -> None:
    """Apart from `mapper.lowbit`, bit for bit the same values in float32."""
    scheme = FORMATS[name]
    assert isinstance(scheme, Scheme)
    weight = np.random.default_rng(3).standard_normal((6, 96)).astype(np.float32)
    parts = quantise(scheme, weight)
    blocks = 3 if scheme.block else 1
    r: dict[str, Any] = {"v": lowbit_ops.unpacked(parts["values"], scheme.bits, 96), "s": parts["scales"]}
    if "zeros" in parts:
        r["z"] = lowbit_ops.unpacked(parts["zeros"], 4, blocks)
    scale = {"uint8": "u8", "float16": "f16", "float32": "f32"}[parts["scales"].dtype.name]
    task: Any = type("At", (), {"at": (0, 1, 0, 6, 0, 96)})()
    lowbit_ops.dequantise(task, r, "w", "v", "s", "z" if "z" in r else None, scheme.kind, scheme.bits,
                          scheme.block, scale, "f32")  # fmt: skip
    np.testing.assert_array_equal(r["w"], from_parts(scheme, weight.shape, **parts))


def test_every_code_of_the_small_floats() -> None:
    import ml_dtypes

    def known(dtype: Any, bits: int) -> npt.NDArray[Any]:
        return np.asarray(np.arange(1 << bits, dtype=np.uint8).view(dtype), np.float32)

    np.testing.assert_array_equal(lowbit_ops.floats("e4m3"), known(ml_dtypes.float8_e4m3fn, 8))
    np.testing.assert_array_equal(lowbit_ops.floats("e2m1"), known(ml_dtypes.float4_e2m1fn, 4))
