"""Checks of operands: slices belong to the values that a task's program names; and of rates: no task is
faster than its SM, its share of the memory, or its link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper import machine as machines
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import Rows, rows_of

ENGINES = ("bf16", "f16", "fp8", "int8", "fp4", "f32")
_NETWORK = 5
"""The lead of what passes between link domains."""


@dataclass(frozen=True)
class OperandsNamed:
    """A task has the opcode of its program; each of its slices lies in a buffer that holds the value of the
    program's operand, in its own chip's memory or the one that the operand names; repetitions replace a
    weight or cache by one of the same kind."""

    name: str = "OperandsNamed"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        values = [str(v) for v in schedule.buffers.column("value").to_pylist()]
        memory = schedule.buffers.column("memory").to_numpy().tolist()
        per_chip = len(schedule.units) // schedule.chips
        for rows, _ in rows_of(schedule):
            programs = schedule.plan["programs"][rows.phase]
            sides = [rows.block.steps.slices(w) for w in ("reads", "writes")]
            opcode, unit, program = (rows[k].tolist() for k in ("opcode", "unit", "program"))
            for row in range(len(opcode)):
                if not 0 <= program[row] < len(programs):
                    yield Violation(f"{rows.name(row)} names no program", (row,))
                    continue
                p = programs[program[row]]
                if p["kind"] != schedule.opcodes[opcode[row]]:
                    yield Violation(f"{rows.name(row)}: the program of a {p['kind']}", (row,))
                chip = unit[row] // per_chip
                for which, (offsets, buffer, _, _) in zip(("reads", "writes"), sides, strict=True):
                    mine = buffer[offsets[row] : offsets[row + 1]].tolist()
                    wrong = _named(p[which], mine, chip, values, memory)
                    if wrong:
                        yield Violation(f"{rows.name(row)}, {which}: {wrong}", (row,))


def _named(operands: Any, buffers: list[int], chip: int, values: list[str], memory: list[int]) -> str:
    """Slices come operand by operand, one run or several each; "" where they fit."""
    at = -1
    for b in buffers:
        while at < 0 or not _fits(operands[at], b, chip, values, memory):
            at += 1
            if at >= len(operands):
                return f"buffer {b} holds {values[b]!r}, which its program does not take there"
    return "" if at == len(operands) - 1 else "an operand without a slice"


def _fits(operand: Any, buffer: int, chip: int, values: list[str], memory: list[int]) -> bool:
    where = chip if int(operand["chip"]) < 0 else int(operand["chip"])
    return bool(values[buffer] == operand["value"] and memory[buffer] == where)


@dataclass(frozen=True)
class RatesHold:
    """No task is shorter than what its bytes take through its SM's port, or at what the SM keeps in flight,
    or its operations on its engine, or its link; a kernel's first task on an SM also pays the start and the
    memory latency. Kernels follow each other at the launch gap or later, and no program starts before the
    graph is launched."""

    name: str = "RatesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        for rows, _ in rows_of(schedule):
            need = _least(machine, rows, rows["opcode"] == list(schedule.opcodes).index("collective"))
            length = rows["duration"]
            for row in np.flatnonzero(length + 1 < need * schedule.clock_hz).tolist():
                least = need[row] * schedule.clock_hz
                message = f"{rows.name(row)}: {length[row]} cycles for what takes {least:.1f}"
                yield Violation(message, (row,), schedule.units[rows["unit"][row]], None, float(need[row]))
        for phase, program in schedule.programs.items():
            step = machine.value("launch.step") * schedule.clock_hz
            if program.blocks and program.blocks[0].start + 1 < step:
                yield Violation(f"{phase} starts before cycle {step:.0f}, when its graph is launched")


def _least(machine: machines.Machine, rows: Rows, link: Any) -> Any:
    v = machine.value
    clock = v("sm.clock")
    port = v("sm.port") * clock
    far, near, work = rows["bytes"], rows["near"], rows["work"]
    alone = min(port, v("sm.in_flight") / v("memory.hbm.latency"))
    sms = v("sm.count")
    peak = np.full(len(far), v("vector.f32") / sms)
    for number, name in enumerate(ENGINES):
        if f"tensor.{name}" in machine.constants:
            peak[rows["engine"] == number] = v(f"tensor.{name}") / sms
    busy = np.maximum(np.maximum(far / alone, (far + near) / port), work / peak)
    busy = np.where(link, near / v("link.bandwidth"), busy)
    slow = near / min(v("link.bandwidth"), v("network.bandwidth"))
    busy = np.where(rows["lead"] == _NETWORK, slow, busy)
    lead = np.array([0.0, v("launch.start") + v("memory.hbm.latency"), v("signal.latency"), v("signal.fetch"),
                     v("link.latency"), v("link.latency") + v("network.latency")])  # fmt: skip
    return busy + lead[np.clip(rows["lead"], 0, _NETWORK)]


@dataclass(frozen=True)
class BytesHold:
    """The tasks of a kernel together bring in from HBM at least every byte of the weights that they read,
    once."""

    name: str = "BytesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        weight = np.zeros(schedule.buffers.num_rows, bool)
        for port in schedule.ports:
            if port.kind == "weight" and port.shape[0] > 1:
                weight[list(port.buffers)] = True
        for rows, record in rows_of(schedule):
            offsets, buffer, low, size = rows.block.steps.slices("reads")
            owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
            product = rows["opcode"][owner] == list(schedule.opcodes).index("product")
            for number in range(len(record["kernels"])):
                mine = weight[buffer] & product & (rows["kernel"][owner] == number)
                need = _union(buffer[mine], low[mine], size[mine])
                got = int(rows["bytes"][rows["kernel"] == number].sum())
                # every task rounds its share to whole bytes
                if got + int(mine.sum()) < need:
                    yield Violation(f"{rows.kernel(number)} moves {got} bytes, its weights have {need}")


def _union(buffer: Int, low: Int, size: Int) -> int:
    """Bytes of the union of slices."""
    order = np.lexsort((low, buffer))
    b, a, e = buffer[order], low[order], low[order] + size[order]
    total, at, held = 0, -1, -1
    for i in range(len(b)):
        if b[i] != held:
            held, at = b[i], -1
        if e[i] > at:
            total += int(e[i] - max(a[i], at))
            at = int(e[i])
    return total


CHECKS = (OperandsNamed(), RatesHold(), BytesHold())
