"""Tasks of collectives, and of what passes between the stages of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapper_gpu import programs
from mapper_gpu.collective import GATHER, ONE_SHOT, SEND, Collective
from mapper_gpu.hardware import Gpu
from mapper_gpu.storage import Storage
from mapper_gpu.timing import LINK, NETWORK

if TYPE_CHECKING:
    from mapper_gpu.grid import Coordinates, Grid, Maker
    from mapper_gpu.programs import Builder


def collective_tasks(maker: Maker, grid: Grid, partial: str) -> None:
    """An all-reduce or all-gather with its epilogue, in one exchange or two, or what a stage of a pipeline
    receives."""
    kernel = grid.kernel
    nodes, made = maker.section.nodes, kernel.collective
    assert made is not None
    if made.algorithm == SEND:
        _receive(maker, grid)
        return
    head, epilogue = nodes[kernel.nodes[0]], kernel.nodes[1:]
    source, value = head.inputs[0], maker.section.values[head.output]
    at = (0, value.rows, 0, value.width, 0, 0)
    if made.algorithm in (ONE_SHOT, GATHER):
        b = maker.builder("collective")
        if made.algorithm == GATHER:
            programs.gather_program(b, source, head.output, maker.group, epilogue, kernel.stores, 0)
        else:
            programs.reduce_program(b, source, head.output, maker.group, epilogue, kernel.stores, "all")
        kept = maker.keep(b)
        _link(maker, grid, b, kept, at, head.op, made.bytes, kernel.timed.far, 0, across=made.across)
        return
    share, bytes_ = value.width // maker.chips, _carried(maker.gpu, made)
    maker.new(Storage(f"{partial}.share", value.rows, value.width, "f32", share))
    first = maker.builder("collective")
    first.emit("sum", "sum", [first.read(source, "m", "n", chip=c) for c in maker.group])
    first.write(f"{partial}.share", "sum", "m", "n")
    kept = maker.keep(first)
    for chip in range(maker.chips):
        mine = (0, value.rows, chip * share, (chip + 1) * share, 0, 0)
        _link(maker, grid, first, kept, mine, head.op, bytes_ / 2, 0.0, 0, chip, made.across)
    second = maker.builder("collective")
    programs.gather_program(
        second, f"{partial}.share", head.output, maker.group, epilogue, kernel.stores, share
    )
    kept = maker.keep(second)
    _link(maker, grid, second, kept, at, head.op, bytes_ / 2, kernel.timed.far, 1, across=made.across)


def _carried(gpu: Gpu, made: Collective) -> float:
    """Bytes of an all-reduce in two exchanges; between domains those that take as long at the network's
    rate as its shares inside and between domains, and its further rounds, together."""
    if not made.across:
        return made.bytes
    rounds = 2 * (gpu.link_latency + gpu.network_latency)
    return (made.seconds - rounds) * min(gpu.link, gpu.network)


def _receive(maker: Maker, grid: Grid) -> None:
    """Each chip reads from its peer in the stage that sends: a task with a program of its own."""
    kernel, values = grid.kernel, maker.section.values
    made = kernel.collective
    assert made is not None
    rows = max(values[v].rows for v in kernel.stores)
    width = max(values[v].width for v in kernel.stores)
    for chip in range(maker.chips):
        b = maker.builder("collective")
        for source, v in zip(kernel.reads, kernel.stores, strict=True):
            peer = maker.storage[source].base + chip
            b.write(v, b.read(source, "all", "all", chip=peer), "all", "all")
        _link(
            maker,
            grid,
            b,
            maker.keep(b),
            (0, rows, 0, width, 0, 0),
            -1,
            made.bytes,
            kernel.timed.far,
            0,
            chip,
            made.across,
        )


def _link(
    maker: Maker,
    grid: Grid,
    b: Builder,
    program: int,
    at: Coordinates,
    op: int,
    near: float,
    far: float,
    stage: int,
    chip: int = -1,
    across: bool = False,
) -> None:
    task = maker.task(b, program, "collective", at, op)
    lead = NETWORK if across else LINK
    task.near, task.far, task.lead, task.stage, task.chip = near, far, lead, stage, chip
    grid.tasks.append(task)
