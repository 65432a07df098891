"""What a schedule's run.py does: verify the emitted kernels beside onnxruntime, and time them on a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mapper.errors import MapperError, UsageError
from mapper.runtime.verify import Verification
from mapper.schedule.tables import Schedule

if TYPE_CHECKING:
    from mapper_gpu.triton_timing import Timed


def main(folder: Path, arguments: Sequence[str] | None = None) -> int:
    """0 where the kernels agree, 1 where they do not, 2 on bad input."""
    parser = argparse.ArgumentParser(description="Run the emitted Triton kernels of a schedule.")
    parser.add_argument("--model", help="the ONNX file; default: where it was when the schedule was made")
    parser.add_argument("--tokens", type=int, default=2, help="greedy steps after the prompt")
    asked = parser.parse_args(arguments)
    try:
        return _report(folder, asked.model, asked.tokens)
    except MapperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(folder: Path, model: str | None, tokens: int) -> int:
    from mapper.schedule.store import load

    schedule = load(folder)
    found = verify(schedule, folder, model, tokens)
    print(
        f"{found.tokens} tokens, largest error {found.max_abs_err:.3g} ({found.max_rel_err:.3g} of the "
        f"largest logit): {'agrees' if found.ok else 'does NOT agree'} with {found.oracle}"
    )
    if device() == "cuda":
        times(schedule, folder)
    return 0 if found.ok else 1


def device() -> str:
    """ "cuda", or "cpu" with Triton's interpreter switched on. Raises UsageError without torch or triton."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        raise UsageError("this needs torch and triton: pip install 'inference-mapper[gpu]'")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def verify(schedule: Schedule, folder: Path, model: str | None, tokens: int) -> Verification:
    """As `mapper verify`, by the emitted kernels of the directory: every step beside onnxruntime."""
    from mapper import execution
    from mapper.runtime import verify as runtime
    from mapper.runtime.execute import Session
    from mapper.runtime.inputs import interface
    from mapper_gpu.triton_run import TritonSemantics

    path, names = execution.model_file(schedule, model), interface(schedule.roles)
    ids = runtime.seeded_prompt(schedule)
    steps = min(tokens, max(schedule.request.context - ids.shape[1], 0))
    session = Session(schedule, TritonSemantics(folder, device()), path.parent)
    with execution.oracles(schedule, path, names, {}) as (beside, judge, _):
        return runtime.verify(session, beside, judge, steps, ids, {})


def times(schedule: Schedule, folder: Path) -> None:
    """Print measured and modelled time of each kernel of the decode step at a full context, on weights and
    caches of zeros."""
    import torch

    from mapper_gpu.triton_run import Runner, image_bytes, module
    from mapper_gpu.triton_timing import Cuda, timed

    if "decode" not in schedule.programs:
        return
    memory = torch.zeros(image_bytes(schedule), dtype=torch.uint8, device="cuda")
    runner = Runner(schedule, "decode", module(schedule, "decode", folder), memory)
    (past,) = (p for p in schedule.ports if p.name == "past_length")
    runner.buffer(past.buffers[0], torch.int64).fill_(schedule.request.context - 1)
    print(HEADING)
    for t in timed(schedule, runner, Cuda()):
        print(line(t))


HEADING = f"{'kernel':<40} {'launches':>8} {'runs':>5} {'measured':>11} {'modelled':>11} {'HBM':>10}"


def line(t: Timed) -> str:
    """A kernel as one line: times in microseconds, HBM bytes over the measured time in GB/s."""
    return (
        f"{t.kernel:<40} {t.launches:>8} {t.count:>5} {t.measured * 1e6:>8.2f} us "
        f"{t.modelled * 1e6:>8.2f} us {t.bytes / t.measured / 1e9:>5.0f} GB/s"
    )
