"""The schedule of what was lowered: tables of ops and buffers, the plan, ports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from mapper.ir.graph import Graph
from mapper.machine import Machine
from mapper.schedule.tables import (
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    ModelRef,
    Phase,
    Port,
    Program,
    Request,
    Schedule,
)
from mapper_gpu.extractor import Program as Work
from mapper_gpu.hardware import Gpu
from mapper_gpu.kernel import Kernel
from mapper_gpu.nodes import HEAVY
from mapper_gpu.storage import NUMPY, Memory, Storage
from mapper_gpu.tasks import OPCODES
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


def schedule_of(
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
    """The schedule of all phases that were lowered. `form`: the type of products' operands."""
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
        plan=_plan(chip, request, memory, found, fused, form),
        provenance={"backend": "mapper_gpu"},
    )


def _plan(
    chip: Gpu,
    request: Request,
    memory: Memory,
    found: list[Lowered],
    fused: dict[str, int | list[int]],
    form: str,
) -> dict[str, Any]:
    """What checks, executor and explanations read beside the tables."""
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
        "batch": found[0].work.batch,
        "programs": {item.phase: item.programs for item in found},
        "blocks": {item.phase: item.described for item in found},
    }
    if memory.stages > 1:
        plan["stages"] = memory.stages
    if memory.replicas > 1:
        plan["replicas"] = memory.replicas
    if form != "f32":
        kind = NUMPY[form]
        kept = dict.fromkeys(("matmul", "key_cache", "value_cache", "table"), kind)
        plan["arithmetic"] = {**kept, "accumulate": "float32"}
    return plan


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
    batch, replicas = found[0].work.batch, memory.replicas
    several: dict[str, Any] = {"replicas": replicas} if replicas > 1 else {}
    for name, s in sorted(states.items(), key=lambda p: p[1].first):
        copies = max(1, memory.tensor * s.width // s.panel // _kv_heads(found[0], name))
        heads = memory.tensor * s.width // s.panel // copies
        shape = (request.batch, heads, s.rows // batch, s.panel)
        layout = {"kind": "cache", "copies": copies, **several}
        ports.append(Port(name, "state", NUMPY[s.dtype], shape, _buffers(s, chips), layout,
                          ["zeros", list(shape), NUMPY[s.dtype]]))  # fmt: skip
    for item in found:
        work = item.work
        logits = item.storages[-1][work.logits]
        ids, past = (
            tuple(b for here in item.storages for b in _buffers(here[v], chips))
            for v in ("input_ids", "past_length")
        )
        rows = (request.batch, work.tokens)
        shared = {"kind": "copies"} if not several else {"kind": "sequences", "group": chips, **several}
        ports.append(Port("input_ids", "input", "int64", rows, ids, shared, None, (item.phase,)))
        ports.append(Port("past_length", "input", "int64", (), past, {"kind": "copies"}, None, (item.phase,)))
        layout = {"kind": "panels", "panel": logits.panel, **several}
        shape3 = (*rows, logits.width)
        firsts = tuple(range(logits.first, logits.first + chips, memory.tensor))
        ports.append(Port("logits", "output", "float32", shape3, firsts, layout, None, (item.phase,)))
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
