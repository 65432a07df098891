"""Checks of low-bit weights: a tile holds whole blocks, its scales and zero points are those of its codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper.schedule.tables import Block, Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import Rows, rows_of

KINDS = {"int": (2, 4, 8), "e4m3": (8,), "e2m1": (4,)}
"""Kinds of elements and how many bits they can have."""


@dataclass(frozen=True)
class BlocksWhole:
    """A task that makes operands of low-bit codes begins and ends its stretch of K where a block does, or at
    the end of the rows; its slices of codes, scales and zero points are the rows n0..n1 and the stretch of K
    of its coordinates; codes, scales and zero points are parts of one weight, in every repetition."""

    name: str = "BlocksWhole"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        values = [str(v) for v in schedule.buffers.column("value").to_pylist()]
        for rows, _ in rows_of(schedule):
            programs = schedule.plan["programs"][rows.phase]
            made = {i: _made(p) for i, p in enumerate(programs)}
            sides = rows.block.steps.slices("reads")
            for number in np.unique(rows["program"]).tolist():
                for instruction in made.get(number, ()):
                    mine = np.flatnonzero(rows["program"] == number)
                    yield from _tasks(rows, programs[number], instruction, mine, sides)
            yield from _repetitions(rows, values, rows.block)


def _made(program: Any) -> list[Any]:
    return [i for i in program["code"] if i[0] == "dequantise"]


def _tasks(rows: Rows, program: Any, instruction: Any, mine: Any, sides: Any) -> Iterator[Violation]:
    """Tasks of one program that make operands by one instruction."""
    _, _, codes, scales, zeros, kind, bits, block, *_ = instruction
    where = {i[1]: i[2] for i in program["code"] if i[0] == "read"}
    parts = {"values": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    if bits not in KINDS.get(kind, ()) or any(r not in where for r in parts.values()):
        yield Violation(f"{rows.phase}, block {rows.number}: codes of {bits} bits of {kind}, or no operand")
        return
    reads = program["reads"]
    operands = {name: reads[where[register]] for name, register in parts.items()}
    stems = {_stem(o["value"], name) for name, o in operands.items()}
    if len(stems) != 1 or "" in stems:
        yield Violation(
            f"{rows.phase}, block {rows.number}: parts of different weights, "
            f"{', '.join(o['value'] for o in operands.values())}"
        )
    k0, k1, depth = rows["k0"][mine], rows["k1"][mine], int(operands["values"]["width"])
    if block:
        for row in mine[(k0 % block != 0) | ((k1 % block != 0) & (k1 != depth))].tolist():
            yield Violation(
                f"{rows.name(row)} cuts a block of {block} along K "
                f"({rows['k0'][row]}..{rows['k1'][row]} of {depth})", (row,), limit=float(block),
            )  # fmt: skip
    offsets, _, low, size = sides
    for name, o in operands.items():
        per = block if name != "values" else 1
        if int(o.get("per", 1)) != max(1, per):
            yield Violation(f"{rows.phase}, block {rows.number}: {name} of other blocks than {block}")
            continue
        if o["r"] == "expert":
            continue  # all of a stack, as ExpertsCover holds
        at = offsets[mine] + where[parts[name]]
        if (np.diff(offsets)[mine] <= where[parts[name]]).any():
            yield Violation(f"{rows.phase}, block {rows.number}: not one slice for each operand")
            continue
        wrong = _elsewhere(o, rows, mine, per) != np.stack([low[at], size[at]], axis=1)
        for row in mine[wrong.any(1)].tolist():
            yield Violation(f"{rows.name(row)}: its slice of {name} is not of its rows and its K", (row,))


def _elsewhere(o: Any, rows: Rows, mine: Any, per: int) -> Any:
    """[tasks, 2]: where a part's slice of each task has to begin, and its bytes. A row of a panel fills whole
    bytes; panels follow each other, each with all rows."""
    panel, bits = int(o["panel"]), int(o.get("bits", 0))
    each = 8 * {"u8": 1, "f16": 2, "bf16": 2, "f32": 4}[o["dtype"]]
    row = (panel * (bits or each) + 7) // 8
    k0, k1 = (rows["k0"][mine], rows["k1"][mine]) if per else (0 * mine, 0 * mine + 1)
    begin, end = k0 // max(1, per), (k1 + max(1, per) - 1) // max(1, per)
    start = ((begin // panel) * int(o["rows"]) + rows["n0"][mine]) * row
    last = (((end + panel - 1) // panel - 1) * int(o["rows"]) + rows["n1"][mine]) * row
    return np.stack([start, last - start], axis=1)


def _stem(value: str, part: str) -> str:
    return value[: -len(part) - 1] if value.endswith(f".{part}") else ""


def _repetitions(rows: Rows, values: list[str], block: Block) -> Iterator[Violation]:
    """Where repetitions bind other buffers: the parts of one weight go to the parts of one weight."""
    if block.bindings is None:
        return
    columns = (block.bindings.column(i).to_pylist() for i in range(3))
    found: dict[tuple[str, int], set[str]] = {}
    for slot, repetition, other in zip(*columns, strict=True):
        for part in ("values", "scales", "zeros"):
            own = _stem(values[slot], part)
            if own:
                found.setdefault((own, repetition), set()).add(_stem(values[other], part))
    for (own, repetition), stems in sorted(found.items()):
        if len(stems) > 1 or "" in stems:
            yield Violation(
                f"{rows.phase}, block {rows.number}: repetition {repetition} binds the parts of {own!r} to "
                f"{len(stems)} weights"
            )


CHECKS = (BlocksWhole(),)
