"""Decode steps of a model on a GPU: bound and schedule, in both styles.

python -m benchmarks.gpu_points --machine h100-sxm --model zoo:llama-3.1-8b --batch 1 --batch 32
"""

from __future__ import annotations

from typing import Annotated

import typer

from mapper import driver


def main(
    model: Annotated[str, typer.Option(help="a model")] = "zoo:llama-3.1-8b",
    machine: Annotated[list[str] | None, typer.Option(help="machines of target gpu")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes")] = None,
    context: Annotated[int, typer.Option(min=1, help="rows of the cache, full")] = 2048,
    chips: Annotated[int, typer.Option(min=1, help="chips, tensor parallel")] = 1,
) -> None:
    """One line per machine and batch, in ms."""
    print(f"{'machine':<16}{'batch':>6}{'bound':>9}{'graph':>9}{'megakernel':>12}{'band':>16}{'ratio':>8}")
    for name in machine or ["h100-sxm"]:
        for size in batch or [1, 32]:
            done = driver.build(
                model, "gpu", machine=name, batch=size, context=context, chips=chips, phase="decode"
            )
            done.report.raise_first()
            e, styles = done.result.phases["decode"], done.schedule.plan["styles"]["decode"]
            band = f"{1e3 * e.low_s:.2f}..{1e3 * e.high_s:.2f}"
            print(
                f"{done.schedule.machine:<16}{size:>6}"
                f"{1e3 * e.bound.seconds:>9.2f}{1e3 * styles['graph']:>9.2f}"
                f"{1e3 * styles['megakernel']:>12.2f}{band:>16}{e.ratio:>8.2f}"
            )


if __name__ == "__main__":
    typer.run(main)
