"""CoversGraph: the schedule does all that the model asks for, in an order that respects the ops' operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper.schedule.ranges import NEVER
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.timeline import Timeline, timeline
from mapper.schedule.violation import Violation, first, label


@dataclass(frozen=True)
class CoversGraph:
    """Every op of the ops table has steps, which do at least its operations and read at least its weights.

    - An op with operations or weights has steps in its program, or the plan says which op does its work
      (`plan["fused"] = {"<op>": <op>}`); the group then does at least the sum. Where it names several, each
      of them repeats the op for itself, and the first counts as the one that does it.
    - No op is over before the first step of each producer of its operands has ended.
    - Steps belong to ops of their own program.
    - Every output port, and every state port that the program writes, is written.
    """

    name: str = "CoversGraph"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        times = timeline(schedule, phase)
        table = schedule.ops
        mine = table.column("program").to_numpy(zero_copy_only=False) == phase
        tied = np.flatnonzero(times.op >= 0)
        for step in tied[~mine[times.op[tied]]]:
            yield Violation(f"{label(schedule, phase, times, step)} is part of another program's op")
        fused = _fused(schedule)
        doer = _doers(schedule, fused)
        yield from _work(schedule, phase, times, mine, doer)
        yield from _order(schedule, phase, times, mine, doer, fused)
        yield from _outputs(schedule, phase, times)


def _fused(schedule: Schedule) -> dict[int, list[int]]:
    """The ops that do the work of ops without steps of their own."""
    plan: Any = schedule.plan
    fused = plan.get("fused") if isinstance(plan, dict) else None
    count = schedule.ops.num_rows
    found: dict[int, list[int]] = {}
    for op, by in (fused or {}).items():
        known = [int(b) for b in (by if isinstance(by, list) else [by]) if 0 <= int(b) < count]
        if 0 <= int(op) < count and known:
            found[int(op)] = known
    return found


def _doers(schedule: Schedule, fused: dict[int, list[int]]) -> Int:
    """For each op, the op whose steps do its work."""
    doer = np.arange(schedule.ops.num_rows)
    for op, by in fused.items():
        doer[op] = by[0]
    return doer


def _work(schedule: Schedule, phase: str, times: Timeline, mine: Any, doer: Int) -> Iterator[Violation]:
    table, count = schedule.ops, schedule.ops.num_rows
    repeat = np.asarray(table.column("repeat").to_numpy(), np.int64)
    tied = times.op >= 0
    steps = np.bincount(times.op[tied], minlength=count)
    done = {"flops": np.bincount(times.op[tied], times.flops[tied], minlength=count)}
    weights = np.zeros(schedule.buffers.num_rows, bool)
    for port in schedule.ports:
        if port.kind in ("weight", "constant"):
            weights[list(port.buffers)] = True
    reads = times.reads
    of_weight = np.flatnonzero(weights[reads.slices.buffer][reads.part])
    by, part = times.op[reads.step[of_weight]], reads.part[of_weight]
    size = (reads.slices.high - reads.slices.low)[part[by >= 0]]
    done["weight_bytes"] = np.bincount(by[by >= 0], size, minlength=count)
    needs = np.zeros(count, bool)
    for what, got in done.items():
        each = np.asarray(table.column(what).to_numpy(), np.int64) * repeat
        needs |= mine & (each > 0)
        wanted = np.bincount(doer[mine], each[mine], minlength=count)
        for op in np.flatnonzero(got < wanted):
            if steps[op]:
                unit = "operations" if what == "flops" else "weight bytes"
                needed = f"{phase}: op {_op(schedule, op)} needs {wanted[op]:.0f} {unit}"
                yield Violation(f"{needed}, its steps do {got[op]:.0f}", limit=float(wanted[op]))
    for op in np.flatnonzero(needs & (steps[doer] == 0)):
        yield Violation(f"{phase}: no step does op {_op(schedule, op)}")


def _op(schedule: Schedule, op: Any) -> str:
    row = schedule.ops.slice(int(op), 1).to_pylist()[0]
    return f"{op} ({row['kind']} {row['name']})"


def _order(
    schedule: Schedule, phase: str, times: Timeline, mine: Any, doer: Int, fused: dict[int, list[int]]
) -> Iterator[Violation]:
    """An op whose last step starts before a producer's first step has ended cannot have used its result."""
    count = schedule.ops.num_rows
    end = np.full(count, NEVER)
    tied = np.flatnonzero(times.op >= 0)
    np.minimum.at(end, times.op[tied], times.end[tied])
    last = np.full(count, -1, np.int64)
    np.maximum.at(last, times.op[tied], times.start[tied])
    lists = schedule.ops.column("operands").to_pylist()
    for op in np.flatnonzero(mine):
        for operand in lists[op] or ():
            a, b = doer[operand], doer[op]
            if operand < 0 or b in fused.get(operand, [a]) or end[a] == NEVER or last[b] < 0:
                continue
            if last[b] < end[a]:
                message = (
                    f"{phase}: op {_op(schedule, op)} is over at cycle {last[b]}, before its operand "
                    f"{_op(schedule, operand)} has done its first step at cycle {end[a]}"
                )
                yield Violation(message, (), None, int(last[b]), float(end[a]))


def _outputs(schedule: Schedule, phase: str, times: Timeline) -> Iterator[Violation]:
    written = np.zeros(schedule.buffers.num_rows, bool)
    written[times.writes.slices.buffer] = True
    for port in schedule.ports:
        if port.kind not in ("output", "state") or (port.programs and phase not in port.programs):
            continue
        for buffer in port.buffers:
            if not written[buffer]:
                yield Violation(f"{phase}: no step writes buffer {buffer} of {port.kind} {port.name}")
