"""What the emitted kernels of a model take of an SM, told by Triton's assembler: no GPU is needed.

    python -m benchmarks.gpu_resources               # decode at batch 1 and 32: sm_80, sm_90, sm_100
    python -m benchmarks.gpu_resources --machine h100-sxm --phase prefill --prompt 512 --json
    python -m benchmarks.gpu_resources --model zoo:gpt-oss-20b --weights mxfp4 --machine h100-sxm

One line per kernel: registers per thread, shared memory per block, spilled bytes per thread and how many of
the loads and stores of spills are inside of loops, the tensor core's instruction. Exits with 1 where a kernel
takes more than an SM of the machine has, or spills inside of a loop."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mapper
from mapper.errors import MapperError
from mapper.machine import parse
from mapper.schedule.store import load

MODEL = "zoo:llama-3.1-8b"
CAPABILITIES = {"a100-80g-sxm": 80, "h100-sxm": 90, "b200": 100}
"""Machine file -> compute capability that its kernels are compiled for."""


def rows(machine: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The resources of every kernel of a schedule's directory, in order."""
    from mapper_gpu.triton_emit import source
    from mapper_gpu.triton_resources import resources
    from mapper_gpu.triton_run import module

    schedule = load(folder)
    limits = parse(schedule.machine_toml)
    for phase in schedule.programs:
        kernels = module(schedule, phase, folder)
        for _, launches in source(schedule, phase).blocks:
            for launch in launches:
                found = resources(getattr(kernels, launch.kernel), launch, CAPABILITIES[machine])
                fits = found.shared <= limits.value(
                    "sm.shared"
                ) and found.registers * found.threads * 4 <= limits.value("sm.registers")
                yield {"machine": machine, "phase": phase, "kernel": launch.kernel, "grid": launch.grid,
                       "pipeline": launch.stages, **asdict(found), "fits": fits}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A kernel as one line."""
    return (
        f"{row['machine']:<13} batch {row['batch']:<3} {row['phase']:<8} {row['kernel']:<36}"
        f"{row['grid']:>6} x {row['threads']:<4}{row['registers']:>4} registers{row['shared']:>8} B shared"
        f"{row['stack']:>5} B spilled, {row['looped']} in loops  {row['product']:<8}"
        f"{'' if row['fits'] else 'DOES NOT FIT'}"
    )


def points(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of every machine and batch asked for."""
    for machine in asked.machine:
        for batch in asked.batch:
            with tempfile.TemporaryDirectory() as folder:
                mapper.compile(
                    asked.model, target="gpu", machine=machine, batch=batch, prompt=asked.prompt,
                    context=asked.context, weights=asked.weights, phase=asked.phase, out=folder,
                )  # fmt: skip
                for row in rows(machine, Path(folder)):
                    yield {"batch": batch, **row}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all kernels fit and no loop spills, 1 where not, 2 on bad input."""
    parser = argparse.ArgumentParser(
        description="Registers, shared memory and spills of the emitted kernels."
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--machine", nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--phase", choices=("decode", "prefill", "both"), default="decode")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
        print("error: this needs torch and triton: pip install 'inference-mapper[gpu]'", file=sys.stderr)
        return 2
    found: list[dict[str, Any]] = []
    try:
        for row in points(asked):
            found.append(row)
            if not asked.json:
                print(line(row), flush=True)
    except MapperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(found))
    return 0 if all(row["fits"] and not row["looped"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
