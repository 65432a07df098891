"""Small edits of a schedule: another row of a table, a dropped step. The schedule itself is never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mapper.schedule.tables import STEP_SCHEMA, Schedule, StepTable


@dataclass(frozen=True)
class Place:
    """A row of a block's step table."""

    phase: str
    block: int
    row: int

    def __str__(self) -> str:
        return f"{self.phase} block {self.block} row {self.row}"


Row = dict[str, Any]


def step_at(schedule: Schedule, place: Place) -> Row:
    """The step's columns by name; `reads` and `writes` are lists of {"buffer", "offset", "bytes"}."""
    table = schedule.programs[place.phase].blocks[place.block].steps.table
    row: Row = table.slice(place.row, 1).to_pylist()[0]
    return row


def with_step(schedule: Schedule, place: Place, row: Row | None) -> Schedule:
    """The schedule with this step replaced, or dropped where `row` is None; the table is sorted again."""
    program = schedule.programs[place.phase]
    block = program.blocks[place.block]
    table = block.steps.table
    pieces = [table.slice(0, place.row), table.slice(place.row + 1)]
    if row is not None:
        pieces.insert(1, pa.Table.from_pylist([row], schema=STEP_SCHEMA))
    table = pa.concat_tables(pieces)
    start, unit = (table.column(k).to_numpy() for k in ("start", "unit"))
    order = np.lexsort((np.arange(len(start)), unit, start))
    if not np.array_equal(order, np.arange(len(order))):
        table = table.take(order)
    blocks = list(program.blocks)
    blocks[place.block] = replace(block, steps=StepTable(table.combine_chunks()))
    programs = {**schedule.programs, place.phase: replace(program, blocks=tuple(blocks))}
    return replace(schedule, programs=programs)


def with_buffer(schedule: Schedule, row: int, changes: Mapping[str, int]) -> Schedule:
    """The schedule with some columns of one buffer changed."""
    table = schedule.buffers
    new = {**table.slice(row, 1).to_pylist()[0], **changes}
    pieces = [table.slice(0, row), pa.Table.from_pylist([new], schema=table.schema), table.slice(row + 1)]
    return replace(schedule, buffers=pa.concat_tables(pieces).combine_chunks())
