"""Decode steps of one model under several ways of sharing it out among chips, compiled and checked.

python -m benchmarks.gpu_degrees zoo:deepseek-v3 --machine b200 --batch 16 tp=16 tp=8,pp=2 tp=8,dp=2,ep=16
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer

from mapper import driver
from mapper.errors import MapperError
from mapper.schedule.tables import Schedule


def main(
    model: Annotated[str, typer.Argument(help="a model")],
    parallel: Annotated[list[str], typer.Argument(help="degrees, as tp=8,dp=2,ep=16")],
    machine: Annotated[str, typer.Option(help="a machine of target gpu")] = "h100-sxm",
    batch: Annotated[list[int] | None, typer.Option(help="sequences of all replicas")] = None,
    context: Annotated[int, typer.Option(min=1, help="rows of the cache, full")] = 2048,
    weights: Annotated[str | None, typer.Option(help="weight format")] = None,
) -> None:
    """A line per degrees and batch: a step in ms, tokens/s in all and per sequence, what the fullest chip
    holds. A pipeline's rate is that with a micro-batch of this size in each of its stages."""
    print(
        f"{'degrees':<24}{'batch':>6}{'ms':>9}{'tokens/s':>11}{'each':>8}{'GB/chip':>9}{'collectives':>13}{'s':>6}"
    )
    for size in batch or [1]:
        for degrees in parallel:
            begin = time.process_time()
            try:
                done = driver.build(
                    model, "gpu", machine=machine, batch=size, context=context, chips=None, weights=weights,
                    parallel=degrees, phase="decode",
                )  # fmt: skip
            except MapperError as e:
                print(f"{degrees:<24}{size:>6}  {e}")
                continue
            done.report.raise_first()
            schedule, spent = done.schedule, time.process_time() - begin
            step, slowest, linked = _times(schedule)
            held = np.bincount(
                schedule.buffers.column("memory").to_numpy(), schedule.buffers.column("bytes").to_numpy()
            ).max()
            print(
                f"{degrees:<24}{size:>6}{1e3 * step:>9.2f}{size / slowest:>11.1f}{1 / step:>8.1f}"
                f"{held / 1e9:>9.1f}{100 * linked / step:>12.0f}%{spent:>6.1f}"
            )


def _times(schedule: Schedule) -> tuple[float, float, float]:
    """Seconds of a step, of its slowest stage, and of its collectives' kernels."""
    blocks, records = schedule.programs["decode"].blocks, schedule.plan["blocks"]["decode"]
    begin: dict[int, int] = {}
    linked = 0.0
    for block, record in zip(blocks, records, strict=True):
        begin.setdefault(int(record.get("stage", 0)), block.start)
        linked += block.repeat * sum(k["seconds"] for k in record["kernels"] if k["kind"] == "collective")
    edges = [*begin.values(), schedule.programs["decode"].cycles]
    edges[0] = 0
    slowest = max(int(d) for d in np.diff(edges))
    return schedule.programs["decode"].cycles / schedule.clock_hz, slowest / schedule.clock_hz, linked


if __name__ == "__main__":
    typer.run(main)
