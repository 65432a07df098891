"""Tasks of experts and of routing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mapper_gpu import experts
from mapper_gpu.hardware import ENGINES
from mapper_gpu.product import STAGES, STEP_BYTES
from mapper_gpu.program_experts import experts_program
from mapper_gpu.programs import run_nodes
from mapper_gpu.timing import NONE

if TYPE_CHECKING:
    from mapper_gpu.grid import Maker
    from mapper_gpu.tasks import Grid


def expert_tasks(maker: Maker, grid: Grid, partial: str) -> None:
    """A task per run of blocks and column tile. Runs that an average routing fills come first and carry its
    bytes and operations."""
    kernel = grid.kernel
    g, t = kernel.grouped, kernel.expert_tile
    assert g is not None and t is not None
    node = maker.section.nodes[kernel.nodes[0]]
    b = maker.builder("experts")
    experts_program(b, node)
    program = maker.keep(b)
    r, filled = g.routing, experts.used(g, t)
    tiles = experts.widths(g, t)
    timed = kernel.timed
    idle = r.tile * 4.0
    for run, blocks in enumerate(filled):
        m0, m1 = run * t.run * r.tile, min(r.most, (run + 1) * t.run) * r.tile
        for i, width in enumerate(tiles):
            at = (m0, m1, i * t.n, i * t.n + width, 0, g.k)
            task = maker.task(b, program, "experts", at, node.op)
            share = blocks / r.blocks * width / g.n
            task.far, task.near = timed.far * share, timed.near * share if blocks else idle
            task.work = blocks * experts.padded(maker.gpu, g, width, t.engine)
            task.flops = math.ceil(timed.flops * share)
            task.engine, task.lead = ENGINES.index(t.engine), NONE
            stage = STAGES * STEP_BYTES * (width * g.mats + r.tile)
            task.pages = max(1, math.ceil(stage / maker.gpu.page))
            grid.tasks.append(task)


def route_task(maker: Maker, grid: Grid, partial: str) -> None:
    """Routing of all tokens: one task on each chip, with a program of its group of experts."""
    kernel, degrees = grid.kernel, maker.degrees
    nodes = maker.section.nodes
    owned = any(nodes[i].attr("owned") for i in kernel.nodes)
    owners = degrees.expert if owned else 1
    for owner in range(owners):
        b = maker.builder("route")
        b.rows, b.owner = "all", owner
        run_nodes(b, kernel.nodes, "all")
        for v in kernel.stores:
            b.write(v, b.registers[f"={v}"], "all", "all")
        first = maker.section.values[nodes[kernel.nodes[0]].inputs[0]]
        at = (0, first.rows, 0, first.width, 0, 0)
        task = maker.task(b, maker.keep(b), "route", at, nodes[kernel.nodes[0]].op)
        task.near, task.work = kernel.timed.near, kernel.timed.work
        task.engine, task.lead = ENGINES.index("vector"), NONE
        each = degrees.group // owners
        task.chips = range(owner * each, (owner + 1) * each) if owners > 1 else None
        grid.tasks.append(task)
