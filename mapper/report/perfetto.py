"""A schedule as a trace for ui.perfetto.dev: one process per program, one track per unit.

One microsecond of the trace is one cycle of the machine's clock, so that every start and duration is exact.
Chrome's JSON trace format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mapper.schedule.tables import Block, Program, Schedule

MAX_EVENTS = 100_000
"""With more steps than this in a program, each of its blocks shows its first repetition only."""


def trace(schedule: Schedule, max_events: int = MAX_EVENTS) -> bytes:
    """The trace of all programs, as JSON bytes. Same schedule, same bytes."""
    events: list[str] = []
    for pid, (name, program) in enumerate(sorted(schedule.programs.items())):
        events += _program(schedule, name, program, pid, max_events)
    head = json.dumps(
        {
            "displayTimeUnit": "ns",
            "otherData": {
                "target": schedule.target,
                "machine": schedule.machine,
                "clock_hz": schedule.clock_hz,
                "unit of time": "1 us of the trace = 1 cycle",
            },
        }
    )
    return (head[:-1] + ', "traceEvents": [\n' + ",\n".join(events) + "\n]}\n").encode()


def write(schedule: Schedule, path: Path) -> Path:
    """Write `trace(schedule)` to `path`; returns the path."""
    path.write_bytes(trace(schedule))
    return path


def _program(schedule: Schedule, name: str, program: Program, pid: int, limit: int) -> Iterator[str]:
    total = sum(len(b.steps) * b.repeat for b in program.blocks)
    whole = total <= limit
    yield _meta("process_name", pid, 0, f"{name}: {schedule.machine}, {schedule.clock_hz / 1e6:g} MHz")
    used: set[int] = set()
    blocks_track = len(schedule.units)
    for block in program.blocks:
        unit = block.steps.column("unit")
        used |= set(unit.tolist())
        yield from _block(schedule, block, pid, whole)
        for r in range(block.repeat):
            label = f"{block.name} {r + 1}/{block.repeat}" if block.repeat > 1 else block.name
            start, length = _extent(block)
            yield _slice(json.dumps(label), start + r * block.period, length, pid, blocks_track)
    yield _meta("thread_name", pid, blocks_track, "blocks")
    yield json.dumps(
        {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": blocks_track, "args": {"sort_index": -1}}
    )
    for u in sorted(used):
        yield _meta("thread_name", pid, u, schedule.units[u])


def _extent(block: Block) -> tuple[int, int]:
    if not len(block.steps):
        return block.start, 0
    start = block.steps.column("start")
    end = start + block.steps.column("duration")
    return block.start + int(start.min()), int(end.max() - start.min())


def _block(schedule: Schedule, block: Block, pid: int, whole: bool) -> Iterator[str]:
    names = schedule.ops.column("name").to_pylist()
    steps = block.steps
    opcodes = [json.dumps(name) for name in schedule.opcodes]
    titles = {
        op: json.dumps(names[op] if 0 <= op < len(names) else "") for op in set(steps.column("op").tolist())
    }
    columns = [
        steps.column(c).tolist() for c in ("start", "duration", "unit", "opcode", "op", "bytes", "flops")
    ]
    for r in range(block.repeat if whole else min(block.repeat, 1)):
        base = block.start + r * block.period
        for start, duration, unit, opcode, op, moved, flops in zip(*columns, strict=True):
            args = (
                f'"op":{titles[op]}'
                + (f',"bytes":{moved}' * (moved > 0))
                + (f',"flops":{flops}' * (flops > 0))
            )
            yield _slice(opcodes[opcode], base + start, duration, pid, unit, args)


def _slice(name: str, start: int, duration: int, pid: int, tid: int, args: str = "") -> str:
    return (
        f'{{"ph":"X","name":{name},"ts":{start},"dur":{duration},"pid":{pid},"tid":{tid},"args":{{{args}}}}}'
    )


def _meta(kind: str, pid: int, tid: int, name: str) -> str:
    return json.dumps({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})
