"""From timed programs to the schedule's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from xdsl.ir import SSAValue

from mapper.ir.cost import costs as costs_of
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.machine import Machine
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    Int,
    ModelRef,
    Phase,
    Program,
    Request,
    Schedule,
    StepTable,
    step_table,
)
from mapper_lpu.instruction import Instruction
from mapper_lpu.isa import LANES, OPCODES, ROWS, UNITS
from mapper_lpu.lower import Lowered
from mapper_lpu.program import Timed
from mapper_lpu.storage import Storage

_OPCODE = {name: number for number, name in enumerate(OPCODES)}
_MEM_UNITS = 88
ACCESS_TIMING = {"mem.read": [0, -1], "mem.gather": [0, -1], "mem.write": [-1, 1], "mem.scatter": [-1, 1]}
"""A read takes place at issue; what is written can be read one cycle after issue."""
MATRICES = ("linear", "lm_head", "gated_mlp")


def _steps(instructions: Sequence[Instruction]) -> StepTable:
    ordered = sorted(instructions, key=lambda i: (i.cycle, i.unit, i.opcode, i.args))
    args = [i.args for i in ordered]
    flat = np.array([n for a in args for n in a], np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in args])]).astype(np.int64)

    def slices(mode: int) -> tuple[Int, Int, Int, Int]:
        chosen = [i for i in ordered if i.mode == mode]
        ends = np.cumsum([i.mode == mode for i in ordered])
        return (
            np.concatenate([[0], ends]).astype(np.int64),
            np.array([i.buffer for i in chosen], np.int64),
            np.array([i.row * LANES for i in chosen], np.int64),
            np.array([i.rows * LANES for i in chosen], np.int64),
        )

    return step_table(
        [i.cycle for i in ordered],
        [i.duration for i in ordered],
        [i.unit for i in ordered],
        [_OPCODE[i.opcode] for i in ordered],
        (offsets, flat),
        slices(1),
        slices(2),
        [i.ir for i in ordered],
        [LANES if i.mode else 0 for i in ordered],
        [i.flops for i in ordered],
    )


def _bindings(lowered: Lowered, steps: StepTable, repeat: int) -> pa.Table | None:
    used = set(steps.slices("reads")[1].tolist()) | set(steps.slices("writes")[1].tolist())
    rows = [
        (slot, r, buffers[r])
        for slot, buffers in sorted(lowered.bindings.items())
        if slot in used
        for r in range(repeat)
        if buffers[r] != slot
    ]
    if not rows:
        return None
    columns = list(zip(*rows, strict=True))
    return pa.table({n: list(c) for n, c in zip(BINDING_SCHEMA.names, columns, strict=True)}, BINDING_SCHEMA)


def program(phase: Phase, lowered: Lowered) -> Program:
    """The blocks of one phase."""
    timed = lowered.timed[phase]
    blocks = [Block("before", _steps(timed.before))]
    if timed.body:
        body = _steps(timed.body)
        bound = _bindings(lowered, body, timed.repeat)
        blocks.append(Block("layer", body, timed.start, timed.repeat, timed.period, bound))
        blocks.append(Block("after", _steps(timed.after)))
    return Program(phase, tuple(blocks), timed.end, lowered.tokens.get(phase, 1))


def _lifetimes(storage: Storage, timed: Mapping[Phase, Timed]) -> tuple[list[int], list[int]]:
    """First and last cycle of every temporary in its program; -1, -1 for what stays."""
    first, last = [-1] * len(storage.memory), [-1] * len(storage.memory)
    for part in timed.values():
        shift = part.start + (part.repeat - 1) * part.period
        for instructions, low, high in (
            (part.before, 0, 0),
            (part.body, part.start, shift),
            (part.after, 0, 0),
        ):
            for i in instructions:
                if i.mode and storage.temporary[i.buffer]:
                    begin, end = i.cycle + low, i.cycle + high + 1
                    first[i.buffer] = begin if first[i.buffer] < 0 else min(first[i.buffer], begin)
                    last[i.buffer] = max(last[i.buffer], end)
    return first, last


def buffers(lowered: Lowered) -> pa.Table:
    """The buffer table."""
    storage = lowered.storage
    first, last = _lifetimes(storage, lowered.timed)
    outputs = {b for p in storage.ports if p.kind == "output" for b in p.buffers}
    return pa.table(
        {
            "memory": storage.memory,
            "offset": storage.offset,
            "bytes": storage.bytes,
            "value": storage.value,
            "first": first,
            "last": [-1 if b in outputs else end for b, end in enumerate(last)],
            "program": storage.program,
        },
        BUFFER_SCHEMA,
    )


def number_ops(
    graphs: Mapping[Phase, Graph],
) -> tuple[dict[Phase, dict[DataflowOp, int]], list[tuple[Phase, DataflowOp, int]]]:
    """Row numbers of the ops table per phase, and the rows as (phase, op, repeat)."""
    ids: dict[Phase, dict[DataflowOp, int]] = {}
    rows: list[tuple[Phase, DataflowOp, int]] = []
    for phase, graph in graphs.items():
        ids[phase] = {}
        for section in graph.sections():
            for op in section.ops:
                if op.mnemonic not in ("output", "yield"):
                    ids[phase][op] = len(rows)
                    rows.append((phase, op, section.count))
    return ids, rows


def _through(graph: Graph) -> dict[SSAValue, SSAValue]:
    """Where values at the border of a repeat come from: inside from the first iteration's, outside from the
    last's.
    """
    found: dict[SSAValue, SSAValue] = {}
    for section in graph.sections():
        for carried in section.carried:
            found[carried.argument], found[carried.result] = carried.initial, carried.yielded
        for shared in section.shared:
            found[shared.argument] = shared.value
        for slot in section.outputs:
            found |= dict.fromkeys(slot.results, slot.yielded)
    return found


def _makers(op: DataflowOp, through: Mapping[SSAValue, SSAValue]) -> list[DataflowOp]:
    owners = []
    for value in op.operands:
        while value in through:
            value = through[value]
        owners.append(value.owner)
    return [o for o in owners if isinstance(o, DataflowOp)]


def _weight_bytes(graph: Graph) -> dict[DataflowOp, int]:
    """Bytes of the matrices of each op that has some, as this target stores them: in fp16, whatever their
    format."""
    found: dict[DataflowOp, int] = {}
    for section in graph.sections():
        slots = {slot: graph.weights[symbols[0]] for slot, symbols in section.table.items()}
        for op in section.ops:
            if op.mnemonic in MATRICES:
                held = (slots.get(name) or graph.weights[name] for name in op.weights().values())
                found[op] = sum(2 * weight.elements for weight in held)
    return found


def ops(
    rows: Sequence[tuple[Phase, DataflowOp, int]],
    ids: Mapping[Phase, Mapping[DataflowOp, int]],
    graphs: Mapping[Phase, Graph],
) -> pa.Table:
    """The ops table."""
    costs = {op: cost for graph in graphs.values() for op, _, cost in costs_of(graph)}
    matrices = {op: size for graph in graphs.values() for op, size in _weight_bytes(graph).items()}
    through = {phase: _through(graph) for phase, graph in graphs.items()}
    table: dict[str, list[Any]] = {name: [] for name in OP_SCHEMA.names}
    for number, (phase, op, repeat) in enumerate(rows):
        values = {
            "program": phase,
            "id": number,
            "kind": op.mnemonic,
            "name": op.node or op.mnemonic,
            "repetition": 0,
            "repeat": repeat,
            "operands": [ids[phase].get(p, -1) for p in _makers(op, through[phase])],
            "shape": list(op.result_shape()),
            "flops": costs[op].flops.value,
            "weight_bytes": matrices.get(op, costs[op].weights.value),
        }
        for name, value in values.items():
            table[name].append(value)
    return pa.table(table, OP_SCHEMA)


def assemble(
    graph: Graph,
    machine: Machine,
    request: Request,
    lowered: Lowered,
    op_table: pa.Table,
    model: ModelRef,
    plan: dict[str, Any],
) -> Schedule:
    """The whole schedule."""
    weights: dict[str, Any] = {}
    constants = dict(lowered.constants)
    for name in sorted(lowered.symbols):
        symbol = lowered.symbols[name]
        weights[name] = {
            "file": symbol.file,
            "offset": symbol.offset,
            "bytes": symbol.bytes,
            "dtype": symbol.dtype,
            "shape": list(symbol.shape),
        }
    return Schedule(
        target="lpu",
        machine=machine.name,
        machine_toml=machine.text,
        chips=1,
        request=request,
        model=model,
        clock_hz=machine.value("chip.clock"),
        units=UNITS,
        memories=tuple((name, ROWS * LANES) for name in UNITS[:_MEM_UNITS]),
        opcodes=OPCODES,
        programs={phase: program(phase, lowered) for phase in request.phases},
        buffers=buffers(lowered),
        ops=op_table,
        ports=tuple(lowered.storage.ports),
        weights=weights,
        constants=constants,
        roles=graph.roles,
        plan=plan,
    )
