"""The emitted Triton kernels: run under Triton's interpreter beside onnxruntime, and compiled for sm_90.

Both need torch and triton; without them the tests that run or compile kernels skip. Kernels that ran under
the interpreter in a process cannot be compiled in it, so both kinds run in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapper import driver
from mapper.errors import LoweringError, ScheduleError
from mapper.schedule.store import load
from mapper.zoo.families import config, shortened, tiny
from mapper.zoo.files import write
from mapper_gpu.triton_emit import STAGE, source
from mapper_gpu.triton_resources import looped_spills
from mapper_gpu.triton_run import module
from mapper_gpu.triton_scope import refuse_unknown
from tests.gpu.common import EXAMPLE as MODEL
from tests.gpu.common import MACHINES, ROOT
from tests.gpu.triton_common import COMPILE, VERIFY, compiled, kernels, needs_triton, told

BF16 = """
import json, sys
from mapper.schedule.store import load
from tests.gpu.bf16_kernels import outcomes
print(json.dumps([list(outcomes(load(folder), folder)) for folder in sys.argv[1:]]))
"""


def test_the_source_is_deterministic_and_names_no_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled(tmp_path / name, prompt=4, context=32)
    for file in ("triton_prefill.py", "triton_decode.py", "run.py"):
        first, second = ((tmp_path / n / file).read_text() for n in ("a", "b"))
        assert first == second
        assert str(tmp_path) not in first and str(ROOT) not in first


@pytest.mark.parametrize("batch, prompt", [(1, 16), (3, 70)])
def test_a_kernel_has_a_program_per_task(batch: int, prompt: int, tmp_path: Path) -> None:
    schedule = compiled(tmp_path / "s", batch=batch, prompt=prompt, context=128)
    for program in schedule.programs.values():
        blocks = source(schedule, program.phase).blocks
        for block, (repeat, launches) in zip(program.blocks, blocks, strict=True):
            offsets, flat = block.steps.args()
            stages = np.array([flat[o + STAGE] for o in offsets[:-1]])
            assert repeat == block.repeat
            assert [x.grid for x in launches] == np.bincount(stages).tolist()


def test_two_chips_get_no_source_and_are_told_so(tmp_path: Path) -> None:
    compiled(tmp_path / "s", chips=2, prompt=4, context=32)
    assert not list((tmp_path / "s").glob("*.py"))
    assert (
        "Triton source is for one chip, and this schedule has 2" in (tmp_path / "s/kernels.txt").read_text()
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The program of a product."""
    schedule = compiled(tmp_path_factory.mktemp("p") / "s", prompt=4, context=32, phase="decode")
    return next(p for p in schedule.plan["programs"]["decode"] if p["kind"] == "product")


@pytest.mark.parametrize("change, said", [
    (lambda p: p["code"].append(["shuffle", "r0"]), "'shuffle'"),
    (lambda p: p["code"][0].append(7), "'read' of 3 operands"),
    (lambda p: p["reads"][0].update(dtype="fp8"), "values stored as fp8"),
    (lambda p: p["reads"][0].update(bits=4), "an operand with 'bits'"),
    (lambda p: p["reads"][2].update(bits=4, dtype="u8"), "an operand with 'bits'"),
    (lambda p: p["reads"][0].update(stack=8), "an operand with 'stack'"),
    (lambda p: p["code"].append(["dequantise", "r9", "r0", "r1", None, "e4m3", 4, 0, "f32", "f16"]),
     "codes of 4 bits of e4m3"),
    (lambda p: p["code"].append(["dequantise", "r9", "r0", "r1", None, "int", 4, 24, "f16", "f16"]),
     "blocks of 24 columns"),
    (lambda p: p["code"].append(["round_blocks", "r9", "r0", 24]), "activations rounded in blocks of 24"),
    (lambda p: p["code"].append(["top_k", "r9", "r0", None, 2, "entmax", 0, 0, "max", 0.0, False, 0.0, 1.0]),
     "the scoring 'entmax'"),
    (lambda p: p["reads"][0].update(r="experts"), "an operand at rows 'experts'"),
    (lambda p: p["code"].append(["matmul", "r9", "r0", "r1", "int8"]), "products in int8"),
    (lambda p: p["code"].append(["gate", "r9", "swish2", "r0", "r1"]), "the activation 'swish2'"),
])  # fmt: skip
def test_what_the_templates_do_not_know_is_refused_by_name(
    change: Callable[[Any], object], said: str, program: Any
) -> None:
    refuse_unknown(program)
    changed = deepcopy(program)
    change(changed)
    with pytest.raises(LoweringError, match=f"no Triton source for {said}"):
        refuse_unknown(changed)


def test_compile_says_where_the_source_is(tmp_path: Path) -> None:
    done = driver.build(MODEL, "gpu", prompt=4, context=32, out=tmp_path / "s")
    (note,) = done.result.notes
    assert note.startswith(f"Triton source: triton_prefill.py, triton_decode.py in {tmp_path / 's'}; python ")
    assert str(tmp_path / "s" / "run.py") in note and (tmp_path / "s" / "run.py").exists()
    other = driver.build(MODEL, "gpu", prompt=4, context=32, chips=2, out=tmp_path / "t")
    assert other.result.notes == (
        "Triton source: none; Triton source is for one chip, and this schedule has 2",
    )


VERIFIED: dict[str, tuple[str, dict[str, Any]]] = {
    # name: model ("": the example), request
    "example": ("", {"prompt": 4, "context": 32}),
    # head norms; a cache in stretches, most of which are empty
    "head norms": ("qwen3-0.6b", {"batch": 2, "prompt": 3, "context": 1500}),
    # layer norms, biases, learned positions
    "layer norms": ("gpt2", {"prompt": 5, "context": 40}),
    # tiles of 64 tokens, on the long side of the tensor core's product
    "bf16 prefill": ("llama-3.1-8b", {"prompt": 70, "context": 96, "weights": "bf16"}),
}


def shortened_model(name: str, folder: Path) -> Path:
    """Two layers of a small model of a family, with random weights."""
    folder.mkdir()
    write(shortened(tiny(config(name)), 2), folder / "m.onnx", "f32", 1)
    return folder / "m.onnx"


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every case, and the plans: one process, as importing torch takes seconds."""
    folders = []
    for number, (name, request) in enumerate(VERIFIED.values()):
        folder = tmp_path_factory.mktemp("verified") / str(number)
        model = shortened_model(name, folder) if name else MODEL
        compiled(folder / "s", model, **request)
        folders.append(str(folder / "s"))
    return {**dict(zip(VERIFIED, told(VERIFY, *folders, interpret=True), strict=True)),
            "plans": [load(f).plan["blocks"] for f in folders]}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("case", VERIFIED)
def test_kernels_agree_with_onnxruntime(case: str, verified: dict[str, Any]) -> None:
    ok, tokens, error = verified[case]
    assert ok and tokens >= 1
    # float32 within its own rounding; bf16 as the judge of formats has it: four times NumPy's error
    assert error < (1e-5 if "bf16" not in case else 0.05)


@needs_triton
def test_the_cases_reach_what_they_are_there_for(verified: dict[str, Any]) -> None:
    example, heads, _, prefill = verified["plans"]
    assert set(example) == {"prefill", "decode"}
    assert any(k["split"]["splits"] > 1 for k in kernels(heads["decode"]) if "split" in k)
    assert {k["tile"]["m"] for k in kernels(prefill["prefill"]) if "tile" in k} == {64}
    assert {k["tile"]["engine"] for k in kernels(prefill["prefill"]) if "tile" in k} == {"bf16"}


def machine(path: Path, **constants: float) -> Path:
    """A machine file: the H100's, with some constants changed (dots as double underscores)."""
    text = (MACHINES / "h100-sxm.toml").read_text(encoding="utf-8")
    for key, value in constants.items():
        section, name = key.split("__")
        head, mark, rest = text.partition(f"\n[{section}]\n")
        line = rf"^{name} = {{ value = [^,]+, (unit = .*?)(?:, low = .*)? }}$"
        rest, found = re.subn(line, rf"{name} = {{ value = {value}, \1 }}", rest, count=1, flags=re.MULTILINE)
        assert found == 1
        text = head + mark + rest
    path.write_text(text, encoding="utf-8")
    return path


@needs_triton
def test_bf16_kernels_err_no_more_than_their_formats(tmp_path: Path) -> None:
    """Every value that a kernel stores is within a bound of float64 that comes from the roundoffs of bf16 and
    float32; beside weights and caches moved by one column it is not. Tensor core and vector products, with K
    whole and in parts, caches in stretches."""
    eager = {"signal__latency": 1e-9, "sm__in_flight": 512.0}  # which makes parts of K cheap, and many
    made = shortened(tiny(config("llama-3.1-8b")), 1)
    made = replace(made, hidden=96, heads=2, kv_heads=1, head_dim=32, vocab=40, context=1024,
                   layers=(replace(made.layers[0], inner=80),))  # fmt: skip
    write(made, tmp_path / "m.onnx", "bf16", None)
    cases = {
        "split": (machine(tmp_path / "a.toml", **eager), {"batch": 2, "context": 300}),
        "vector": (machine(tmp_path / "b.toml", **eager, tensor__bf16=1e9), {"batch": 1, "context": 40}),
        "many": (MACHINES / "h100-sxm.toml", {"batch": 16, "context": 40}),
    }
    for name, (file, request) in cases.items():
        compiled(tmp_path / name, tmp_path / "m.onnx", machine=file, phase="decode", **request)
    results = told(BF16, *(str(tmp_path / n) for n in cases), interpret=True)
    for name, found in zip(cases, results, strict=True):
        assert {x["engine"] for x in found} - {""} == {"vector" if name == "vector" else "bf16"}
        assert any(x["kernel"].endswith("_merge") for x in found) == (name != "many")
        assert len(found) >= 8
        for x in found:
            assert x["taken"] <= 1, (name, x)
            assert x["bound"] < 0.1, (name, x)
            assert x["moved"] > 10, (name, x)


def test_changed_source_is_refused(tmp_path: Path) -> None:
    schedule = compiled(tmp_path / "s", prompt=4, context=32)
    file = tmp_path / "s" / "triton_prefill.py"
    file.write_text(file.read_text().replace("tl.exp", "tl.sqrt"))
    with pytest.raises(ScheduleError, match="is not what the schedule's tables give"):
        module(schedule, "prefill", tmp_path / "s")


@needs_triton
def test_kernels_compile_for_sm90_within_the_plan(tmp_path: Path) -> None:
    """Llama-3.1-8B in bf16: registers and shared memory of an SM suffice, loops do not spill, nothing spills
    in decode; products of prefill are wgmma's."""
    compiled(tmp_path / "s", "zoo:llama-3.1-8b", prompt=512, context=2048, weights="bf16")
    (found,) = told(COMPILE, str(tmp_path / "s"), interpret=False, cache=tmp_path / "cache")
    prefill, decode = ([r for r in found if r["phase"] == phase] for phase in ("prefill", "decode"))
    assert prefill and decode
    for row in found:
        assert row["fits"] and row["looped"] == 0, row
    assert all(row["stack"] == 0 for row in decode)
    wide = [r for r in prefill if "linear" in r["kernel"] or "gate" in r["kernel"] or "down" in r["kernel"]]
    assert {r["product"] for r in wide} == {"wgmma"}
    assert all(r["product"] for r in decode if "gate" in r["kernel"] or "linear" in r["kernel"])


def test_spills_are_counted_inside_of_loops_alone() -> None:
    sass = """
        /*0000*/  STL [R1], R2 ;            /* 0x1 */
        /*0010*/  LDL R3, [R1+0x4] ;        /* 0x2 */
        /*0020*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/  @P0 BRA 0x10 ;
        /*0040*/  LDL.LU R5, [R1] ;
        /*0050*/  BRA 0x50 ;
    """
    assert looped_spills(sass) == 1


@needs_triton
def test_the_benchmark_runs_without_a_gpu() -> None:
    """All of its code but CUDA's graphs and events; the kernels err as PyTorch does."""
    script = "import sys; from benchmarks.gpu import main; sys.exit(main(sys.argv[1:]))"
    asked = ("--dry-run", "--batch", "2", "--context", "40", "--json")
    (point,) = told(script, *asked, interpret=True)
    assert 0 < point["error"] <= 4 * point["error_pytorch"] < 0.1
    assert list(point["step"]) == [
        "modelled", "mapper, CUDA graph", "PyTorch, CUDA graph", "torch.compile, CUDA graph",
    ]  # fmt: skip
    assert sum(k["count"] for k in point["kernels"]) == 12
    assert all(k["measured"] > 0 and k["modelled"] > 0 for k in point["kernels"])


def test_the_benchmark_says_what_is_missing() -> None:
    if needs_triton.args[0]:
        said = "error: this needs torch and triton: pip install 'inference-mapper[gpu]'\n"
    else:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        said = "error: no NVIDIA GPU is here, so nothing is measured; --dry-run goes without\n"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == said
