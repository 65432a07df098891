"""Retiming: how long a schedule takes when a machine constant has another value.

The plan keeps every piece (chain or weight load) with what its start waits for, and how often each constant
counts in every such wait. Order, placement and the waits for busy units stay as they are; starts are
recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapper.machine import Machine, parse
from mapper.schedule.tables import Phase, Schedule
from mapper_lpu.instruction import CONSTANTS
from mapper_lpu.lower import Lowered
from mapper_lpu.placer import Placed

PARTS = ("before", "body", "after")


def plan_of(lowered: Lowered) -> dict[str, Any]:
    """What the plan keeps per phase: pieces, ends, period, repeat, cycles."""
    phases: dict[str, Any] = {}
    for phase, timed in lowered.timed.items():
        zero = timed.start + timed.repeat * timed.period
        shift = {"before": 0, "body": 0, "after": -zero}
        phases[phase] = {
            "start": timed.start,
            "period": timed.period,
            "repeat": timed.repeat,
            "cycles": timed.end,
            "pieces": {part: _pieces(timed.placed[part], shift[part]) for part in PARTS},
            "ends": {
                part: [[p, lag, list(form)] for p, lag, form in ends] for part, ends in timed.ends.items()
            },
        }
    return {"constants": list(CONSTANTS), "phases": phases}


def _pieces(placed: Sequence[Placed], shift: int) -> list[Any]:
    out = []
    for piece in placed:
        waits = [
            [p, lag + (shift if p < 0 else 0), list(form)] for p, (lag, form) in sorted(piece.after.items())
        ]
        out.append([piece.name, piece.start + shift, piece.end + shift, waits])
    return out


def retime(schedule: Schedule, machine: Machine) -> dict[Phase, float]:
    """Seconds per program with the constants of `machine`."""
    old = parse(schedule.machine_toml)
    plan: Any = schedule.plan
    names: list[str] = plan["constants"]
    change = [machine.whole(name) - old.whole(name) for name in names]
    skew = machine.whole("chip.tiles") - old.whole("chip.tiles")
    clock = machine.value("chip.clock")
    return {
        program.phase: (_cycles(plan["phases"][name], change) + skew) / clock
        for name, program in schedule.programs.items()
    }


def _cycles(phase: Mapping[str, Any], change: Sequence[int]) -> int:
    pieces, ends = phase["pieces"], phase["ends"]
    moved = {part: _starts(pieces[part], change) for part in PARTS}
    delay = {}
    for part in ("before", "body"):
        old = max((pieces[part][p][1] + lag for p, lag, _ in ends[part]), default=0)
        new = max((moved[part][p] + lag + _dot(form, change) for p, lag, form in ends[part]), default=0)
        delay[part] = new - old
    last = "after" if pieces["after"] else "before"
    old_end = max((piece[2] for piece in pieces[last]), default=0)
    new_end = max(
        (start + piece[2] - piece[1] for piece, start in zip(pieces[last], moved[last], strict=True)),
        default=0,
    )
    cycles = phase["cycles"] + delay["before"] + phase["repeat"] * delay["body"] + new_end - old_end
    return int(cycles)


def _starts(pieces: Sequence[Any], change: Sequence[int]) -> list[int]:
    """New starts: each piece keeps its slack behind what it waited for."""
    starts: list[int] = []
    for _, start, _, waits in pieces:
        old = max(((pieces[p][1] if p >= 0 else 0) + lag for p, lag, _ in waits), default=start)
        new = max(
            ((starts[p] if p >= 0 else 0) + lag + _dot(form, change) for p, lag, form in waits), default=start
        )
        starts.append(new + start - old)
    return starts


def _dot(form: Sequence[int], change: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(form, change, strict=True))
