"""What the lpu mutation operators share: choosing a step with one of some opcodes, and changing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mapper.schedule.edit import Place, Row, step_at, with_step
from mapper.schedule.mutate import Mutant
from mapper.schedule.tables import Int, Schedule

TRIES = 64
Change = Callable[[Schedule, Place, Row, np.random.Generator], tuple[Row | None, str] | None]


@dataclass(frozen=True)
class OnOpcodes:
    """Changes one random step with one of `opcodes`. `change` gives the new row (None: drop it) and words for
    it, or None to try another step."""

    name: str
    opcodes: tuple[str, ...]
    change: Change

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = steps_with(schedule, self.opcodes)
        for _ in range(TRIES if found else 0):
            place = choose(found, rng)
            row = step_at(schedule, place)
            done = self.change(schedule, place, row, rng)
            if done is not None:
                opcode, unit = schedule.opcodes[row["opcode"]], schedule.units[row["unit"]]
                words = f"{place} ({opcode} on {unit}, cycle {row['start']}): {done[1]}"
                return with_step(schedule, place, done[0]), words
        return None


def steps_with(schedule: Schedule, opcodes: tuple[str, ...]) -> list[tuple[str, int, Int]]:
    """(phase, block, rows) of the steps with these opcodes; each block has at least one."""
    numbers = [n for n, name in enumerate(schedule.opcodes) if name in opcodes]
    found = []
    for phase, program in schedule.programs.items():
        for block, content in enumerate(program.blocks):
            rows = np.flatnonzero(np.isin(content.steps.column("opcode"), numbers))
            if len(rows):
                found.append((phase, block, rows))
    return found


def choose(found: list[tuple[str, int, Int]], rng: np.random.Generator) -> Place:
    sizes = np.array([len(rows) for _, _, rows in found])
    phase, block, rows = found[rng.choice(len(found), p=sizes / sizes.sum())]
    return Place(phase, block, int(rng.choice(rows)))


def other(value: int, choices: range | list[int], rng: np.random.Generator) -> int:
    return int(rng.choice([c for c in choices if c != value]))


def operand_of(row: Row) -> tuple[str, dict[str, int]] | None:
    """("reads" | "writes", slice) of the step's memory operand, None without one."""
    for which in ("reads", "writes"):
        if row[which]:
            return which, row[which][0]
    return None
