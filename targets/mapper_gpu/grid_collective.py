"""Tasks of collectives, and of what passes between the stages of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapper_gpu import programs
from mapper_gpu.collective import GATHER, ONE_SHOT, SEND, Collective
from mapper_gpu.hardware import Gpu
from mapper_gpu.nodes import EXCHANGES
from mapper_gpu.program_experts import collect_program, dispatch_program, exchange_program
from mapper_gpu.storage import Storage
from mapper_gpu.timing import LINK, NETWORK

if TYPE_CHECKING:
    from mapper_gpu.degrees import Near
    from mapper_gpu.grid import Maker
    from mapper_gpu.programs import Builder
    from mapper_gpu.tasks import Coordinates, Grid


def collective_tasks(maker: Maker, grid: Grid, partial: str) -> None:
    """An all-reduce or all-gather with its epilogue, in one exchange or two, or what a stage of a pipeline
    receives."""
    kernel = grid.kernel
    made = kernel.collective
    assert made is not None
    if made.algorithm == SEND:
        _receive(maker, grid)
        return
    if maker.section.nodes[kernel.nodes[0]].kind in EXCHANGES:
        _exchange(maker, grid)
        return
    for number in range(maker.degrees.data):
        _replica(maker, grid, partial, number)


def _replica(maker: Maker, grid: Grid, partial: str, number: int) -> None:
    """The tasks of one replica's chips. All replicas have theirs at once."""
    kernel = grid.kernel
    nodes, made = maker.section.nodes, kernel.collective
    assert made is not None
    chips = maker.replica(number)
    group = maker.absolute(chips)
    head, epilogue = nodes[kernel.nodes[0]], kernel.nodes[1:]
    source, value = head.inputs[0], maker.section.values[head.output]
    at = (0, value.rows, 0, value.width, 0, 0)
    if made.algorithm in (ONE_SHOT, GATHER):
        b = maker.builder("collective")
        if made.algorithm == GATHER:
            programs.gather_program(b, source, head.output, group, epilogue, kernel.stores, 0)
        else:
            programs.reduce_program(b, source, head.output, group, epilogue, kernel.stores, "all")
        kept, far, bytes_ = maker.keep(b), kernel.timed.far, _carried(maker.gpu, made, 1)
        _link(maker, grid, b, kept, at, head.op, bytes_, far, 0, chips, made.across, "replica")
        return
    share, bytes_ = value.width // maker.degrees.tensor, _carried(maker.gpu, made, 2)
    if not number:
        maker.new(Storage(f"{partial}.share", value.rows, value.width, "f32", share))
    first = maker.builder("collective")
    first.emit("sum", "sum", [first.read(source, "m", "n", chip=c) for c in group])
    first.write(f"{partial}.share", "sum", "m", "n")
    kept = maker.keep(first)
    for chip in chips:
        place = (chip - chips.start) * share
        mine = (0, value.rows, place, place + share, 0, 0)
        only = range(chip, chip + 1)
        _link(maker, grid, first, kept, mine, head.op, bytes_ / 2, 0.0, 0, only, made.across, "replica")
    second = maker.builder("collective")
    programs.gather_program(second, f"{partial}.share", head.output, group, epilogue, kernel.stores, share)
    kept = maker.keep(second)
    far = kernel.timed.far
    _link(maker, grid, second, kept, at, head.op, bytes_ / 2, far, 1, chips, made.across, "replica")


def _exchange(maker: Maker, grid: Grid) -> None:
    """What passes between replicas: each chip reads from those of its rank in all replicas. What comes back
    are the rows of the chip's own tokens."""
    kernel, made = grid.kernel, grid.kernel.collective
    assert made is not None
    node, epilogue = maker.section.nodes[kernel.nodes[0]], kernel.nodes[1:]
    value = maker.section.values[node.output]
    for number in range(maker.degrees.tensor):
        rank = maker.rank(number)
        peers = maker.absolute(rank)
        b = maker.builder("collective")
        if node.kind == "collect":
            collect_program(b, node, peers, epilogue, kernel.stores)
        else:
            (exchange_program if node.kind == "exchange" else dispatch_program)(b, node, peers)
        kept = maker.keep(b)
        parts = [rank]
        if node.kind == "collect":
            parts = [range(chip, chip + 1) for chip in rank]
        for i, chips in enumerate(parts):
            at = (0, value.rows, 0, value.width, 0, 0)
            if node.kind == "collect":  # n: the replica's rows among those of all
                at = (0, value.rows, i * value.rows, (i + 1) * value.rows, 0, 0)
            # other replicas' rows are there: they were made before the routing that was exchanged
            over: Near = "own" if node.kind == "dispatch" else "rank"
            far, bytes_ = kernel.timed.far, _carried(maker.gpu, made, 1)
            _link(maker, grid, b, kept, at, node.op, bytes_, far, 0, chips, made.across, over)


def _carried(gpu: Gpu, made: Collective, stages: int) -> float:
    """Bytes that take as long as the collective does, less one latency for each of its `stages` in the table,
    at the link's rate or the network's: its own where that is all; with those of further rounds, and of both
    ways where it goes inside and between domains."""
    if made.across:
        lead, rate = gpu.link_latency + gpu.network_latency, min(gpu.link, gpu.network)
    else:
        lead, rate = gpu.link_latency, gpu.link
    return (made.seconds - stages * lead) * rate


def _receive(maker: Maker, grid: Grid) -> None:
    """Each chip reads from its peer in the stage that sends: a task with a program of its own."""
    kernel, values = grid.kernel, maker.section.values
    made = kernel.collective
    assert made is not None
    rows = max(values[v].rows for v in kernel.stores)
    width = max(values[v].width for v in kernel.stores)
    for chip in range(maker.degrees.group):
        b = maker.builder("collective")
        for source, v in zip(kernel.reads, kernel.stores, strict=True):
            peer = maker.storage[source].base + chip
            b.write(v, b.read(source, "all", "all", chip=peer), "all", "all")
        at, only = (0, rows, 0, width, 0, 0), range(chip, chip + 1)
        far = kernel.timed.far
        _link(maker, grid, b, maker.keep(b), at, -1, made.bytes, far, 0, only, made.across, "own")


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
    chips: range,
    across: bool,
    over: Near,
) -> None:
    """A task on the links of `chips`, counted from the group's first, which waits for chips `over`."""
    task = maker.task(b, program, "collective", at, op)
    lead = NETWORK if across else LINK
    task.near, task.far, task.lead, task.stage, task.over = near, far, lead, stage, over
    task.chips = None if len(chips) == maker.degrees.group else chips
    grid.tasks.append(task)
