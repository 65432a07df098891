"""From programs of steps on storages to a Schedule: addresses, lifetimes, cycles, tables, ports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mapper.ir.graph import Graph
from mapper.ir.types import numpy_dtype
from mapper.machine import Machine
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    Int,
    ModelRef,
    Phase,
    Port,
    Program,
    Request,
    Schedule,
    StepTable,
    step_table,
)
from mapper_host.context import Weights
from mapper_host.layout import Interval, aligned, place
from mapper_host.lower import Lowered
from mapper_host.opcodes import OPCODES
from mapper_host.program import MEMORIES, BlockSteps, Slice, Step, Storage, Value
from mapper_host.timing import CLOCK_HZ, MOST, durations

Span = tuple[int, int]
_COMMUTATIVE = ("vector 0", "vector 2")
"""Sums and products of two vectors: see mapper.schedule.equivalence.commutes."""


@dataclass(eq=False)
class _Buffers:
    """Rows of the buffer table. A storage has one row, or, as a temporary of a repeated block, one per
    repetition."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    of: dict[Storage, list[int]] = field(default_factory=dict)
    tops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEMORIES, 0))

    def add(self, storage: Storage, offset: int, program: str, lives: Sequence[Span] = ((-1, -1),)) -> None:
        """The row or rows of a storage at `offset` of its memory, with the cycles (first, last) of each
        life."""
        self.of[storage] = []
        for first, last in lives:
            self.of[storage].append(len(self.rows))
            self.rows.append(
                {
                    "memory": MEMORIES.index(storage.memory), "offset": offset, "bytes": storage.bytes,
                    "value": storage.name, "first": first, "last": last, "program": program,
                }
            )  # fmt: skip
        self.tops[storage.memory] = max(self.tops[storage.memory], offset + aligned(storage.bytes))

    def append(self, storage: Storage, program: str) -> None:
        """A storage that lives throughout, after all others in its memory."""
        self.add(storage, self.tops[storage.memory], program)


@dataclass(frozen=True)
class _Timed:
    """Cycles of a program: durations of each block's steps, when each block starts, and the end."""

    durations: list[Int]
    starts: list[int]
    cycles: int


def schedule_of(
    graph: Graph,
    machine: Machine,
    request: Request,
    lowered: Sequence[Lowered],
    weights: Weights,
    serving: bool,
) -> Schedule:
    """The schedule of lowered programs that share weights and states."""
    buffers = _Buffers()
    for value in weights.values.values():
        buffers.append(value.storage, "")
    for state in lowered[0].states.values():
        buffers.append(state.storage, "")
    programs: dict[str, Program] = {}
    ops: list[dict[str, Any]] = []
    fused: dict[str, int] = {}
    clock_hz = _clock(lowered, machine)
    for work in lowered:
        fused |= {str(op + len(ops)): by + len(ops) for op, by in work.fused.items()}
        timed = _times(work, machine, clock_hz)
        for value in (*work.inputs.values(), *work.outputs.values()):
            if value.storage not in buffers.of:
                buffers.append(value.storage, work.phase)
        _temporaries(work, timed, buffers)
        blocks = [
            _block(b, timed.durations[i], timed.starts[i], buffers, len(ops))
            for i, b in enumerate(work.blocks)
        ]
        phase: Phase = "decode" if work.phase == "decode" else "prefill"
        programs[phase] = Program(phase, tuple(blocks), timed.cycles, _tokens(work, serving))
        ops += [_op_row(row, len(ops)) for row in work.ops.rows]
    rows = [{**row, "id": i} for i, row in enumerate(ops)]
    return Schedule(
        target="host",
        machine=machine.name,
        machine_toml=machine.text,
        chips=1,
        request=request,
        model=_model(graph),
        clock_hz=clock_hz,
        units=("cpu",),
        memories=tuple((m, buffers.tops[m]) for m in MEMORIES),
        opcodes=OPCODES,
        programs=programs,
        buffers=pa.Table.from_pylist(buffers.rows, schema=BUFFER_SCHEMA),
        ops=pa.Table.from_pylist(rows, schema=OP_SCHEMA),
        ports=tuple(_ports(graph, lowered, weights, buffers)),
        weights=_weight_files(weights),
        constants=dict(sorted(weights.arrays.items())),
        roles=graph.roles,
        plan={"kind": "kernel steps", "serving": serving, "fused": fused, "commutative": list(_COMMUTATIVE)},
        provenance={"backend": "mapper_host"},
    )


def _tokens(work: Lowered, serving: bool) -> int:
    return work.inputs["input_ids"].shape[-1] if serving else 1


def _op_row(row: dict[str, Any], base: int) -> dict[str, Any]:
    return {**row, "operands": [o + base if o >= 0 else -1 for o in row["operands"]]}


def streamed(steps: Sequence[Step]) -> Int:
    """Bytes of weights and state that each step moves (no more than it moves in all)."""
    total = [
        sum(s.bytes for s in (*step.reads, *step.writes) if s.storage.memory in ("weights", "state"))
        for step in steps
    ]
    return np.minimum(np.array(total, np.int64), np.array([s.bytes for s in steps], np.int64))


def _clock(lowered: Sequence[Lowered], machine: Machine) -> float:
    """The finest clock in which no step has more than MOST cycles."""
    clock_hz = CLOCK_HZ
    while any(d.max(initial=0) > MOST for w in lowered for d in _times(w, machine, clock_hz).durations):
        clock_hz /= 1000
    return clock_hz


def _times(work: Lowered, machine: Machine, clock_hz: float) -> _Timed:
    far = [streamed(b.steps) for b in work.blocks]
    working_set = float(sum(int(f.sum()) * b.repeat for f, b in zip(far, work.blocks, strict=True)))
    clock = round(machine.value("program.overhead") * clock_hz)
    found, starts = [], []
    for block, stream in zip(work.blocks, far, strict=True):
        columns = [
            np.array([getattr(s, k) for s in block.steps], np.int64) for k in ("opcode", "bytes", "flops")
        ]
        length = durations(machine, columns[0], stream, columns[1], columns[2], working_set, clock_hz)
        found.append(length)
        starts.append(clock)
        clock += int(length.sum()) * block.repeat
    return _Timed(found, starts, clock)


def _temporaries(work: Lowered, timed: _Timed, buffers: _Buffers) -> None:
    """Place the program's temporaries in the arena by lifetime, counted in step positions."""
    uses: dict[Storage, list[int]] = {}
    homes: dict[Storage, set[int]] = {}
    position = 0
    edges: list[Span] = []
    for number, block in enumerate(work.blocks):
        edges.append((position, position + len(block.steps) - 1))
        for step in block.steps:
            for s in (*step.reads, *step.writes):
                if s.storage.memory == "arena":
                    uses.setdefault(s.storage, []).append(position)
                    homes.setdefault(s.storage, set()).add(number)
            position += 1
    storages = list(uses)
    local = {s: len(homes[s]) == 1 and _written_first(work.blocks[min(homes[s])], s) for s in storages}
    spans = [_span(work.blocks, edges, uses[s], homes[s], local[s]) for s in storages]
    offsets, _ = place([Interval(s.bytes, *span) for s, span in zip(storages, spans, strict=True)])
    cycle = _Cycles(work.blocks, timed, edges)
    for storage, offset, span in zip(storages, offsets, spans, strict=True):
        home = min(homes[storage])
        repeats = work.blocks[home].repeat if local[storage] else 1
        buffers.add(
            storage, offset, work.phase, [cycle.life(span, r, local[storage]) for r in range(repeats)]
        )
        if repeats > 1:
            work.blocks[home].bindings[storage] = (storage,) * repeats


def _written_first(block: BlockSteps, storage: Storage) -> bool:
    """Whether the block writes the storage before it reads it: no value is carried over from outside."""
    for step in block.steps:
        if any(s.storage is storage for s in step.reads):
            return False
        if any(s.storage is storage for s in step.writes):
            return True
    return False


def _span(blocks: list[BlockSteps], edges: list[Span], uses: list[int], homes: set[int], local: bool) -> Span:
    """First and last position at which a storage is in use; all of a repeated block that it passes
    through."""
    first, last = min(uses), max(uses)
    if local:
        return first, last
    for number in homes:
        if blocks[number].repeat > 1:
            first, last = min(first, edges[number][0]), max(last, edges[number][1])
    return first, last


@dataclass(eq=False)
class _Cycles:
    """Step positions as cycles."""

    blocks: list[BlockSteps]
    timed: _Timed
    edges: list[Span]

    def life(self, span: Span, repetition: int, local: bool) -> Span:
        """First and last cycle of a life. One that is not local to a repetition lasts for all of them."""
        return self._begin(span[0], repetition), self._end(span[1], repetition, local) - 1

    def _find(self, position: int) -> tuple[int, int]:
        for number, (a, b) in enumerate(self.edges):
            if a <= position <= b:
                return number, position - a
        raise IndexError(position)

    def _begin(self, position: int, repetition: int) -> int:
        block, i = self._find(position)
        lengths = self.timed.durations[block]
        return self.timed.starts[block] + repetition * int(lengths.sum()) + int(lengths[:i].sum())

    def _end(self, position: int, repetition: int, local: bool) -> int:
        block, i = self._find(position)
        lengths = self.timed.durations[block]
        if not local:
            repetition = self.blocks[block].repeat - 1
        return self.timed.starts[block] + repetition * int(lengths.sum()) + int(lengths[: i + 1].sum())


def _block(block: BlockSteps, lengths: Int, start: int, buffers: _Buffers, base: int) -> Block:
    steps = block.steps
    begin = np.cumsum(lengths) - lengths
    args = [np.array(s.args, np.int64) for s in steps]
    table = step_table(
        begin, lengths, np.zeros(len(steps), np.int64), [s.opcode for s in steps],
        (_offsets([len(a) for a in args]), np.concatenate([np.zeros(0, np.int64), *args])),
        _slices([s.reads for s in steps], buffers), _slices([s.writes for s in steps], buffers),
        [s.op + base if s.op >= 0 else -1 for s in steps], [s.bytes for s in steps], [s.flops for s in steps],
    )  # fmt: skip
    period = int(lengths.sum()) if block.repeat > 1 else 0
    return Block(block.name, StepTable(table.table), start, block.repeat, period, _bindings(block, buffers))


def _offsets(lengths: Sequence[int]) -> Int:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)


def _slices(lists: list[list[Slice]], buffers: _Buffers) -> tuple[Int, Int, Int, Int]:
    flat = [s for group in lists for s in group]
    columns = (
        [buffers.of[s.storage][0] for s in flat], [s.offset for s in flat], [s.bytes for s in flat]
    )  # fmt: skip
    a, b, c = (np.array(column, np.int64) for column in columns)
    return _offsets([len(group) for group in lists]), a, b, c


def _bindings(block: BlockSteps, buffers: _Buffers) -> pa.Table | None:
    if not block.bindings:
        return None
    slots, repetitions, to = [], [], []
    for slot, storages in block.bindings.items():
        for r, storage in enumerate(storages):
            rows = buffers.of[storage]
            slots.append(buffers.of[slot][0])
            repetitions.append(r)
            to.append(rows[r] if len(rows) > 1 else rows[0])
    columns = [pa.array(c, pa.int32()) for c in (slots, repetitions, to)]
    return pa.Table.from_arrays(columns, schema=BINDING_SCHEMA)


def _ports(graph: Graph, lowered: Sequence[Lowered], weights: Weights, buffers: _Buffers) -> list[Port]:
    ports = [_weight_port(name, value, weights, buffers) for name, value in sorted(weights.values.items())]
    for name, value in lowered[0].states.items():
        source = ["zeros", list(value.shape), _name(value.dtype)]
        ports.append(_port(name, "state", value, buffers, (), source))
    for work in lowered:
        ports += [_port(n, "input", v, buffers, (work.phase,)) for n, v in work.inputs.items()]
        ports += [_port(n, "output", v, buffers, (work.phase,)) for n, v in work.outputs.items()]
    return ports


def _name(dtype: str) -> str:
    return numpy_dtype(dtype).name


def _port(
    name: str, kind: Any, value: Value, buffers: _Buffers, programs: tuple[str, ...], source: Any = None
) -> Port:
    rows = tuple(buffers.of[value.storage])
    return Port(name, kind, _name(value.dtype), value.shape, rows, "row-major", source, programs)


def _weight_port(name: str, value: Value, weights: Weights, buffers: _Buffers) -> Port:
    source = weights.sources[value.storage]
    kind = "constant" if name.startswith("constant.") else "weight"
    return _port(f"weight:{name}", kind, value, buffers, (), source)


def _weight_files(weights: Weights) -> dict[str, Any]:
    return {
        name: {
            "file": w.file,
            "offset": w.offset,
            "bytes": w.bytes,
            "dtype": _name(w.dtype),
            "shape": list(w.shape),
        }
        for name, w in sorted(weights.symbols.items())
    }


def _model(graph: Graph) -> ModelRef:
    path = "" if graph.path is None else str(graph.path)
    return ModelRef(path, graph.sha256, dict.fromkeys(graph.files, ""), graph.params, graph.layers)
