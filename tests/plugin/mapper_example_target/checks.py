"""The target's own rules, and an operator that breaks one of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mapper.machine import parse
from mapper.schedule.checks import Violation
from mapper.schedule.edit import Place, step_at, with_step
from mapper.schedule.tables import Schedule

from .opcodes import SIZES
from .timing import durations


@dataclass(frozen=True)
class OperandsFit:
    """Every step has as many operands, of as many bytes each, as its opcode and arguments ask for."""

    name: str = "OperandsFit"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        found = []
        for phase, program in schedule.programs.items():
            for block in program.blocks:
                for number, row in enumerate(block.steps.table.to_pylist()):
                    name = schedule.opcodes[row["opcode"]]
                    sizes = [s["bytes"] for s in (*row["reads"], *row["writes"])]
                    if not _suits(name, row["args"], sizes):
                        message = f"{phase} step {number} ({name}): operands of {sizes} bytes do not suit it"
                        found.append(Violation(message, (number,), "alu", row["start"]))
        return found


def _suits(name: str, args: list[int], sizes: list[int]) -> bool:
    try:
        return list(SIZES[name](args)) == sizes
    except (IndexError, ValueError):
        return False


@dataclass(frozen=True)
class DurationsHold:
    """No step is shorter than the machine takes for its bytes and operations."""

    name: str = "DurationsHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        machine = parse(schedule.machine_toml, schedule.machine)
        found = []
        for phase, program in schedule.programs.items():
            for block in program.blocks:
                given, needed = block.steps.column("duration"), durations(block.steps, machine)
                for number in np.flatnonzero(given < needed):
                    message = (
                        f"{phase} step {number} takes {given[number]} cycles; the machine {needed[number]}"
                    )
                    start = int(block.steps.column("start")[number])
                    found.append(Violation(message, (int(number),), "alu", start, float(needed[number])))
        return found


@dataclass(frozen=True)
class ShortenStep:
    """Let a step end a cycle early."""

    name: str = "shorten_step"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> tuple[Schedule, str] | None:
        """See mapper.schedule.mutate.Mutation."""
        phase = sorted(schedule.programs)[rng.integers(len(schedule.programs))]
        place = Place(phase, 0, int(rng.integers(len(schedule.programs[phase].blocks[0].steps))))
        row = step_at(schedule, place)
        return with_step(
            schedule, place, {**row, "duration": row["duration"] - 1}
        ), f"{place}: a cycle shorter"
