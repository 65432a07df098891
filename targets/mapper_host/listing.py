"""The readable form of a host schedule: one line per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mapper.backend import Artifact
from mapper.schedule.tables import Block, Schedule


def listing(schedule: Schedule) -> str:
    """All programs, block by block: start cycle, duration, opcode, operands (reads -> writes), bytes,
    operations."""
    lines = [f"host schedule on {schedule.machine}, {schedule.clock_hz:.0f} cycles per second"]
    values = [str(v) for v in schedule.buffers.column("value").to_pylist()]
    for phase, program in schedule.programs.items():
        lines += ["", f"program {phase}: {program.cycles} cycles"]
        for block in program.blocks:
            bound = "" if block.bindings is None else f", {block.bindings.num_rows} bindings"
            lines.append(f"block {block.name} at {block.start}, {block.repeat} x {block.period}{bound}")
            lines += _steps(schedule, block, values)
    return "\n".join(lines) + "\n"


def _steps(schedule: Schedule, block: Block, values: Sequence[str]) -> Iterator[str]:
    start, length, opcode, moved, flops = (
        block.steps.column(k) for k in ("start", "duration", "opcode", "bytes", "flops")
    )
    operands = [block.steps.slices("reads"), block.steps.slices("writes")]
    for row in range(len(block.steps)):
        sides = [
            ", ".join(
                _slice(values[b[i]], int(b[i]), int(at[i]), int(n[i])) for i in range(o[row], o[row + 1])
            )
            for o, b, at, n in operands
        ]
        yield (
            f"  {start[row]:>9} +{length[row]:<8} {schedule.opcodes[opcode[row]]:<16} "
            f"{sides[0]} -> {sides[1]}"
            f"  [{moved[row]} B, {flops[row]} op]"
        )


def _slice(value: str, buffer: int, offset: int, size: int) -> str:
    place = f"+{offset}" if offset else ""
    return f"{value}#{buffer}{place}:{size}"


def artifacts(schedule: Schedule) -> Sequence[Artifact]:
    """listing.txt and the trace for Perfetto."""
    from mapper.report.perfetto import trace

    return (Artifact("listing.txt", listing(schedule).encode()), Artifact("trace.json", trace(schedule)))
