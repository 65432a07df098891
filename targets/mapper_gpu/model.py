"""The time of one step of a model on a machine, per fused kernel, without writing a schedule.

It is the lowering's own fusion, tiling and timing at the granularity of distinct layers, so that a sweep
can ask for thousands of points."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from mapper.errors import CapacityError
from mapper.machine import Machine
from mapper_gpu.collective import exchange, send
from mapper_gpu.degrees import Degrees
from mapper_gpu.hardware import Gpu, element_bytes, gpu
from mapper_gpu.kernel import Kernel, kernels_of
from mapper_gpu.nodes import Node, Section
from mapper_gpu.product import Timed
from mapper_gpu.shape import ModelShape, Precision, Work, check, parameters, sections

_MOST_CHIPS = 1024


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a step: how often it runs, seconds of one run with its launch gap, HBM bytes and
    operations of one run on one chip, and what limits it."""

    name: str
    kind: str
    count: int
    seconds: float
    bytes: float
    flops: float
    limit: str

    @property
    def total(self) -> float:
        """Seconds of all runs."""
        return self.count * self.seconds


@dataclass(frozen=True)
class StepTime:
    """The time of one step [s], its kernels, and what is neither: `collectives` (part of the kernels' sum),
    `launches` (gaps, part of the sum), `bubbles` of a pipeline, `overhead` around the step."""

    seconds: float
    kernels: tuple[KernelTime, ...]
    collectives: float
    launches: float
    bubbles: float
    overhead: float
    chips: int
    bytes: float
    flops: float


def step_time(
    shape: ModelShape,
    machine: Machine | Gpu,
    work: Work,
    precision: Precision = Precision(),  # noqa: B008  (frozen)
    parallel: Degrees = Degrees(),  # noqa: B008
    overhead: bool = True,
) -> StepTime:
    """Seconds of one step of `work` (per data-parallel replica) and where they go.

    `shape.of_config(mapper.zoo.families.config(name))` makes a shape. A pipeline passes its micro-batches
    through `parallel.pipeline` stages: one token's step takes all stages in turn; `bubbles` is what a batch
    of one micro-batch leaves idle. Raises UsageError for degrees that make no sense."""
    chip = machine if isinstance(machine, Gpu) else gpu(machine)
    check(parallel, shape)
    return _step_time(shape, chip, work, precision, parallel, overhead)


@lru_cache(maxsize=1 << 14)
def _step_time(
    shape: ModelShape, chip: Gpu, work: Work, precision: Precision, parallel: Degrees, overhead: bool
) -> StepTime:
    found: list[KernelTime] = []
    for section in sections(shape, precision, parallel, work):
        for kernel in lowered(chip, section, parallel):
            gap = 0.0 if chip.megakernel else chip.gap
            t = kernel.timed
            found.append(
                KernelTime(kernel.name, kernel.kind, section.count, t.seconds + gap, t.far, t.flops, t.limit)
            )
    summed = sum(k.total for k in found)
    hops = 0.0
    if parallel.pipeline > 1:
        size = work.batch * work.tokens * shape.hidden * element_bytes(precision.activations)
        across = parallel.tensor * parallel.pipeline > chip.domain
        hops = (parallel.pipeline - 1) * send(chip, size, across)
    around = chip.step if overhead else 0.0
    runs = sum(k.count for k in found)
    return StepTime(
        seconds=summed + hops + around,
        kernels=tuple(found),
        collectives=sum(k.total for k in found if k.kind == "collective") + hops,
        launches=0.0 if chip.megakernel else runs * chip.gap,
        bubbles=(summed + hops) * (1 - 1 / parallel.pipeline),
        overhead=around,
        chips=parallel.chips,
        bytes=sum(k.count * k.bytes for k in found),
        flops=sum(k.count * k.flops for k in found),
    )


def lowered(chip: Gpu, section: Section, parallel: Degrees) -> list[Kernel]:
    """A section's kernels; all-to-all exchanges, which stand between kernels, are kernels of their own."""
    found: list[Kernel] = []
    rest: list[Node] = []
    for node in section.nodes:
        if node.kind != "alltoall":
            rest.append(node)
            continue
        found += _stretch(chip, section, rest, parallel)
        rest = []
        made = exchange(chip, parallel.data, parallel.tensor, section.values[node.output].bytes)
        timed = Timed(made.seconds, 1, 0.0, made.bytes, 0.0, 0.0, "link")
        found.append(Kernel(node.attr("name"), "collective", (), node.inputs, (node.output,), (), timed,
                            collective=made))  # fmt: skip
    return found + _stretch(chip, section, rest, parallel)


def _stretch(chip: Gpu, section: Section, nodes: list[Node], parallel: Degrees) -> list[Kernel]:
    if not nodes:
        return []
    later = {v for n in section.nodes if n not in nodes for v in n.inputs}
    made = {n.output for n in nodes}
    part = replace(section, nodes=tuple(nodes), outputs=(section.outputs | later) & made)
    return list(kernels_of(chip, part, parallel.tensor))


def weight_bytes(shape: ModelShape, precision: Precision) -> float:
    """Bytes of all weights as stored."""
    embedding = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    inner = parameters(shape) - embedding
    return inner * element_bytes(precision.weights) + embedding * element_bytes(precision.head)


def cache_bytes(shape: ModelShape, precision: Precision, batch: int, length: int) -> float:
    """Bytes of the cache of `batch` sequences of `length` tokens; a windowed layer holds its window."""
    rows = sum(min(length, layer.window) if layer.window else length for layer in shape.layers)
    return rows * batch * shape.cache_columns * element_bytes(precision.cache)


def fewest_chips(
    shape: ModelShape, machine: Machine | Gpu, precision: Precision, batch: int, length: int
) -> int:
    """The smallest power of two of chips whose memory holds weights and cache. Raises CapacityError."""
    chip = machine if isinstance(machine, Gpu) else gpu(machine)
    weights, cache = weight_bytes(shape, precision), cache_bytes(shape, precision, batch, length)
    room = chip.capacity * (1 - chip.reserved)
    chips, need = 1, weights + cache
    while chips * room < need:
        chips *= 2
        need = weights + cache * copies(shape, chips)
        if chips > _MOST_CHIPS:
            raise CapacityError(
                f"gpu: {need:.4g} bytes of weights and cache; {_MOST_CHIPS} x {chip.name} hold less"
            )
    return chips


def room_for(
    shape: ModelShape, machine: Machine | Gpu, precision: Precision, parallel: Degrees, length: int
) -> int:
    """Sequences of `length` tokens whose cache fits beside the weights on all chips of a replica."""
    chip = machine if isinstance(machine, Gpu) else gpu(machine)
    chips = parallel.tensor * parallel.pipeline
    room = chips * chip.capacity * (1 - chip.reserved) - weight_bytes(shape, precision)
    each = cache_bytes(shape, precision, 1, length) * copies(shape, parallel.tensor)
    return max(0, math.floor(room / each))


def copies(shape: ModelShape, tensor: int) -> float:
    """Of `tensor` chips that share heads, how many keep the same part of the cache: all where it has latent
    rows, which have no heads."""
    return tensor / min(tensor, 1 if shape.latent else shape.kv_heads)
