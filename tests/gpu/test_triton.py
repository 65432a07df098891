"""The emitted Triton kernels: run under Triton's interpreter beside onnxruntime, and compiled for sm_90.

Both need torch and triton; without them the tests that run or compile kernels skip. Kernels that ran under
the interpreter in a process cannot be compiled in it, so both kinds run in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mapper
from mapper.machine import parse
from mapper.schedule.store import load
from mapper.schedule.tables import Schedule
from mapper.zoo.families import config, tiny
from mapper.zoo.files import write
from mapper_gpu.triton_emit import STAGE, source

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama-op18.onnx"
needs_triton = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("triton")),
    reason="torch and triton are not installed (extra 'gpu')",
)
VERIFY = """
import json, sys
from pathlib import Path
from mapper.schedule.store import load
from mapper_gpu.triton_cli import verify
found = verify(load(sys.argv[1]), Path(sys.argv[1]), None, int(sys.argv[2]))
print(json.dumps([found.ok, found.tokens, found.max_rel_err]))
"""
COMPILE = """
import json, sys
from dataclasses import asdict
from mapper.schedule.store import load
from mapper_gpu.triton_emit import source
from mapper_gpu.triton_resources import resources
from mapper_gpu.triton_run import module
schedule, found = load(sys.argv[1]), {}
for phase in schedule.programs:
    kernels = module(schedule, phase, sys.argv[1])
    for _, launches in source(schedule, phase).blocks:
        for launch in launches:
            found[f"{phase}.{launch.kernel}"] = asdict(resources(getattr(kernels, launch.kernel), launch))
print(json.dumps(found))
"""


def told(script: str, *arguments: str, interpret: bool) -> Any:
    """What a script prints as JSON in its last line."""
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "targets"))
    # the interpreter's many small products only wait for each other's threads
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1",
           "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def compiled(folder: Path, model: Path | str = MODEL, **request: Any) -> Schedule:
    """A schedule in a folder."""
    mapper.compile(model, target="gpu", out=folder, **request)
    return load(folder)


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


@needs_triton
def test_kernels_of_the_example_equal_onnxruntime(tmp_path: Path) -> None:
    compiled(tmp_path / "s", prompt=4, context=32)
    ok, tokens, error = told(VERIFY, str(tmp_path / "s"), "1", interpret=True)
    assert ok and tokens == 1
    assert error < 1e-5


@needs_triton
@pytest.mark.parametrize("name, request_", [
    ("qwen3-0.6b", {"batch": 2, "prompt": 3, "context": 300}),  # head norms; a split cache
    ("gpt2", {"prompt": 5, "context": 40}),  # layer norms, biases, learned positions
])  # fmt: skip
def test_kernels_of_other_structures_equal_onnxruntime(
    name: str, request_: dict[str, int], tmp_path: Path
) -> None:
    write(tiny(config(name)), tmp_path / "m.onnx", "f32", 1)
    compiled(tmp_path / "s", tmp_path / "m.onnx", **request_)
    ok, _, error = told(VERIFY, str(tmp_path / "s"), "1", interpret=True)
    assert ok and error < 1e-5


@needs_triton
def test_changed_source_is_refused(tmp_path: Path) -> None:
    compiled(tmp_path / "s", prompt=4, context=32)
    file = tmp_path / "s" / "triton_prefill.py"
    file.write_text(file.read_text().replace("tl.exp", "tl.sqrt"))
    with pytest.raises(AssertionError, match="is not what the schedule's tables give"):
        told(VERIFY, str(tmp_path / "s"), "1", interpret=True)


@needs_triton
def test_kernels_compile_for_sm90_within_the_plan(tmp_path: Path) -> None:
    """Llama-3.1-8B in bf16: no spills, registers and shared memory of an SM suffice, prefill takes wgmma."""
    schedule = compiled(
        tmp_path / "s", "zoo:llama-3.1-8b", prompt=512, context=2048, weights="bf16", phase="both"
    )
    found = told(COMPILE, str(tmp_path / "s"), interpret=False)
    machine = parse(schedule.machine_toml)
    for name, r in found.items():
        assert r["stack"] == 0, name
        assert r["registers"] * 4 * r["threads"] <= machine.value("sm.registers"), name
        assert r["shared"] <= machine.value("sm.shared"), name
    products = {n: r["product"] for n, r in found.items()}
    assert products["prefill.k2_linear_rope"] == "wgmma"
    assert all(p for n, p in products.items() if "gate" in n or ("down_add" in n and "merge" not in n))


@needs_triton
def test_the_benchmark_agrees_with_pytorch_at_a_small_shape() -> None:
    script = "import sys; from benchmarks.gpu import main; sys.exit(main(sys.argv[1:]))"
    (point,) = told(script, "--tiny", "--batch", "2", "--context", "96", "--json", interpret=True)
    assert point["difference"] < 1e-5


@needs_triton
def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: no NVIDIA GPU is here, so nothing is measured\n"
