"""Files beside a schedule: kernels.txt (one line per fused kernel), tasks.txt (every task), trace.json, and
on GPUs the Triton source of the kernels with a runner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mapper.backend import Artifact
from mapper.errors import LoweringError
from mapper.schedule.tables import Block, Schedule
from mapper_gpu.columns import FIELDS

NOTE = (
    "Triton source: {} in {{folder}}; python {{folder}}/run.py holds it against onnxruntime, and times it on "
    "a GPU (needs torch and triton)"
)


def artifacts(schedule: Schedule) -> Sequence[Artifact]:
    """All of them, from the schedule alone."""
    from mapper.report.perfetto import trace

    source, reason = triton_source(schedule)
    note = f"Triton source: none; {reason.removeprefix('gpu: ')}" if reason else ""
    return (
        Artifact("kernels.txt", kernels(schedule, reason).encode(), note),
        Artifact("tasks.txt", tasks(schedule).encode()),
        Artifact("trace.json", trace(schedule)),
        *source,
    )


def triton_source(schedule: Schedule) -> tuple[list[Artifact], str]:
    """The kernels of each phase and run.py, or nothing and why."""
    from mapper.machine import parse

    if parse(schedule.machine_toml, schedule.machine).value("geometry.systolic"):
        return [], f"{schedule.machine} is no GPU"
    from mapper_gpu.triton_emit import environment, source

    try:
        found = [
            Artifact(f"triton_{phase}.py", source(schedule, program.phase).text.encode())
            for phase, program in schedule.programs.items()
        ]
    except LoweringError as error:
        return [], str(error)
    run = environment().get_template("run.py.j2").render().encode()
    return [*found, Artifact("run.py", run, NOTE.format(", ".join(a.name for a in found)))], ""


def kernels(schedule: Schedule, reason: str = "") -> str:
    """The fused kernels of each block with tile, grid, bytes, time and what limits it; `reason`: why there is
    no Triton source."""
    lines = [f"kernels on {schedule.chips} x {schedule.machine}, style {schedule.plan['style']}"]
    for phase, records in sorted(schedule.plan["blocks"].items()):
        for block, record in zip(schedule.programs[phase].blocks, records, strict=True):
            lines += ["", f"{phase}, block {block.name}, {block.repeat} times"]
            lines += [_kernel(k) for k in record["kernels"]]
    if reason:
        lines += ["", f"no Triton source: {reason}"]
    return "\n".join(lines) + "\n"


def _kernel(k: Any) -> str:
    if "tile" in k:
        t = k["tile"]
        how = f"tile {t['m']}x{t['n']}, K in {t['splits']}, bands of {t['band']}, {t['engine']}"
    elif "split" in k:
        how = f"{k['split']['splits']} x {k['split']['keys']} rows of cache, {k['split']['tokens']} tokens"
    elif "experts" in k:
        e = k["experts"]
        how = f"{e['filled']} of {e['blocks']} blocks of {e['rows']}, {e['tile']['n']} columns"
    elif "collective" in k:
        how = f"{k['collective']['algorithm']}, {k['collective']['bytes']:.0f} B per link"
    else:
        how = "by rows"
    return (
        f"  {k['kind']:<11} {k['name']:<36} {how:<44} {k['tasks']:>6} tasks {k['merges']:>5} merges "
        f"{k['hbm_bytes']:>14.0f} B {k['seconds'] * 1e6:>10.2f} us  {k['limit']}"
    )


def tasks(schedule: Schedule) -> str:
    """Every task: start, duration, unit, opcode, coordinates, bytes, waits and signals."""
    lines = [f"tasks on {schedule.chips} x {schedule.machine}, {schedule.clock_hz:.0f} cycles per second"]
    for phase, program in sorted(schedule.programs.items()):
        lines += ["", f"program {phase}: {program.cycles} cycles"]
        for block in program.blocks:
            lines.append(f"block {block.name} at {block.start}, {block.repeat} x {block.period}")
            lines += _rows(schedule, block)
    return "\n".join(lines) + "\n"


def _rows(schedule: Schedule, block: Block) -> Iterator[str]:
    names = ("start", "duration", "unit", "opcode", "bytes")
    columns = zip(*(block.steps.column(n).tolist() for n in names), strict=True)
    offsets, flat = block.steps.args()
    values, at = flat.tolist(), offsets.tolist()
    for row, (start, length, unit, opcode, moved) in enumerate(columns):
        args = values[at[row] : at[row + 1]]
        m0, m1, n0, n1, k0, k1 = args[2:8]
        begin = len(FIELDS) + 1
        waits = [args[begin + 3 * i : begin + 3 * i + 3] for i in range(args[len(FIELDS)])]
        signals = args[begin + 3 * len(waits) + 1 :]
        waiting = " ".join(f"{c}={rest}" for c, _, rest in waits)
        yield (
            f"  {start:>8} +{length:<7} {schedule.units[unit]:<12} {schedule.opcodes[opcode]:<15} "
            f"p{args[0]} [{m0}:{m1}, {n0}:{n1}, {k0}:{k1}] {moved} B  "
            f"waits {waiting or '-'}  signals {signals}"
        )
