"""Lowering: serving graphs -> sections -> kernels -> storages -> grids -> blocks -> Schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from mapper.errors import CapacityError, LoweringError
from mapper.ir.graph import Graph
from mapper.machine import Machine
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    ModelRef,
    Phase,
    Port,
    Program,
    Request,
    Schedule,
)  # fmt: skip
from mapper_gpu.columns import between, block_of, columns_of, cycles
from mapper_gpu.describe import describe
from mapper_gpu.extract import extract
from mapper_gpu.extractor import Extracted
from mapper_gpu.extractor import Program as Work
from mapper_gpu.flash import ACCUMULATORS
from mapper_gpu.grid import OPCODES, Maker
from mapper_gpu.hardware import Gpu, gpu
from mapper_gpu.kernel import Kernel, kernels_of
from mapper_gpu.nodes import EXPERTS, HEAVY, Node
from mapper_gpu.partition import partition
from mapper_gpu.pipeline import Degrees, cut
from mapper_gpu.product import lane_width
from mapper_gpu.storage import NUMPY, Memory, Storage
from mapper_gpu.weights import Weights


@dataclass
class Lowered:
    """One phase: its sections with the kernels and the stage of each, and the storage of each value by name,
    stage by stage."""

    phase: Phase
    work: Work
    kernels: list[tuple[Kernel, ...]]
    stages: list[int]
    storages: list[dict[str, Storage]] = field(default_factory=list)
    programs: list[Any] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    described: list[Any] = field(default_factory=list)
    cycles: int = 0
    other: int = 0


def lower(graphs: Mapping[Phase, Graph], source: Graph, machine: Machine, request: Request,
          degrees: Degrees, form: str) -> Schedule:  # fmt: skip
    """The schedule of serving graphs shared out by `degrees`, with weights in `form`. Raises LoweringError,
    CapacityError."""
    chip, chips = gpu(machine), degrees.tensor
    memory = Memory(chips * degrees.pipeline, degrees.pipeline)
    phases: list[tuple[Work, list[tuple[Kernel, ...]]]] = []
    for phase, graph in graphs.items():
        tokens = request.prompt if phase == "prefill" else 1
        work = partition(extract(graph, phase, request.batch, tokens, request.context, form), chips)
        work = replace(work, sections=tuple(_operands(e, form) for e in work.sections))
        phases.append((work, [kernels_of(chip, e.section, chips) for e in work.sections]))
        _registers(phases[-1][1])
    staged = cut(phases, degrees, chip, form)
    found = [Lowered(p, s.work, s.kernels, s.stages) for p, s in zip(graphs, staged, strict=True)]
    weights = _weights(graphs, found, memory, form)
    states = _states(found[0], memory, form)
    for item in found:
        _values(item, memory, states)
    for item in found:
        _blocks(item, chip, memory, weights, states)
    _fits(chip, memory, request)
    return _schedule(graphs, source, machine, chip, request, memory, found, weights, states, form)


def _weights(graphs: Mapping[Phase, Graph], found: list[Lowered], memory: Memory, form: str) -> list[Weights]:
    """The weights of each stage."""
    weights = [Weights(graphs, memory.group, form, s * memory.group) for s in range(memory.stages)]
    for item in found:
        for own in weights:
            own.symbols |= item.work.constants
        for e, kernels, stage in zip(item.work.sections, item.kernels, item.stages, strict=True):
            weights[stage].need(item.phase, e, kernels)
    for own in weights:
        own.allocate(memory)
    return weights


def _registers(kernels: list[tuple[Kernel, ...]]) -> None:
    """Raises LoweringError where one token's heads of latent attention are too many for an SM."""
    for k in (k for mine in kernels for k in mine):
        a = k.attention
        if a is not None and a.shared and a.group * a.value_dim > ACCUMULATORS:
            raise LoweringError(
                f"gpu: latent attention of {a.group} heads on one chip: an SM accumulates "
                f"{ACCUMULATORS // a.value_dim} of {a.value_dim} columns; more --chips share them"
            )


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
            states: Mapping[str, Storage]) -> None:  # fmt: skip
    chips = memory.group
    at, before = int(cycles(chip, chip.step)), -1
    item.other = at
    gap = between(chip, chip.megakernel)
    parts = zip(item.work.sections, item.kernels, item.stages, strict=True)
    for number, (e, kernels, stage) in enumerate(parts):
        own, base = weights[stage], stage * chips
        storage = {**item.storages[stage], **_cached(e, states), **own.lookup(item.phase, e)}

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
            chips,
            label,
            new,
            base,
        )
        grids = [maker.grid(k, i) for i, k in enumerate(kernels)]
        counted = block_of(chip, e.section.name, grids, chips, at, e.section.count, before, base)
        before = counted.last
        block = replace(counted.block, bindings=_bindings(item, e, stage, own, states, chips))
        item.blocks.append(block)
        item.described.append({
            "block": e.section.name, "counters": counted.counters,
            **({"stage": stage} if memory.stages > 1 else {}),
            "kernels": [describe(k, e.section, item.phase) for k in kernels],
        })  # fmt: skip
        other = columns_of(chip, grids, chips, not chip.megakernel, number == 0)
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


def _schedule(
    graphs: Mapping[Phase, Graph],
    source: Graph,
    machine: Machine,
    chip: Gpu,
    request: Request,
    memory: Memory,
    found: list[Lowered],
    weights: list[Weights],
    states: Mapping[str, Storage],
    form: str,
) -> Schedule:
    ops: list[dict[str, Any]] = []
    fused: dict[str, int | list[int]] = {}
    programs: dict[str, Program] = {}
    for item in found:
        base = len(ops)
        for row in item.work.ops:
            operands = [o + base if o >= 0 else -1 for o in row["operands"]]
            ops.append({**row, "id": len(ops), "operands": operands})
        fused |= {
            str(k + base): [b + base for b in v] if isinstance(v, list) else v + base
            for k, v in _fused(item).items()
        }
        blocks = tuple(_based(b, base) for b in item.blocks)
        programs[item.phase] = Program(item.phase, blocks, item.cycles, item.work.tokens)
    plan: dict[str, Any] = {
        "style": "megakernel" if chip.megakernel else "graph",
        "styles": {
            item.phase: {
                ("graph" if g else "megakernel"): (item.cycles if g != chip.megakernel else item.other)
                / chip.clock
                for g in (True, False)
            }
            for item in found
        },
        "gather": list(OPCODES),
        "commutative": [],
        "fused": fused,
        "batch": request.batch,
        "programs": {item.phase: item.programs for item in found},
        "blocks": {item.phase: item.described for item in found},
    }
    if memory.stages > 1:
        plan["stages"] = memory.stages
    if form != "f32":
        kind = NUMPY[form]
        kept = dict.fromkeys(("matmul", "key_cache", "value_cache", "table"), kind)
        plan["arithmetic"] = {**kept, "accumulate": "float32"}
    path = "" if source.path is None else str(source.path)
    chips = memory.chips
    return Schedule(
        target="gpu",
        machine=machine.name,
        machine_toml=machine.text,
        chips=chips,
        request=request,
        model=ModelRef(path, source.sha256, dict.fromkeys(source.files, ""), source.params, source.layers),
        clock_hz=chip.clock,
        units=tuple(
            f"gpu{c}.{u}" for c in range(chips) for u in [*(f"sm{i}" for i in range(chip.sms)), "link"]
        ),
        memories=tuple((f"hbm.{c}", int(chip.capacity)) for c in range(chips)),
        opcodes=OPCODES,
        programs=programs,
        buffers=pa.Table.from_pydict(memory.rows(), schema=BUFFER_SCHEMA),
        ops=pa.Table.from_pylist(ops, schema=OP_SCHEMA),
        ports=tuple(_ports(found, memory, weights, states, request)),
        weights={k: v for own in weights for k, v in own.files().items()},
        constants={k: v for own in weights for k, v in own.constants().items()},
        roles=source.roles,
        plan=plan,
        provenance={"backend": "mapper_gpu"},
    )


def _based(block: Block, base: int) -> Block:
    """The block with ops numbered in the schedule's table."""
    if not base:
        return block
    table = block.steps.table
    at = table.schema.get_field_index("op")
    moved = [o + base if o >= 0 else -1 for o in block.steps.column("op").tolist()]
    table = table.set_column(at, table.schema.field(at), pa.array(moved, pa.int32()))
    return replace(block, steps=replace(block.steps, table=table))


def _fused(item: Lowered) -> dict[int, int | list[int]]:
    """Op -> op whose steps do its work, for ops without steps of their own; what every lane of a product
    repeats -> the ops of all lanes."""
    own: set[int] = set()
    pairs: list[tuple[int, list[int]]] = []
    for e, kernels in zip(item.work.sections, item.kernels, strict=True):
        nodes = e.section.nodes
        for k in kernels:
            heads = [nodes[b.linears[0]].op for b in k.branches] or [_doer(nodes, k)]
            own |= set(heads)
            for b in k.branches:
                pairs += [(nodes[i].op, [nodes[b.linears[0]].op]) for i in (*b.linears, *b.nodes)]
            pairs += [(nodes[i].op, list(dict.fromkeys(heads))) for i in k.nodes]
    found: dict[int, int | list[int]] = {}
    for op, by in pairs:
        if op not in own and op >= 0:
            found.setdefault(op, by[0] if len(by) == 1 else by)
    return found


def _doer(nodes: Any, k: Kernel) -> int:
    heavy = [i for i in k.nodes if nodes[i].kind in HEAVY]
    return int(nodes[heavy[0] if heavy else k.nodes[0]].op)


def _ports(found: list[Lowered], memory: Memory, weights: list[Weights], states: Mapping[str, Storage],
           request: Request) -> list[Port]:  # fmt: skip
    chips = memory.group
    ports = [port for own in weights for port in own.ports()]
    for name, s in sorted(states.items(), key=lambda p: p[1].first):
        copies = max(1, chips * s.width // s.panel // _kv_heads(found[0], name))
        heads = chips * s.width // s.panel // copies
        shape = (request.batch, heads, s.rows // request.batch, s.panel)
        layout = {"kind": "cache", "copies": copies}
        ports.append(Port(name, "state", NUMPY[s.dtype], shape, _buffers(s, chips), layout,
                          ["zeros", list(shape), NUMPY[s.dtype]]))  # fmt: skip
    for item in found:
        work = item.work
        logits = item.storages[-1][work.logits]
        ids, past = (
            tuple(b for here in item.storages for b in _buffers(here[v], chips))
            for v in ("input_ids", "past_length")
        )
        same = {"kind": "copies"}
        rows = (work.batch, work.tokens)
        ports.append(Port("input_ids", "input", "int64", rows, ids, same, None, (item.phase,)))
        ports.append(Port("past_length", "input", "int64", (), past, same, None, (item.phase,)))
        layout = {"kind": "panels", "panel": logits.panel}
        shape3 = (*rows, logits.width)
        ports.append(
            Port("logits", "output", "float32", shape3, (logits.first,), layout, None, (item.phase,))
        )
    return ports


def _kv_heads(item: Lowered, cache: str) -> int:
    """Heads of a cache on all chips, copies not counted."""
    for e in item.work.sections:
        for names in (
            *e.states.values(),
            *((n.attr("cache"),) for n in e.section.nodes if n.kind == "append"),
        ):
            if cache in names:
                return next(int(n.attr("all_heads")) for n in e.section.nodes if n.kind == "attention")
    raise KeyError(cache)


def _buffers(s: Storage, chips: int) -> tuple[int, ...]:
    return tuple(range(s.first, s.first + chips))
