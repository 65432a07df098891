"""Pipeline parallelism: layers cut into stages, each on its own group of chips; what crosses is sent.

A step passes the stages in turn, so that its latency is their sum. With as many micro-batches in flight as
there are stages, one leaves per time of the slowest stage (Huang et al., "GPipe", 2019): stages are cut so
that this is least, among the cuts whose weights and caches fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mapper.errors import LoweringError
from mapper_gpu.collective import SEND, Collective, send
from mapper_gpu.degrees import Degrees
from mapper_gpu.extractor import Extracted, Program
from mapper_gpu.hardware import Gpu, element_bytes
from mapper_gpu.kernel import Kernel
from mapper_gpu.nodes import Node, Section, Value
from mapper_gpu.product import Timed

ENTERS = ".entering"
"""Ends the name of a carried value where it enters a later part of a repeat: its own is that of what leaves
it."""
Part = tuple[int, int, int]
"""A stretch of a section's repetitions: the section's number, the first repetition, the end."""


def grouped(degrees: Degrees, gpu: Gpu) -> None:
    """Raises LoweringError where chips that add up their parts, or replicas that share experts, straddle link
    domains that are larger than they are, or fill the last of several in part."""
    domain = gpu.domain
    if degrees.chips <= domain:
        return
    tensor, group = degrees.tensor, degrees.group
    if tensor < domain and domain % tensor:
        raise LoweringError(
            f"gpu: groups of {tensor} chips straddle the link domains of {domain} of {gpu.name}"
        )
    if degrees.spread > 1 and (domain % group if group < domain else group % domain):
        raise LoweringError(
            f"gpu: the {group} chips of {degrees.data} replicas that share experts are not whole link "
            f"domains of {domain} of {gpu.name}, nor whole parts of one"
        )


@dataclass(frozen=True)
class Staged:
    """A phase's sections with the kernels and the stage of each, in order."""

    work: Program
    kernels: list[tuple[Kernel, ...]]
    stages: list[int]


def cut(
    phases: Sequence[tuple[Program, list[tuple[Kernel, ...]]]], degrees: Degrees, gpu: Gpu, form: str
) -> list[Staged]:
    """Every phase cut at the same layers, where the last phase (decode, where there is one) takes least time.

    Raises LoweringError where there are fewer layers than stages, or the phases differ."""
    if degrees.pipeline == 1:
        return [Staged(work, kernels, [0] * len(kernels)) for work, kernels in phases]
    shapes = {tuple(e.section.count for e in work.sections) for work, _ in phases}
    if len(shapes) > 1:
        raise LoweringError("gpu: prefill and decode have different layers, which a pipeline cannot share")
    parts = _parts(*phases[-1], degrees.pipeline, gpu, form)
    return [_staged(work, kernels, parts, degrees.group, gpu) for work, kernels in phases]


def _parts(
    work: Program, kernels: list[tuple[Kernel, ...]], stages: int, gpu: Gpu, form: str
) -> list[list[Part]]:
    """The parts of each stage: those whose slowest stage is fastest, of cuts that fit where any does."""
    gap = 0.0 if gpu.megakernel else gpu.gap
    units: list[tuple[int, int]] = []
    seconds: list[float] = []
    held: list[float] = []
    for number, (e, mine) in enumerate(zip(work.sections, kernels, strict=True)):
        time, size = sum(k.timed.seconds + gap for k in mine), _bytes(e, form)
        for r in range(e.section.count):
            units.append((number, r))
            seconds.append(time)
            held.append(size)
    if len(units) < stages:
        raise LoweringError(
            f"gpu: {len(units)} layers, embedding and head counted, for {stages} pipeline stages"
        )
    ends = _balanced(seconds, held, stages, gpu.capacity * (1 - gpu.reserved))
    found: list[list[Part]] = []
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        mine_: dict[int, tuple[int, int]] = {}
        for number, r in units[first:last]:
            mine_[number] = (mine_.get(number, (r, r))[0], r + 1)
        found.append([(number, a, b) for number, (a, b) in mine_.items()])
    return found


def _bytes(e: Extracted, form: str) -> float:
    """Bytes of a repetition's weights and caches on one chip."""
    weights = sum(w.stored for n in e.section.nodes for w in n.weights)
    caches = {n.attr("cache"): e.section.values[n.inputs[0]].width for n in e.section.nodes
              if n.kind == "append"}  # fmt: skip
    rows = {name: (e.section.values.get(f"{name}@") or e.section.values[name]).rows for name in caches}
    return weights + sum(rows[name] * width for name, width in caches.items()) * element_bytes(form)


def _balanced(seconds: Sequence[float], held: Sequence[float], stages: int, room: float) -> list[int]:
    """Ends of contiguous stretches, none empty, whose largest time is least: dynamic programming over the
    last cut. A stretch that does not fit counts as longer than any that does."""
    time, size = ([0.0, *accumulate(v)] for v in (seconds, held))
    n, never = len(seconds), 1.0 + 2 * time[-1]
    best = [[0.0] + [float("inf")] * n]
    last: list[list[int]] = []
    for _ in range(stages):
        row, at = [float("inf")] * (n + 1), [0] * (n + 1)
        for end in range(1, n + 1):
            for begin in range(end):
                own = time[end] - time[begin] + (never if size[end] - size[begin] > room else 0.0)
                slowest = max(best[-1][begin], own)
                if slowest < row[end]:
                    row[end], at[end] = slowest, begin
        best.append(row)
        last.append(at)
    ends = [n]
    for at in reversed(last[1:]):
        ends.append(at[ends[-1]])
    return ends[::-1]


def _staged(
    work: Program, kernels: list[tuple[Kernel, ...]], parts: list[list[Part]], group: int, gpu: Gpu
) -> Staged:
    sections: list[Extracted] = []
    made: list[tuple[Kernel, ...]] = []
    stages: list[int] = []
    home: dict[str, tuple[int, Value]] = {}
    for stage, mine in enumerate(parts):
        here = [(_part(work.sections[n], a, b), kernels[n]) for n, a, b in mine]
        moved = _missing(here, home)
        if moved:
            section = _receive(moved, home)
            across = any(
                (home[_source(v)][0] * group + c) // gpu.domain != (stage * group + c) // gpu.domain
                for v in moved for c in range(group)
            )  # fmt: skip
            sections.append(Extracted(section, {}, {}, ()))
            made.append((_kernel(section, gpu, across),))
            stages.append(stage)
            home |= {v: (stage, home[v][1]) for v in moved if v in home}
        for e, own in here:
            sections.append(e)
            made.append(own)
            stages.append(stage)
            home |= {v: (stage, e.section.values[v]) for k in own for v in k.stores}
            home |= {c.result: (stage, e.section.values[c.yielded]) for c in e.carries}
    return Staged(replace(work, sections=tuple(sections)), made, stages)


def _part(e: Extracted, first: int, last: int) -> Extracted:
    """Repetitions first .. last - 1: what a later part starts from is what the one before it ended with."""
    if (first, last) == (0, e.section.count):
        return e
    carries = tuple(replace(c, initial=c.result + ENTERS) if first else c for c in e.carries)
    return Extracted(
        replace(e.section, count=last - first),
        {k: v[first:last] for k, v in e.slots.items()},
        {k: v[first:last] for k, v in e.states.items()},
        carries,
    )


def _missing(
    here: Sequence[tuple[Extracted, tuple[Kernel, ...]]], home: dict[str, tuple[int, Value]]
) -> list[str]:
    """Values that a stage reads and an earlier one made, in order of first use."""
    found: dict[str, None] = {}
    made: set[str] = set()
    for e, kernels in here:
        inside = {c.argument for c in e.carries} | {v for k in kernels for v in k.stores}
        needed = [c.initial for c in e.carries] + [v for k in kernels for v in k.reads if v not in inside]
        found |= dict.fromkeys(v for v in needed if _source(v) in home and v not in made)
        made |= inside | {c.result for c in e.carries}
    return list(found)


def _source(name: str) -> str:
    """The name that a received value has where it is made."""
    return name.removesuffix(ENTERS)


def _from(name: str, home: dict[str, tuple[int, Value]]) -> dict[str, object]:
    return {"name": "receive", "value": _source(name), "from": home[_source(name)][0]}


def _receive(names: Sequence[str], home: dict[str, tuple[int, Value]]) -> Section:
    nodes = tuple(Node("receive", (f"{v}.sent",), v, (), _from(v, home)) for v in names)
    values = {name: home[_source(v)][1] for v in names for name in (v, f"{v}.sent")}
    return Section("receive", 1, nodes, values, frozenset(names))


def _kernel(section: Section, gpu: Gpu, across: bool) -> Kernel:
    stores = tuple(n.output for n in section.nodes)
    size = sum(section.values[v].bytes for v in stores)
    far = 2 * size
    seconds = send(gpu, size, across)
    made = Collective(SEND, seconds, size, across)
    reads = tuple(n.inputs[0] for n in section.nodes)
    timed = Timed(seconds + far / gpu.stream, 1, far, size, 0.0, 0.0, "link")
    numbers = tuple(range(len(section.nodes)))
    return Kernel("receive", "collective", numbers, reads, stores, (), timed, collective=made)
