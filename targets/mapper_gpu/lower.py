"""Lowering: serving graphs -> sections -> kernels -> storages -> grids -> blocks -> Schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from mapper.errors import CapacityError
from mapper.ir.graph import Graph
from mapper.machine import Machine
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    Phase,
    Request,
    Schedule,
)  # fmt: skip
from mapper_gpu.assemble import Lowered, schedule_of
from mapper_gpu.columns import between, block_of, columns_of, cycles
from mapper_gpu.degrees import Degrees
from mapper_gpu.describe import describe
from mapper_gpu.extract import extract
from mapper_gpu.extractor import Extracted
from mapper_gpu.extractor import Program as Work
from mapper_gpu.grid import Maker
from mapper_gpu.hardware import Gpu, gpu
from mapper_gpu.kernel import Kernel, kernels_of
from mapper_gpu.nodes import EXPERTS, Node
from mapper_gpu.partition import partition
from mapper_gpu.pipeline import cut, grouped
from mapper_gpu.product import lane_width
from mapper_gpu.storage import Memory, Storage
from mapper_gpu.weights import Weights


def lower(graphs: Mapping[Phase, Graph], source: Graph, machine: Machine, request: Request,
          degrees: Degrees, form: str) -> Schedule:  # fmt: skip
    """The schedule of serving graphs shared out by `degrees`, with weights in `form`. Raises LoweringError,
    CapacityError."""
    chip, chips = gpu(machine), degrees.tensor
    memory, batch = Memory(degrees.chips, degrees.pipeline, degrees.tensor), request.batch // degrees.data
    grouped(degrees, chip)
    phases: list[tuple[Work, list[tuple[Kernel, ...]]]] = []
    for phase, graph in graphs.items():
        tokens = request.prompt if phase == "prefill" else 1
        work = partition(extract(graph, phase, batch, tokens, request.context, form), degrees)
        work = replace(work, sections=tuple(_operands(e, form) for e in work.sections))
        phases.append((work, [kernels_of(chip, e.section, chips) for e in work.sections]))
    staged = cut(phases, degrees, chip, form)
    found = [Lowered(p, s.work, s.kernels, s.stages) for p, s in zip(graphs, staged, strict=True)]
    weights = _weights(graphs, found, memory, form)
    states = _states(found[0], memory, form)
    for item in found:
        _values(item, memory, states)
    for item in found:
        _blocks(item, chip, memory, weights, states, degrees)
    _fits(chip, memory, request)
    return schedule_of(source, machine, chip, request, memory, found, weights, states, form)


def _weights(graphs: Mapping[Phase, Graph], found: list[Lowered], memory: Memory, form: str) -> list[Weights]:
    """The weights of each stage."""
    weights = [Weights(graphs, memory, form, s * memory.group) for s in range(memory.stages)]
    for item in found:
        for mine in weights:
            mine.symbols |= item.work.constants
        for e, kernels, stage in zip(item.work.sections, item.kernels, item.stages, strict=True):
            weights[stage].need(item.phase, e, kernels)
    for mine in weights:
        mine.allocate(memory)
    return weights


def _operands(e: Extracted, form: str) -> Extracted:
    """Values that only products and attention read are stored in the format that these round them to."""
    users: dict[str, set[str]] = {}
    for node in e.section.nodes:
        for i, v in enumerate(node.inputs):
            users.setdefault(v, set()).add("product" if _multiplied(node, i) else "other")
    made = {n.output for n in e.section.nodes}
    values = {
        name: replace(v, dtype=form)
        if not v.state and name in made and users.get(name) == {"product"} and name not in e.section.outputs
        else v
        for name, v in e.section.values.items()
    }
    return replace(e, section=replace(e.section, values=values))


def _multiplied(node: Node, i: int) -> bool:
    """Whether input i of a node is an operand of products alone, which rounds it."""
    queries = 2 if node.attr("latent") else 1
    if node.kind == "dispatch":  # into a product; where rows are weighed before, that rounds them
        return i == 0 and len(node.inputs) == 2
    return node.kind in ("linear", "attention", *EXPERTS) and i < (queries if node.kind == "attention" else 1)


def _states(item: Lowered, memory: Memory, form: str) -> dict[str, Storage]:
    """A storage per cache: rows are batch x positions, the width its heads on one chip."""
    found: dict[str, Storage] = {}
    for e, stage in zip(item.work.sections, item.stages, strict=True):
        names = {v: n for n in e.section.nodes if n.kind == "append" for v in [n.attr("cache")]}
        for name in names:
            value = e.section.values.get(f"{name}@") or e.section.values[name]
            node = names[name]
            width = e.section.values[node.inputs[0]].width
            for slot in e.states.get(name, (name,)):
                made = Storage(slot, value.rows, width, form, node.attr("head"))
                found[slot] = memory.add(replace(made, base=stage * memory.group))
    return found


def _panels(item: Lowered) -> dict[str, int]:
    """The panel width of each value: what all tiles that write it are multiples of. Values that take each
    other's place from repetition to repetition have one layout."""
    found: dict[str, int] = {}
    for e, kernels in zip(item.work.sections, item.kernels, strict=True):
        for k in kernels:
            for b in k.branches:
                assert k.tile is not None
                for v in b.stores:
                    if not v.endswith("@"):
                        found[v] = math.gcd(lane_width(b.lane, k.tile.n), b.lane.n, e.section.values[v].width)
            if k.attention is not None:
                for v in k.stores:
                    found[v] = k.attention.group * k.attention.value_dim
            if k.expert_tile is not None:
                for v in k.stores:
                    found[v] = math.gcd(k.expert_tile.n, e.section.values[v].width)
            if k.kind == "heads":
                for v in k.stores:
                    found[v] = max(1, e.section.values[v].head)
        for c in e.carries:
            whole = math.gcd(found.get(c.initial, 0), found.get(c.yielded, 0))
            for v in (c.initial, c.argument, c.yielded, c.result):
                if whole:
                    found[v] = whole
    return found


def _values(item: Lowered, memory: Memory, states: Mapping[str, Storage]) -> None:
    work, panels = item.work, _panels(item)
    for stage in range(memory.stages):
        base = stage * memory.group
        ids = Storage("input_ids", work.batch * work.tokens, 1, "i64", program=item.phase, base=base)
        past = Storage("past_length", 1, 1, "i64", program=item.phase, base=base)
        item.storages.append({"input_ids": memory.add(ids), "past_length": memory.add(past)})
    for number, (e, kernels, stage) in enumerate(zip(work.sections, item.kernels, item.stages, strict=True)):
        here, base = item.storages[stage], stage * memory.group
        for node in e.section.nodes:
            if node.kind == "receive":
                here[node.inputs[0]] = item.storages[node.attr("from")][node.attr("value")]
        for c in e.carries:
            a = here[c.initial]
            b = Storage(f"{c.argument}.next", a.rows, a.width, a.dtype, a.panel, item.phase, base=base)
            memory.add(b)
            here[c.argument], here[c.yielded] = a, b
            here[c.result] = b if e.section.count % 2 else a
        for k in kernels:
            for v in k.stores:
                if v in here or v.endswith("@"):
                    continue
                value = e.section.values[v]
                name = f"{item.phase}.{number}.{v}"
                panel = panels.get(v, 0)
                made = Storage(name, value.rows, value.width, value.dtype, panel, item.phase, base=base)
                here[v] = memory.add(made)
    for here in item.storages:
        here.update(states)


def _blocks(item: Lowered, chip: Gpu, memory: Memory, weights: list[Weights],
            states: Mapping[str, Storage], degrees: Degrees) -> None:  # fmt: skip
    chips = memory.group
    at, before = int(cycles(chip, chip.step)), -1
    item.other = at
    gap = between(chip, chip.megakernel)
    parts = zip(item.work.sections, item.kernels, item.stages, strict=True)
    for number, (e, kernels, stage) in enumerate(parts):
        mine, base = weights[stage], stage * chips
        storage = {**item.storages[stage], **_cached(e, states), **mine.lookup(item.phase, e)}

        def new(made: Storage, known: dict[str, Storage] = storage, base: int = base) -> None:
            made.program, made.base = item.phase, base
            known[made.name] = memory.add(made)

        label = f"{item.phase}.{number}"
        maker = Maker(
            chip,
            e.section,
            storage,
            item.programs,
            item.work.batch,
            item.work.tokens,
            degrees,
            label,
            new,
            base,
        )
        grids = [maker.grid(k, i) for i, k in enumerate(kernels)]
        counted = block_of(chip, e.section.name, grids, degrees, at, e.section.count, before, base)
        before = counted.last
        block = replace(counted.block, bindings=_bindings(item, e, stage, mine, states, chips))
        item.blocks.append(block)
        item.described.append({
            "block": e.section.name, "counters": counted.counters,
            **({"stage": stage} if memory.stages > 1 else {}),
            "kernels": [describe(k, e.section, item.phase) for k in kernels],
        })  # fmt: skip
        other = columns_of(chip, grids, degrees, not chip.megakernel, number == 0, base)
        pause = between(chip, not chip.megakernel)
        item.other += e.section.count * (other.end + pause) - (
            pause if number + 1 == len(item.kernels) else 0
        )
        length = int((block.steps.column("start") + block.steps.column("duration")).max())
        end = block.start + (block.repeat - 1) * block.period + length
        at = end + gap
        item.cycles = end


def _cached(e: Extracted, states: Mapping[str, Storage]) -> dict[str, Storage]:
    """The caches of a section's first repetition by the names that its nodes use."""
    return {name: states[names[0]] for name, names in e.states.items() if names[0] in states}


def _bindings(item: Lowered, e: Extracted, stage: int, weights: Weights, states: Mapping[str, Storage],
              chips: int) -> pa.Table | None:  # fmt: skip
    if e.section.count == 1:
        return None
    slots: list[tuple[Storage, list[Storage]]] = []
    for c in e.carries:
        a, b = (item.storages[stage][v] for v in (c.argument, c.yielded))
        turns = [(a, b)[r % 2] for r in range(e.section.count)]
        slots += [(a, turns), (b, [b if t is a else a for t in turns])]
    slots += [(s, [states[n] for n in e.states[name]]) for name, s in _cached(e, states).items()]
    slots += weights.slots(item.phase, e)
    rows = [
        (slot.first + chip, r, other.first + chip)
        for slot, others in slots
        for r, other in enumerate(others)
        for chip in range(chips)
        if other is not slot
    ]
    columns = [pa.array([row[i] for row in rows], pa.int32()) for i in range(3)]
    return pa.Table.from_arrays(columns, schema=BINDING_SCHEMA)


def _fits(chip: Gpu, memory: Memory, request: Request) -> None:
    room = int(chip.capacity * (1 - chip.reserved))
    if memory.top > room:
        raise CapacityError(
            f"gpu: weights, caches and activations take {memory.top} bytes of each of {memory.chips} chips; "
            f"{chip.name} has {room} for them"
        )
