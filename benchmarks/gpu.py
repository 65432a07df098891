"""The emitted decode step of Llama-3.1-8B on an NVIDIA GPU: measured beside modelled, and beside PyTorch.

    python -m benchmarks.gpu                        # batch 1 and 32, context 2048, random weights in bf16
    python -m benchmarks.gpu --batch 1 --json
    python -m benchmarks.gpu --dry-run              # a small shape, through the same code, without a GPU too

Per fused kernel: device time, one run with its launch gap, and the schedule's. Per step: the kernels in a
CUDA graph, the schedule, the same decoder in plain PyTorch in a CUDA graph, and that decoder through
`torch.compile` in a CUDA graph. The PyTorch decoder takes its weights from the schedule's memory image; its
logits are a second opinion on the kernels', and the errors of both are taken against float64. Without a GPU
the dry run takes Triton's interpreter: it holds the logits, and its times say nothing.

Exits with 1 where the kernels' error is more than four times PyTorch's, with 2 without a GPU. Needs about 30
GB of GPU memory for batch 1, 60 GB for 32."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mapper
from benchmarks.gpu_decoder import Image, Shape, decoder
from mapper.errors import MapperError, UsageError
from mapper.schedule.tables import Schedule

if TYPE_CHECKING:
    from mapper_gpu.triton_timing import Device

MODEL = "llama-3.1-8b"
SMALL = 2
"""Layers of the dry run."""
MACHINES = (
    ("GB200", "gb200"),
    ("GH200", "gh200"),
    ("B300", "b300"),
    ("B200", "b200"),
    ("H200", "h200-sxm"),
    ("H100", "h100-sxm"),
    ("A100-SXM4-40GB", "a100-40g-sxm"),
    ("A100", "a100-80g-sxm"),
)
"""Part of what a device calls itself, the first that fits, and the machine file that it is compiled for."""
OTHERWISE = "h100-sxm"
REPEATS = 20
"""Replays of which a time is the median."""
ALLOWED = 4.0
"""The kernels' error of logits against float64 may be so many times PyTorch's in the same format."""


def compiled(
    dry: bool, weights: str, batch: int, context: int, machine: str, folder: Path
) -> tuple[Schedule, Shape]:
    """The decode schedule, in `folder`/schedule, and the decoder's shape."""
    from mapper.zoo.families import config, shortened, tiny
    from mapper.zoo.files import write

    made = config(MODEL)
    if dry:
        made = replace(shortened(tiny(made), SMALL), context=max(context, 64))
    write(made, folder / "model.onnx", weights, None)
    schedule = mapper.compile(folder / "model.onnx", target="gpu", machine=machine, batch=batch,
                              context=context, phase="decode", out=folder / "schedule")  # fmt: skip
    rope = made.layers[0].rope
    assert rope is not None
    return schedule, Shape(len(made.layers), made.heads, made.kv_heads, made.head_dim, rope.width, made.eps)


def errors(
    image: Image, shape: Shape, run: Callable[[], object], step: Callable[[], Any]
) -> tuple[float, float]:
    """Largest error of the logits against float64, over their largest magnitude: the kernels', PyTorch's."""
    import torch

    with torch.no_grad():
        exact = decoder(image, shape, exact=True)()
        run()
        mine, other = (
            float((x - exact).abs().max() / exact.abs().max()) for x in (image.rows("logits"), step())
        )
    return mine, other


def torch_compiled(step: Callable[[], Any], dry: bool) -> Callable[[], Any]:
    """The step through torch.compile, as one graph; the dry run leaves out Inductor, which takes minutes."""
    import torch

    torch._dynamo.reset()
    # its own CUDA graphs are off: they copy inputs that a step changes, as it does its caches
    options: dict[str, Any] = {"backend": "aot_eager"} if dry else {"mode": "max-autotune-no-cudagraphs"}
    return torch.compile(step, fullgraph=True, **options)  # type: ignore[no-any-return]


def steps(
    device: Device, run: Callable[[], object], step: Callable[[], Any], dry: bool, with_compile: bool
) -> tuple[dict[str, float], str]:
    """Seconds of a step by way of running it, and why torch.compile gave none."""
    found = {"mapper, CUDA graph": device.seconds(device.capture(run), REPEATS),
             "PyTorch, CUDA graph": device.seconds(device.capture(step), REPEATS)}  # fmt: skip
    if not with_compile:
        return found, "left out"
    try:
        fast = device.capture(torch_compiled(step, dry))
    except Exception as error:  # whatever Inductor raises: the other figures stand without its
        return found, (str(error).strip().splitlines() or [type(error).__name__])[0]
    found["torch.compile, CUDA graph"] = device.seconds(fast, REPEATS)
    return found, ""


def measure(
    device: Device, place: str, machine: str, batch: int, asked: argparse.Namespace
) -> dict[str, Any]:
    """One point: the difference of the logits, and all times in seconds."""
    from mapper_gpu.triton_run import Runner, module
    from mapper_gpu.triton_timing import timed

    with tempfile.TemporaryDirectory() as name:
        schedule, shape = compiled(asked.dry_run, asked.weights, batch, asked.context, machine, Path(name))
        image = Image(schedule, place)
        kernels = module(schedule, "decode", Path(name) / "schedule")
        runner = Runner(schedule, "decode", kernels, image.memory)
        step = decoder(image, shape)
        found: dict[str, Any] = {
            "device": device.name, "machine": machine, "batch": batch, "context": asked.context,
            "weights": asked.weights, "dry_run": asked.dry_run,
        }  # fmt: skip
        found["error"], found["error_pytorch"] = errors(image, shape, runner.run, step)
        taken, missing = steps(device, runner.run, step, asked.dry_run, not asked.no_torch_compile)
        found["step"] = {"modelled": schedule.programs["decode"].cycles / schedule.clock_hz, **taken}
        if missing:
            found["torch.compile"] = missing
        found["kernels"] = [asdict(t) for t in timed(schedule, runner, device, REPEATS)]
    return found


def show(found: dict[str, Any]) -> None:
    """The tables of one point."""
    from mapper_gpu.triton_cli import HEADING, line
    from mapper_gpu.triton_timing import Timed

    print(
        f"\n{found['device']}, compiled for {found['machine']}: batch {found['batch']}, "
        f"context {found['context']}, {found['weights']}"
    )
    if found["dry_run"]:
        print("dry run: a small shape, whose times say nothing")
    print(f"error of the logits against float64, over the largest: {found['error']:.2e}; PyTorch's: "
          f"{found['error_pytorch']:.2e}")  # fmt: skip
    print(HEADING)
    for row in found["kernels"]:
        print(line(Timed(**row)))
    for name, seconds in found["step"].items():
        print(f"step, {name:<34} {seconds * 1e3:>9.3f} ms")
    if "torch.compile" in found:
        print(f"no torch.compile: {found['torch.compile']}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The emitted decode step on a GPU, beside PyTorch.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=2048, help="rows of cache that a step reads")
    parser.add_argument("--dry-run", action="store_true", help="a small shape; runs without a GPU too")
    parser.add_argument("--weights", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--machine", help="the machine file to compile for; default: by the device's name")
    parser.add_argument("--no-torch-compile", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def here(dry: bool) -> tuple[Device, str]:
    """The device, and torch's name for it. Raises UsageError without packages or a GPU."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        raise UsageError("this needs torch and triton: pip install 'inference-mapper[gpu]'")
    import torch

    from mapper_gpu.triton_timing import Cpu, Cuda

    if torch.cuda.is_available():
        return Cuda(), "cuda"
    if not dry:
        raise UsageError("no NVIDIA GPU is here, so nothing is measured; --dry-run goes without")
    os.environ["TRITON_INTERPRET"] = "1"
    return Cpu(), "cpu"


def points(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All points asked for. Raises MapperError."""
    device, place = here(asked.dry_run)
    import torch

    known = next((file for part, file in MACHINES if part in device.name), None)
    machine = asked.machine or known or OTHERWISE
    if known is None and asked.machine is None and place == "cuda":
        print(f"note: no machine file is for {device.name}; compiled for {machine}", file=sys.stderr)
    found = []
    for batch in asked.batch:
        try:
            found.append(measure(device, place, machine, batch, asked))
        except torch.OutOfMemoryError as error:
            raise UsageError(f"batch {batch} does not fit the GPU's memory: {_first(error)}") from error
        if not asked.json:
            show(found[-1])
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the logits are right, 1 where they are not, 2 without a GPU and on bad input."""
    asked = parsed(arguments)
    try:
        found = points(asked)
    except MapperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(found))
    return 0 if all(p["error"] <= ALLOWED * p["error_pytorch"] for p in found) else 1


if __name__ == "__main__":
    sys.exit(main())
