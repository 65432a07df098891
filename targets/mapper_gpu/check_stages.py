"""The check of pipelines: stages keep to their chips, and only a send reaches into an earlier stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper import machine as machines
from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import (
    LINK,
    NETWORK,
    Rows,
    exchanges,
    replica_of,
    replicas_of,
    rows_of,
    sends,
    stage_of,
)


@dataclass(frozen=True)
class StagesHold:
    """Blocks follow each other stage by stage, no stage is left out, and a block's tasks are on its stage's
    chips and use its memories, those of their own replica but for exchanges.
    A send has one task on each chip, which copies whole buffers of the chip's
    peer in an earlier stage and carries all those bytes; it and other collectives pay for the network where
    they join link domains."""

    name: str = "StagesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        plan: Any = schedule.plan
        stages = int(plan.get("stages", 1))
        replicas = replicas_of(schedule)
        if stages < 1 or schedule.chips % (stages * replicas) or schedule.request.batch % replicas:
            yield Violation(f"{schedule.chips} chips are not {stages} stages of {replicas} replicas")
            return
        domain = machines.parse(schedule.machine_toml, schedule.machine).whole("link.domain")
        for phase in schedule.programs:
            order = [int(r.get("stage", 0)) for r in plan["blocks"][phase]]
            if sorted(order) != order or set(order) != set(range(stages)):
                yield Violation(f"{phase}: blocks of stages {order}, of {stages}")
                return
        for rows, record in rows_of(schedule):
            group = stage_of(schedule, record)
            yield from _inside(schedule, rows, record, group)
            for number, kernel in enumerate(record["kernels"]):
                if kernel["kind"] == "collective" and not sends(kernel) and not exchanges(kernel):
                    yield from _tier(schedule, rows, number, group, domain)
                if sends(kernel):
                    yield from _send(schedule, rows, number, group, domain)


def _inside(schedule: Schedule, rows: Rows, record: Any, group: range) -> Iterator[Violation]:
    memory = schedule.buffers.column("memory").to_numpy()
    chip = rows["unit"] // (len(schedule.units) // schedule.chips)
    for r in np.flatnonzero((chip < group.start) | (chip >= group.stop)).tolist():
        yield Violation(
            f"{rows.name(r)} is on chip {chip[r]}, its stage has chips {group.start}..{group.stop - 1}", (r,)
        )
    sent = np.array([sends(k) for k in record["kernels"]])[rows["kernel"]]
    spread = np.array([bool(exchanges(k)) for k in record["kernels"]])[rows["kernel"]]
    near = np.array([replica_of(schedule, group, c).start for c in range(schedule.chips)])
    size = len(group) // replicas_of(schedule)
    for which in ("reads", "writes"):
        offsets, buffer, _, _ = rows.block.steps.slices("reads" if which == "reads" else "writes")
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        begin, end = near[chip[row]], near[chip[row]] + size
        if which == "reads":
            begin, end = np.where(spread[row], group.start, begin), np.where(spread[row], group.stop, end)
        away = (memory[buffer] < begin) | (memory[buffer] >= end)
        if which == "reads":
            away &= ~sent[row]
        for r in np.unique(row[away]).tolist():
            yield Violation(f"{rows.name(r)}: {which} memory of another stage, or replica", (r,))


def _tier(schedule: Schedule, rows: Rows, number: int, group: range, domain: int) -> Iterator[Violation]:
    chip = rows["unit"] // (len(schedule.units) // schedule.chips)
    for row in np.flatnonzero(rows["kernel"] == number).tolist():
        near = replica_of(schedule, group, int(chip[row]))
        lead = NETWORK if near.start // domain != (near.stop - 1) // domain else LINK
        if rows["lead"][row] != lead:
            yield Violation(f"{rows.name(row)} does not pay for its link", (row,))


def _send(schedule: Schedule, rows: Rows, number: int, group: range, domain: int) -> Iterator[Violation]:
    memory, size = (schedule.buffers.column(c).to_numpy() for c in ("memory", "bytes"))
    mine = np.flatnonzero(rows["kernel"] == number)
    chip = rows["unit"] // (len(schedule.units) // schedule.chips)
    if sorted(chip[mine].tolist()) != list(group):
        yield Violation(f"{rows.kernel(number)}: a send without one task on each chip of its stage")
    programs = schedule.plan["programs"][rows.phase]
    for row in mine.tolist():
        reads, writes = (_slices(rows, which, row) for which in ("reads", "writes"))
        peers = {int(memory[b]) for b, _, _ in reads}
        peer = next(iter(peers), -1)
        if len(peers) != 1 or peer >= group.start or (chip[row] - peer) % len(group):
            yield Violation(f"{rows.name(row)} reads from chips {sorted(peers)}, not from its peer", (row,))
        if any(low or n != size[b] for b, low, n in (*reads, *writes)):
            yield Violation(f"{rows.name(row)} sends parts of buffers", (row,))
        if [n for _, _, n in reads] != [n for _, _, n in writes]:
            yield Violation(f"{rows.name(row)} writes other sizes than it reads", (row,))
        lead = NETWORK if peer // domain != int(chip[row]) // domain else LINK
        if rows["lead"][row] != lead or rows["near"][row] < sum(n for _, _, n in reads):
            yield Violation(f"{rows.name(row)} does not pay for its link", (row,))
        shape = [(o["rows"], o["width"]) for o in programs[int(rows["program"][row])]["reads"]]
        box = (0, max(r for r, _ in shape), 0, max(w for _, w in shape), 0, 0)
        if tuple(int(rows[k][row]) for k in ("m0", "m1", "n0", "n1", "k0", "k1")) != box:
            yield Violation(f"{rows.name(row)} is not at {box}", (row,))


def _slices(rows: Rows, which: str, row: int) -> list[tuple[int, int, int]]:
    offsets, buffer, low, size = rows.block.steps.slices("reads" if which == "reads" else "writes")
    part = slice(int(offsets[row]), int(offsets[row + 1]))
    return list(zip(buffer[part].tolist(), low[part].tolist(), size[part].tolist(), strict=True))


CHECKS = (StagesHold(),)
