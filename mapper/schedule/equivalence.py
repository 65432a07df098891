"""Do two schedules compute the same? Value numbering over the tables, apart from any executor.

Each written slice gets a number made of the opcode, the immediates, and the numbers of all bytes that the
step reads. Two schedules whose output and state ports end with the same numbers give the same results for all
weights and inputs. Sound for targets whose steps pass values through the memories that `reads` and
`writes` name alone; plans with `exact_time` (values on streams) are never called equal here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from mapper.schedule.tables import Schedule
from mapper.schedule.timeline import timeline

Piece = tuple[int, int, str]  # low, high, number of the value (with the value's own offset in it)
Class = Literal["slack", "dead value", "equal operand"]


def classify(original: Schedule, mutant: Schedule, kind: str) -> Class | None:
    """Why `mutant` is equivalent to `original`, or None where that is not shown.

    "slack": the same steps at other times or places; "equal operand": another order of operands that are
    equal or commute; "dead value": what was changed reaches no output.
    """
    if isinstance(original.plan, dict) and original.plan.get("exact_time"):
        return None
    if original.constants is not mutant.constants or original.ports is not mutant.ports:
        return None
    if results(original) != results(mutant):
        return None
    if kind == "swap_operands":
        return "equal operand"
    return "slack" if _work(original) == _work(mutant) else "dead value"


def commutes(schedule: Schedule, opcode: int, args: Sequence[int]) -> bool:
    """Whether the order in which a step reads its operands does not matter: plan["commutative"] has the name
    of its opcode, or the name and, behind a space, the first argument of the step."""
    names = schedule.plan.get("commutative", ()) if isinstance(schedule.plan, dict) else ()
    name = schedule.opcodes[opcode] if 0 <= opcode < len(schedule.opcodes) else ""
    return name in names or (len(args) > 0 and f"{name} {args[0]}" in names)


def _work(schedule: Schedule) -> list[tuple[int, ...]]:
    """What the steps do, without when."""
    rows = []
    for phase in sorted(schedule.programs):
        times = timeline(schedule, phase)
        columns = (times.unit, times.opcode, times.op, times.bytes, times.flops)
        rows += sorted(zip(*(c.tolist() for c in columns), strict=True))
    return rows


def results(schedule: Schedule) -> dict[str, list[str]]:
    """ "<phase>/<port>" -> numbers of the values in the port's buffers after the program has run."""
    out: dict[str, list[str]] = {}
    for phase in sorted(schedule.programs):
        memory = _initial(schedule, phase)
        _run(schedule, phase, memory)
        for port in schedule.ports:
            if port.kind in ("output", "state") and (not port.programs or phase in port.programs):
                ends = [_read(memory, b, 0, _size(schedule, b)) for b in port.buffers]
                out[f"{phase}/{port.name}"] = [_digest(*map(repr, e)) for e in ends]
    return out


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _size(schedule: Schedule, buffer: int) -> int:
    return int(schedule.buffers.column("bytes")[buffer].as_py())


def _initial(schedule: Schedule, phase: str) -> dict[int, list[Piece]]:
    memory: dict[int, list[Piece]] = {}
    for port in schedule.ports:
        if port.kind == "output" or (port.kind == "input" and port.programs and phase not in port.programs):
            continue
        for place, buffer in enumerate(port.buffers):
            memory[buffer] = [(0, _size(schedule, buffer), f"{port.name}[{place}]+0")]
    return memory


def _run(schedule: Schedule, phase: str, memory: dict[int, list[Piece]]) -> None:
    times = timeline(schedule, phase)
    steps = np.arange(len(times) + 1)
    read_at, write_at = (np.searchsorted(a.step, steps) for a in (times.reads, times.writes))
    reads, writes = (
        list(zip(a.buffer.tolist(), a.low.tolist(), a.high.tolist(), strict=True))
        for a in (times.reads, times.writes)
    )
    arguments = _arguments(schedule, phase)
    for step in range(len(times)):
        operands = [repr(_read(memory, *read)) for read in reads[read_at[step] : read_at[step + 1]]]
        immediate = arguments[times.block[step]][times.row[step]]
        if commutes(schedule, int(times.opcode[step]), immediate):
            operands.sort()
        targets = writes[write_at[step] : write_at[step + 1]]
        # a step may leave part of what it writes as it was, so the old bytes count as an operand
        old = [repr(_read(memory, *target)) for target in targets]
        value = _digest(schedule.opcodes[times.opcode[step]], repr(immediate), *operands, "writes", *old)
        for place, target in enumerate(targets):
            _write(memory, *target, f"{value}[{place}]")


def _arguments(schedule: Schedule, phase: str) -> list[list[list[int]]]:
    out = []
    for block in schedule.programs[phase].blocks:
        offsets, flat = block.steps.args()
        out.append([flat[a:b].tolist() for a, b in pairwise(offsets)])
    return out


def _shifted(number: str, by: int) -> str:
    name, _, offset = number.rpartition("+")
    return f"{name}+{int(offset) + by}"


def _read(memory: dict[int, list[Piece]], buffer: int, low: int, high: int) -> list[Piece]:
    """The pieces of [low, high), relative to `low`; bytes that nobody wrote count as poison."""
    out: list[Piece] = []
    at = low
    for a, b, number in memory.get(buffer, []):
        if b <= low or a >= high:
            continue
        if a > at:
            out.append((at - low, a - low, "poison+0"))
        begin, end = max(a, low), min(b, high)
        out.append((begin - low, end - low, _shifted(number, begin - a)))
        at = end
    if at < high:
        out.append((at - low, high - low, "poison+0"))
    return out


def _write(memory: dict[int, list[Piece]], buffer: int, low: int, high: int, name: str) -> None:
    kept: list[Piece] = []
    for a, b, number in memory.get(buffer, []):
        if a < low:
            kept.append((a, min(b, low), number))
        if b > high:
            begin = max(a, high)
            kept.append((begin, b, _shifted(number, begin - a)))
    memory[buffer] = sorted([*kept, (low, high, f"{name}+0")])
