"""Checks of routing and experts: the grid has room for every routing, every block is worked through once, and
every token's rows are summed once. Which rows a block has is data; that a task takes no row twice, and no
expert that is not there, its execution faults on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mapper import machine as machines
from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import ITEM, Rows, replicas_of, rows_of, stage_of
from mapper_gpu.check_tiles import chips_of, of_kind, painted

SAMPLES, FEW, TOLERANCE = 128, 64, 0.9
BOXES = ("m0", "m1", "n0", "n1", "k0", "k1")


@dataclass(frozen=True)
class ExpertsCover:
    """Experts' kernels have as many blocks of rows as the worst routing makes; their tasks cover all blocks,
    columns and all of K exactly once on every chip, in whole blocks whose accumulators fit half of the
    registers; each reads its weights out of the whole stack of the experts of its group of chips; together
    they bring in from HBM what the experts of an even routing weigh, on the fullest group."""

    name: str = "ExpertsCover"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        registers = machines.parse(schedule.machine_toml, schedule.machine).value("sm.registers") / 2
        for rows, record in rows_of(schedule):
            for number, kernel in enumerate(record["kernels"]):
                if kernel["kind"] == "experts":
                    group = stage_of(schedule, record)
                    yield from self._kernel(schedule, rows, kernel["experts"], number, registers, group)

    def _kernel(
        self, schedule: Schedule, rows: Rows, e: Any, number: int, registers: float, group: range
    ) -> Iterator[Violation]:
        tile, blocks, owners = int(e["rows"]), int(e["blocks"]), int(e["owners"])
        own = int(e["count"]) // owners
        pairs = int(e["tokens"]) * min(int(e["chosen"]), own)
        alone = min(pairs, own)
        most = alone + ((pairs - alone) // tile if int(e["tokens"]) > tile else 0)
        if blocks < most:
            yield Violation(f"{rows.kernel(number)} has {blocks} blocks, a routing may need {most}")
        mine = (rows["kernel"] == number) & of_kind(schedule, rows, "experts")
        chip = chips_of(rows, schedule)
        for c in group:
            boxes = np.stack([rows[k][mine & (chip == c)] for k in BOXES], axis=1)
            wrong = painted(boxes, (blocks * tile, int(e["n"]), int(e["k"])))
            if wrong:
                yield Violation(f"{rows.kernel(number)} on chip {c}: {wrong}")
        cut = mine & ((rows["m0"] % tile != 0) | (rows["m1"] % tile != 0))
        held = 4 * tile * (rows["n1"] - rows["n0"]) * int(e["mats"])
        for row in np.flatnonzero(cut | (mine & (held > registers))).tolist():
            yield Violation(
                f"{rows.name(row)} has parts of blocks, or {held[row]} bytes of registers", (row,)
            )
        yield from _stacks(schedule, rows, np.flatnonzero(mine).tolist(), own)
        read, _ = of_even_routing(int(e["tokens"]), int(e["count"]), int(e["chosen"]), owners)
        least = read * int(e["mats"]) * int(e["n"]) * int(e["k"]) * float(e["element"])
        for c in group:
            here = mine & (chip == c)
            got = float(rows["bytes"][here].sum())
            # every task rounds its share to whole bytes
            if got + int(here.sum()) < least:
                yield Violation(f"{rows.kernel(number)} on chip {c} moves {got:.0f} bytes, not {least:.0f}")


@lru_cache(maxsize=1 << 8)
def of_even_routing(tokens: int, count: int, chosen: int, owners: int) -> tuple[float, float]:
    """(experts that some token chose, rows of them) of the fullest of `owners` groups, at least: averages
    over all choices, all equally likely. Of several groups it is TOLERANCE of what SAMPLES draws say, where
    few tokens make the groups uneven, and the mean elsewhere."""
    mean = count * (1 - (1 - chosen / count) ** tokens) / owners, tokens * chosen / owners
    if owners == 1 or tokens > FEW:
        return mean
    rng = np.random.default_rng(0)
    chosen_ = np.argsort(rng.random((SAMPLES, tokens, count)), axis=-1)[..., :chosen]
    times = np.zeros((SAMPLES, count), np.int64)
    np.add.at(times, (np.arange(SAMPLES)[:, None, None], chosen_), 1)
    each = times.reshape(SAMPLES, owners, -1)
    fullest = ((each > 0).sum(-1).max(-1).mean(), each.sum(-1).max(-1).mean())
    return max(mean[0], TOLERANCE * float(fullest[0])), max(mean[1], TOLERANCE * float(fullest[1]))


def _stacks(schedule: Schedule, rows: Rows, mine: list[int], own: int) -> Iterator[Violation]:
    """Reads of stacks are all of the stack of the group's experts, on the task's own chip."""
    programs = schedule.plan["programs"][rows.phase]
    size = schedule.buffers.column("bytes").to_numpy()
    values = schedule.buffers.column("value").to_pylist()
    offsets, buffer, low, length = rows.block.steps.slices("reads")
    for row in mine:
        stacks = [o for o in programs[int(rows["program"][row])]["reads"] if o["r"] == "expert"]
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        found = {
            values[b]: (a, n, size[b]) for b, a, n in zip(buffer[part], low[part], length[part], strict=True)
        }
        if not stacks:
            yield Violation(f"{rows.name(row)} reads no stack of experts", (row,))
        for o in stacks:
            a, n, whole = found.get(o["value"], (0, 0, -1))
            each = int(o.get("bits", 0)) or 8 * ITEM[o["dtype"]]
            stack = int(o.get("stack", 1))
            if stack != own:
                yield Violation(
                    f"{rows.name(row)} reads a stack of {stack}, its group has {own} experts", (row,)
                )
            want = stack * int(o["rows"]) * ((int(o["width"]) * each + 7) // 8)
            if (a, n) != (0, want) or whole != want:
                yield Violation(f"{rows.name(row)}: bytes {a}..{a + n} of a stack of {want}", (row,))


@dataclass(frozen=True)
class RowsCover:
    """Row kernels take every token exactly once on every chip, so that the rows of its experts are summed
    once; routing is one task with all tokens, behind an exchange with those of all replicas."""

    name: str = "RowsCover"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        for rows, record in rows_of(schedule):
            sequence = schedule.programs[rows.phase].sequence
            tokens = schedule.request.batch // replicas_of(schedule) * sequence
            exchanged = {v for k in record["kernels"] if k["kind"] == "collective" for v in k["stores"]}
            chip = chips_of(rows, schedule)
            for number, kernel in enumerate(record["kernels"]):
                if kernel["kind"] not in ("rows", "route"):
                    continue
                mine = (rows["kernel"] == number) & of_kind(schedule, rows, kernel["kind"])
                of_all = kernel["kind"] == "route" and bool(set(kernel["reads"]) & exchanged)
                count = schedule.request.batch * sequence if of_all else tokens
                for c in stage_of(schedule, record):
                    here = mine & (chip == c)
                    boxes = np.stack([rows["m0"][here], rows["m1"][here]], axis=1)
                    wrong = painted(boxes, (count,))
                    if kernel["kind"] == "route" and not wrong and len(boxes) != 1:
                        wrong = "routing in parts"
                    if wrong:
                        yield Violation(f"{rows.kernel(number)} on chip {c}: {wrong}")


CHECKS = (ExpertsCover(), RowsCover())
