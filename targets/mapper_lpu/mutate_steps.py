"""Mutations of two steps, of a repeated step and of a permutation map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mapper.schedule.edit import Place, Row, step_at, with_step
from mapper.schedule.mutate import Mutant
from mapper.schedule.tables import Int, Schedule
from mapper_lpu import isa
from mapper_lpu.mutate_base import TRIES, choose, operand_of, other, steps_with


@dataclass(frozen=True)
class SwapSteps:
    """Two steps of one block exchange part of their content; `pair` finds the partner of a random step."""

    name: str
    opcodes: tuple[str, ...]
    pair: Callable[[Schedule, Place, Row, np.random.Generator], tuple[int, tuple[str, ...], str] | None]

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = steps_with(schedule, self.opcodes)
        for _ in range(TRIES if found else 0):
            place = choose(found, rng)
            row = step_at(schedule, place)
            partner = self.pair(schedule, place, row, rng)
            if partner is None:
                continue
            other_place = replace(place, row=partner[0])
            other = step_at(schedule, other_place)
            swapped = [{**a, **{k: b[k] for k in partner[1]}} for a, b in ((row, other), (other, row))]
            # same start and unit before and after, so the rows stay where they are
            first = with_step(schedule, place, swapped[0])
            return with_step(first, other_place, swapped[1]), f"{place} and row {partner[0]}: {partner[2]}"
        return None


def _partner(rows: Int, rng: np.random.Generator) -> int | None:
    return int(rng.choice(rows)) if len(rows) else None


def load_pair(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another load of the same plane, less than 20 cycles away."""
    steps = schedule.programs[place.phase].blocks[place.block].steps
    rows = np.flatnonzero((steps.column("unit") == row["unit"]) & (steps.column("opcode") == row["opcode"]))
    near = rows[np.abs(steps.column("start")[rows] - row["start"]) < 20]
    other = _partner(near[near != place.row], rng)
    return None if other is None else (other, ("args",), "load groups change places")


def plane_pair(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """An access of another byte plane of the same value in the same cycle."""
    steps = schedule.programs[place.phase].blocks[place.block].steps
    same = (steps.column("opcode") == row["opcode"]) & (steps.column("start") == row["start"])
    same &= steps.column("op") == row["op"]
    names = schedule.buffers.column("value")
    which, mine = operand_of(row) or ("reads", {"buffer": 0})
    value = str(names[mine["buffer"]].as_py()).split("#")[0]
    offsets, buffer, _, _ = steps.slices("reads" if which == "reads" else "writes")
    rows = []
    for r in np.flatnonzero(same):
        if r != place.row and offsets[r + 1] > offsets[r]:
            other = str(names[int(buffer[offsets[r]])].as_py())
            if other.split("#")[0] == value:
                rows.append(int(r))
    found = _partner(np.array(rows, np.int64), rng)
    return None if found is None else (found, ("args",), "byte planes change places")


@dataclass(frozen=True)
class Duplicate:
    """Issues a step twice: again a few cycles later, on the same queue."""

    name: str = "duplicate_step"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = steps_with(schedule, isa.OPCODES)
        if not found:
            return None
        place, by = choose(found, rng), int(rng.integers(1, 8))
        row = step_at(schedule, place)
        doubled = _doubled(schedule, place)
        # of the two equal rows the second becomes the later one
        second = replace(place, row=place.row + 1)
        return with_step(
            doubled, second, {**row, "start": row["start"] + by}
        ), f"{place}: again {by} cycles later"


def _doubled(schedule: Schedule, place: Place) -> Schedule:
    """The schedule with this row of a step table twice."""
    program = schedule.programs[place.phase]
    block = program.blocks[place.block]
    table = block.steps.table
    pieces = [table.slice(0, place.row + 1), table.slice(place.row)]
    steps = replace(block.steps, table=pa.concat_tables(pieces).combine_chunks())
    blocks = list(program.blocks)
    blocks[place.block] = replace(block, steps=steps)
    programs = {**schedule.programs, place.phase: replace(program, blocks=tuple(blocks))}
    return replace(schedule, programs=programs)


@dataclass(frozen=True)
class PermuteEntry:
    """Changes one entry of a permutation map that a step uses."""

    name: str = "permute_entry"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = steps_with(schedule, ("sxm.permute",))
        plan: Any = schedule.plan
        if not found or not isinstance(plan, dict):
            return None
        number = step_at(schedule, choose(found, rng))["args"][5]
        maps = [list(m) for m in plan["permutes"]]
        lanes = [lane for lane, source in enumerate(maps[number]) if source >= 0]
        if not lanes:
            return None
        lane = int(rng.choice(lanes))
        old = maps[number][lane]
        maps[number][lane] = other(old, range(isa.LANES), rng)
        words = f"map {number}, lane {lane}: from lane {maps[number][lane]} instead of {old}"
        return replace(schedule, plan={**plan, "permutes": maps}), words
