"""The host's own legality predicates. They know opcodes and the machine's constants, not the lowering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mapper import machine as machines
from mapper.schedule.checks import Check
from mapper.schedule.tables import Block, Schedule
from mapper.schedule.violation import Violation
from mapper_host.opcodes import OPCODES, extents
from mapper_host.timing import rates

_MOST = 16


@dataclass(frozen=True)
class OperandsFit:
    """Every step has the operands that its opcode takes, each of exactly the size that its arguments
    imply."""

    name: str = "OperandsFit"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        if tuple(schedule.opcodes) != OPCODES:
            return [Violation("the opcodes are not those of this version of the host target")]
        found = (
            violation
            for phase, program in schedule.programs.items()
            for number, block in enumerate(program.blocks)
            for violation in self._block(f"{phase}, block {number}", block)
        )
        return [v for v, _ in zip(found, range(_MOST), strict=False)]

    def _block(self, where: str, block: Block) -> Iterator[Violation]:
        offsets, flat = block.steps.args()
        opcodes, starts = block.steps.column("opcode"), block.steps.column("start")
        operands = [block.steps.slices("reads"), block.steps.slices("writes")]
        for row, opcode in enumerate(opcodes.tolist()):
            given = [int(n) for o, _, _, size in operands for n in size[o[row] : o[row + 1]]]
            try:
                wanted = extents(opcode, flat[offsets[row] : offsets[row + 1]].tolist())
            except (ValueError, IndexError, TypeError, KeyError):
                wanted = None
            if given != wanted:
                message = f"{where}, step {row} ({OPCODES[opcode]}): operands of {given} bytes, not {wanted}"
                yield Violation(message, (row,), "cpu", int(starts[row]))


@dataclass(frozen=True)
class RatesHold:
    """No step moves bytes faster than the cache delivers them or computes faster than its kernel, and no
    program starts before the interpreter has been entered."""

    name: str = "RatesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        entry = machine.value("program.overhead") * schedule.clock_hz
        found: list[Violation] = []
        for phase, program in schedule.programs.items():
            for number, block in enumerate(program.blocks):
                where = f"{phase}, block {number}"
                if block.start + 1 < entry:
                    found.append(
                        Violation(f"{where} starts before cycle {entry:.0f}", (), "cpu", block.start, entry)
                    )
                found += self._block(where, block, machine, schedule.clock_hz)
        return found[:_MOST]

    def _block(
        self, where: str, block: Block, machine: machines.Machine, clock: float
    ) -> Sequence[Violation]:
        opcode, moved, flops, length = (
            block.steps.column(k) for k in ("opcode", "bytes", "flops", "duration")
        )
        speed = rates(machine)[np.clip(opcode, 0, len(OPCODES) - 1)]
        needed = clock * (
            machine.value("step.overhead")
            + np.maximum(moved / machine.value("cache.bandwidth"), flops / speed)
        )
        return [
            Violation(
                f"{where}, step {row}: {length[row]} cycles for what takes {needed[row]:.1f}",
                (int(row),), "cpu", None, float(needed[row]),
            )
            for row in np.flatnonzero(length + 1 < needed)
        ]  # fmt: skip


CHECKS: tuple[Check, ...] = (OperandsFit(), RatesHold())
"""The checks of the host target."""
