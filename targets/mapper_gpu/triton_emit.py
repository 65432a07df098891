"""Triton source of a schedule, from its tables and its plan alone: a kernel per stage of a fused kernel.

`source(schedule, phase)` renders templates/kernels.py.j2. Kernels address values in the schedule's own
layouts, so that the memory image is the schedule's, byte by byte; `Launch` says which buffers a kernel takes.
A kernel has one program per task of the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mapper.schedule.tables import Block, Phase, Schedule
from mapper_gpu.triton_names import Parameters

if TYPE_CHECKING:
    import jinja2

from mapper_gpu.hardware import Gpu

Json = Any
JOIN, STAGE = 15, 16
"""Where a step's immediates hold its tile's number among merges, and its kernel's stage (columns.FIELDS)."""


@dataclass(frozen=True)
class Stage:
    """The tasks of one stage of a kernel: its record in the plan, the programs of its tasks (those of the
    first stage by lane, then by split), how many tasks there are, and the coordinates of the first."""

    name: str
    record: Json
    kind: str
    programs: tuple[Json, ...]
    tasks: int
    number: int


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's function, its programs, the buffers of its parameters and their formats; the
    number of its stage, and the modelled seconds and HBM bytes of all stages of its fused kernel."""

    kernel: str
    grid: int
    buffers: tuple[int, ...]
    formats: tuple[str, ...]
    warps: int
    stages: int
    number: int
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Source:
    """The text of a phase's kernels, and its launches: per block, how often, and what."""

    text: str
    blocks: tuple[tuple[int, tuple[Launch, ...]], ...]


@dataclass(frozen=True)
class Setting:
    """What the writer of a kernel needs to know beside the stage: batch and tokens of the phase, the first
    byte of every value, and the machine."""

    batch: int
    tokens: int
    chips: int
    offsets: Mapping[str, int]
    gpu: Gpu

    def stride(self, first: str, second: str, item: int = 4) -> int:
        """Elements between two values of the same kind."""
        return (self.offsets[second] - self.offsets[first]) // item


def source(schedule: Schedule, phase: Phase) -> Source:
    """Kernels and launches of a phase. Raises LoweringError where an instruction has no source."""
    from mapper.machine import parse
    from mapper_gpu.hardware import gpu
    from mapper_gpu.triton_kernels import write
    from mapper_gpu.triton_scope import refuse_unknown

    numbers = _numbers(schedule, phase)
    offset, _ = extents(schedule)
    tokens = schedule.programs[phase].sequence
    setting = Setting(
        int(schedule.plan["batch"]), tokens, schedule.chips, {v: offset[n] for v, n in numbers.items()},
        gpu(parse(schedule.machine_toml, schedule.machine)),
    )  # fmt: skip
    for program in schedule.plan["programs"][phase]:
        refuse_unknown(program)
    kernels: list[dict[str, Any]] = []
    blocks: list[tuple[int, tuple[Launch, ...]]] = []
    records = schedule.plan["blocks"][phase]
    for block, record in zip(schedule.programs[phase].blocks, records, strict=True):
        launches: list[Launch] = []
        for stage in stages(schedule, phase, block, record["kernels"], len(kernels)):
            parameters = Parameters()
            written = write(stage, parameters, setting)
            kernels.append(written)
            launches.append(Launch(
                written["name"], stage.tasks,
                tuple(numbers[value] for value, _ in parameters.known), tuple(parameters.formats.values()),
                written["warps"], written["stages"], stage.number,
                float(stage.record["seconds"]), float(stage.record["hbm_bytes"]),
            ))  # fmt: skip
        blocks.append((block.repeat, tuple(launches)))
    text = environment().get_template("kernels.py.j2").render(
        kernels=kernels, phase=phase, machine=schedule.machine, batch=setting.batch, tokens=tokens,
        context=schedule.request.context,
        blocks=[(block.name, repeat, launches) for block, (repeat, launches)
                in zip(schedule.programs[phase].blocks, blocks, strict=True)],
    )  # fmt: skip
    return Source(text, tuple(blocks))


def extents(schedule: Schedule) -> tuple[list[int], list[int]]:
    """(first byte, bytes) of every buffer."""
    first, size = (np.asarray(schedule.buffers.column(c).to_numpy()) for c in ("offset", "bytes"))
    return first.tolist(), size.tolist()


def _numbers(schedule: Schedule, phase: Phase) -> dict[str, int]:
    """The buffer on chip 0 of every value of a phase."""
    found: dict[str, int] = {}
    names: list[Any]
    programs: list[Any]
    names, programs = (schedule.buffers.column(c).to_pylist() for c in ("value", "program"))
    for number, (name, program) in enumerate(zip(names, programs, strict=True)):
        if program in ("", phase):
            found.setdefault(name, number)
    return found


def stages(
    schedule: Schedule, phase: Phase, block: Block, records: Sequence[Json], before: int
) -> Iterator[Stage]:
    """The stages of a block's kernels, in order. `before` kernels have been written already."""
    offsets, flat = block.steps.args()
    rows = np.array([flat[o : o + STAGE + 1] for o in offsets[:-1]])
    programs = schedule.plan["programs"][phase]
    for number, record in enumerate(records):
        mine = rows[rows[:, 1] == number]
        order = sorted(set(mine[:, STAGE].tolist()))
        for place, key in enumerate(order):
            tasks = mine[mine[:, STAGE] == key]
            used = sorted(set(tasks[:, 0].tolist()))
            kind = programs[used[0]]["kind"]
            name = f"k{before}_{_name(record['name'])}" + ("_merge" if kind.endswith("merge") else "")
            before += 1
            yield Stage(name, record, kind, tuple(programs[i] for i in used),
                        len(tasks) // schedule.chips, place)  # fmt: skip


def _name(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)


@cache
def environment() -> jinja2.Environment:
    """The templates of this package."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False,
    )  # fmt: skip
