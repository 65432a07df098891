"""Mutation operators of low-bit weights: scales of other rows, a cut through a block, another decoding."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mapper.schedule.edit import Place, Row, step_at, with_step
from mapper.schedule.mutate import Mutant, Mutation
from mapper.schedule.tables import Schedule
from mapper_gpu.mutate import OnTasks

_PROGRAM, _N0, _N1, _K0, _K1 = 0, 4, 5, 6, 7
_TRIES = 16


def _decodes(schedule: Schedule, phase: str, row: Row) -> list[Any]:
    """The instructions by which a task makes operands of codes."""
    program = schedule.plan["programs"][phase][row["args"][_PROGRAM]]
    return [i for i in program["code"] if i[0] == "dequantise"]


def _other_scales(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """The slice of scales, or zero points, moves by whole rows inside its buffer."""
    names = schedule.buffers.column("value").to_pylist()
    sizes = schedule.buffers.column("bytes").to_pylist()
    reads = list(row["reads"])
    parts = [i for i, r in enumerate(reads) if str(names[r["buffer"]]).endswith((".scales", ".zeros"))]
    if not parts or not _decodes(schedule, place.phase, row):
        return None
    i = int(rng.choice(parts))
    r = reads[i]
    step = r["bytes"] // max(1, row["args"][_N1] - row["args"][_N0])
    room = (sizes[r["buffer"]] - r["bytes"]) // step
    if room < 1:
        return None
    moved = (r["offset"] // step + 1 + int(rng.integers(room))) % (room + 1) * step
    reads[i] = {**r, "offset": moved}
    return {**row, "reads": reads}, f"reads {i} begin at byte {moved}"


@dataclass(frozen=True)
class MoveCut:
    """Two tasks that share a tile cut K inside of a block: together they still cover it once."""

    name: str = "cut_block"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = [
            Place(phase, b, 0)
            for phase, program in schedule.programs.items()
            for b in range(len(program.blocks))
        ]
        for i in rng.permutation(len(found)):
            made = self._block(schedule, found[i].phase, found[i].block, rng)
            if made is not None:
                return made
        return None

    def _block(self, schedule: Schedule, phase: Any, b: int, rng: np.random.Generator) -> Mutant | None:
        steps = schedule.programs[phase].blocks[b].steps
        offsets, flat = steps.args()
        product = np.flatnonzero(steps.column("opcode") == list(schedule.opcodes).index("product"))
        at = {name: flat[offsets[:-1] + i] for name, i in (("k0", _K0), ("k1", _K1), ("n0", _N0), ("m0", 2))}
        unit = steps.column("unit") // (len(schedule.units) // schedule.chips)
        kernel = flat[offsets[:-1] + 1]
        for row in rng.permutation(product)[:_TRIES].tolist():
            here = Place(phase, b, row)
            one = step_at(schedule, here)
            blocks = [i[7] for i in _decodes(schedule, phase, one) if i[7]]
            same = (at["n0"] == at["n0"][row]) & (at["m0"] == at["m0"][row]) & (unit == unit[row])
            mates = np.flatnonzero(same & (kernel == kernel[row]) & (at["k0"] == at["k1"][row]))
            if not blocks or not len(mates):
                continue
            by = int(rng.integers(1, max(2, min(blocks))))
            made = with_step(schedule, here, _moved(one, _K1, by))
            there = Place(phase, b, int(mates[0]))
            made = with_step(made, there, _moved(step_at(schedule, there), _K0, by))
            return made, f"{here} and row {there.row} share a block, cut {by} columns later"
        return None


def _moved(row: Row, which: int, by: int) -> Row:
    args = list(row["args"])
    args[which] += by
    return {**row, "args": args}


@dataclass(frozen=True)
class OtherDecoding:
    """An instruction takes codes for another kind of number, other blocks, or its zero points for none."""

    name: str = "other_decoding"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        plan = copy.deepcopy(schedule.plan)
        found = [i for made in plan["programs"].values() for p in made for i in p["code"]
                 if i[0] == "dequantise"]  # fmt: skip
        if not found:
            return None
        chosen = found[rng.integers(len(found))]
        before = list(chosen)
        options: list[tuple[int, Any]] = [
            (5, {"int": "e4m3" if chosen[6] == 8 else "e2m1"}.get(chosen[5], "int"))
        ]
        options += [(7, chosen[7] * 2)] if chosen[7] else []
        options += [(4, None)] if chosen[4] is not None else []
        place, value = options[rng.integers(len(options))]
        chosen[place] = value
        return replace(schedule, plan=plan), f"{before} becomes {chosen}"


MUTATIONS: tuple[Mutation, ...] = (
    OnTasks("other_scales", _other_scales, ("product",)),
    MoveCut(),
    OtherDecoding(),
)
"""The operators; none applies to a schedule without low-bit weights."""
