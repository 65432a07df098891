"""What a check says: violations that name the steps, the unit, the cycle and the limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from mapper.schedule.tables import Schedule
from mapper.schedule.timeline import Timeline

MOST = 20
"""A check stops after this many violations; one is enough to refuse a schedule."""


@dataclass(frozen=True)
class Violation:
    """One broken rule. `steps` are rows of the program's Timeline; `limit` is the exceeded number."""

    message: str
    steps: tuple[int, ...] = ()
    unit: str | None = None
    cycle: int | None = None
    limit: float | None = None


class Check(Protocol):
    """A named predicate that a legal schedule meets. Knows tables and machine, never a scheduler."""

    @property
    def name(self) -> str:
        """The name under which the check is reported, e.g. "UnitExclusive"."""

    def run(self, schedule: Schedule) -> list[Violation]:
        """The rules that the schedule breaks; empty where it is legal."""


def first(violations: Iterable[Violation]) -> list[Violation]:
    """The first MOST of them."""
    return list(islice(violations, MOST))


def label(schedule: Schedule, phase: str, times: Timeline, step: int | np.integer[Any]) -> str:
    """A step for a message: program, opcode, unit, cycle, and its place in the program's tables."""
    opcode, unit = schedule.opcodes[times.opcode[step]], schedule.units[times.unit[step]]
    return f"{phase} step {step} ({opcode} on {unit}, cycle {times.start[step]}, {times.name(step)})"


def buffer_label(schedule: Schedule, buffer: int | np.integer[Any]) -> str:
    """A buffer for a message: its number and the value it holds."""
    return f"buffer {buffer} ({schedule.buffers.column('value')[int(buffer)].as_py()})"
