"""The schedule: what a backend emits, what is checked, saved and executed. Columnar, no object per step.

Everything here is plain data. Schedulers, checks and executors share only this schema and the machine table.

Time is in integer cycles of the machine's clock. Addresses are bytes inside one memory of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Phase = Literal["decode", "prefill"]
PortKind = Literal["input", "output", "state", "weight", "constant"]
Int = npt.NDArray[np.int64]
Json = Any


def _schema(fields: list[tuple[str, Any]]) -> pa.Schema:
    return pa.schema(fields)


SLICE: Any = pa.struct([("buffer", pa.int32()), ("offset", pa.int64()), ("bytes", pa.int64())])
"""One operand: `bytes` bytes at `offset` inside buffer number `buffer` (a row of the BufferTable)."""

STEP_SCHEMA: Any = _schema(
    [
        ("start", pa.int64()),  # cycle of issue, relative to the block's start in repetition 0
        ("duration", pa.int32()),  # cycles for which the unit is taken
        ("unit", pa.int32()),  # row of Schedule.units
        ("opcode", pa.int32()),  # row of Schedule.opcodes
        ("args", pa.list_(pa.int64())),  # immediates; their meaning belongs to the opcode
        ("reads", pa.list_(SLICE)),  # buffer slices read
        ("writes", pa.list_(SLICE)),  # buffer slices written
        ("op", pa.int32()),  # row of Schedule.ops that this step is part of; -1 for none
        ("bytes", pa.int64()),  # bytes moved by the step
        ("flops", pa.int64()),  # operations done by the step (multiply-add = 2)
    ]
)

BUFFER_SCHEMA: Any = _schema(
    [
        ("memory", pa.int32()),  # row of Schedule.memories
        ("offset", pa.int64()),  # first byte inside that memory
        ("bytes", pa.int64()),
        ("value", pa.string()),  # name of the value it holds (a port, a weight tile, a temporary)
        (
            "first",
            pa.int64(),
        ),  # first cycle at which the bytes belong to the value (program time); -1 = before start
        ("last", pa.int64()),  # last such cycle; -1 = to the end of the program and beyond (weights, state)
        ("program", pa.string()),  # "decode", "prefill", or "" for a buffer that both share
    ]
)

BINDING_SCHEMA: Any = _schema([("slot", pa.int32()), ("repetition", pa.int32()), ("buffer", pa.int32())])

OP_SCHEMA: Any = _schema(
    [
        ("program", pa.string()),
        ("id", pa.int32()),  # row number of this table
        ("kind", pa.string()),  # IR op name without the dialect: "linear", "attention", ...
        ("name", pa.string()),  # place in the model, e.g. "layers.2/attention"
        (
            "repetition",
            pa.int32(),
        ),  # 0 for ops outside of repeats; for a repeated op only repetition 0 is listed
        ("repeat", pa.int32()),  # how often the op runs (1 outside of repeats)
        ("operands", pa.list_(pa.int32())),  # ids of the producing ops; -1 for inputs of the graph
        ("shape", pa.list_(pa.int64())),  # of the (first) result
        ("flops", pa.int64()),  # of one repetition
        ("weight_bytes", pa.int64()),  # of one repetition, in the schedule's weight format
    ]
)


@dataclass(frozen=True)
class StepTable:
    """Steps of one block, sorted by (start, unit). `table` has STEP_SCHEMA."""

    table: pa.Table

    def column(self, name: str) -> Int:
        """A scalar column as int64."""
        return self.table.column(name).to_numpy().astype(np.int64, copy=False)

    def args(self) -> tuple[Int, Int]:
        """(offsets[n+1], flat values) of the `args` column."""
        return _ragged(self.table.column("args"))

    def slices(self, which: Literal["reads", "writes"]) -> tuple[Int, Int, Int, Int]:
        """(offsets[n+1], buffer, offset, bytes): the operands of step i are rows offsets[i]:offsets[i+1]."""
        array: Any = self.table.column(which).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.list_(SLICE))
        flat = array.flatten()
        lengths = np.asarray(pc.list_value_length(array).to_numpy(zero_copy_only=False), np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        part = [np.asarray(flat.field(k).to_numpy(zero_copy_only=False), np.int64) for k in range(3)]
        return offsets, part[0], part[1], part[2]

    def __len__(self) -> int:
        return int(self.table.num_rows)


def _ragged(column: Any) -> tuple[Int, Int]:
    array: Any = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.list_(pa.int64()))
    lengths = np.asarray(pc.list_value_length(array).to_numpy(zero_copy_only=False), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return offsets, np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.int64)


@dataclass(frozen=True)
class Block:
    """A StepTable that runs `repeat` times: repetition r starts at cycle start + r*period.

    `bindings` (BINDING_SCHEMA) gives, for a buffer number `slot` used in the steps, the buffer that stands
    for it in repetition r. A buffer without a row stands for itself in every repetition.
    Repetitions may overlap in time (software pipelining): a step's absolute cycle is
    start + repetition*period + step.start, and step.start may be negative or exceed `period`.
    """

    name: str
    steps: StepTable
    start: int = 0
    repeat: int = 1
    period: int = 0
    bindings: pa.Table | None = None


@dataclass(frozen=True)
class Port:
    """A value that enters, leaves, or stays in the machine, and where its bytes are.

    `source` (weights and constants) is a value expression, see `schedule/values.py`. `layout` belongs to the
    target: it says how the array's elements map to the bytes of `buffers`.
    """

    name: str
    kind: PortKind
    dtype: str  # NumPy name of the array given or returned: "float32", "int64", "float16", "uint8" ...
    shape: tuple[int, ...]
    buffers: tuple[int, ...]
    layout: Json = None
    source: Json = None
    programs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """One phase: blocks in order, its length in cycles, and how its inputs come from the model's inputs."""

    phase: Phase
    blocks: tuple[Block, ...]
    cycles: int
    sequence: int  # tokens per sequence that one run consumes (1 for decode)


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    phases: tuple[Phase, ...] = ("prefill", "decode")
    batch: int = 1
    context: int = 128
    prompt: int = 16
    weights: str | None = None  # None: the target's widest native matmul format
    chips: int | None = 1  # None = auto
    speculative: int = 0
    parallel: str = ""  # how the target shares the model out among chips; "": its own way


@dataclass(frozen=True)
class ModelRef:
    """Which model a schedule belongs to. `path` as the user gave it; weights are found through `files`."""

    path: str
    sha256: str
    files: Mapping[str, str] = field(
        default_factory=dict
    )  # weight file (relative to the model's folder) -> sha256 or ""
    params: int = 0
    layers: int = 0


@dataclass(frozen=True)
class Schedule:
    """Programs, buffers and the target's own plan. Saved and loaded by `schedule/store.py`.

    machine_toml is the text of the machine file the schedule was made for (so that a schedule on disk can be
    checked and executed alone). `roles` maps the model's ONNX inputs and outputs to roles.
    `weights` maps a symbol to {"file", "offset", "bytes", "dtype", "shape"}; file is relative to
    the model's folder.
    `constants` are arrays stored in the schedule itself (constants.bin).
    """

    target: str
    machine: str
    machine_toml: str
    chips: int
    request: Request
    model: ModelRef
    clock_hz: float
    units: tuple[str, ...]
    memories: tuple[tuple[str, int], ...]  # (name, bytes)
    opcodes: tuple[str, ...]
    programs: Mapping[str, Program]
    buffers: pa.Table
    ops: pa.Table
    ports: tuple[Port, ...]
    weights: Mapping[str, Json] = field(default_factory=dict)
    constants: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    roles: Json = None
    plan: Json = None
    provenance: Json = None

    def plan_json(self) -> str:
        """The plan, printed stably."""
        return json.dumps(self.plan, sort_keys=True, indent=1)


def step_table(
    start: Sequence[int] | Int,
    duration: Sequence[int] | Int,
    unit: Sequence[int] | Int,
    opcode: Sequence[int] | Int,
    args: tuple[Int, Int],
    reads: tuple[Int, Int, Int, Int],
    writes: tuple[Int, Int, Int, Int],
    op: Sequence[int] | Int,
    bytes: Sequence[int] | Int,
    flops: Sequence[int] | Int,
) -> StepTable:
    """Build a StepTable from columns; ragged columns as (offsets, flat...) like the accessors return them."""

    def ragged(offsets: Int, flat: Any) -> Any:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)

    def slices(part: tuple[Int, Int, Int, Int]) -> Any:
        flat = pa.StructArray.from_arrays(
            [pa.array(part[1], pa.int32()), pa.array(part[2], pa.int64()), pa.array(part[3], pa.int64())],
            fields=list(SLICE),
        )
        return ragged(part[0], flat)

    columns: list[Any] = [
        pa.array(start, pa.int64()),
        pa.array(duration, pa.int32()),
        pa.array(unit, pa.int32()),
        pa.array(opcode, pa.int32()),
        ragged(args[0], pa.array(args[1], pa.int64())),
        slices(reads),
        slices(writes),
        pa.array(op, pa.int32()),
        pa.array(bytes, pa.int64()),
        pa.array(flops, pa.int64()),
    ]
    return StepTable(pa.Table.from_arrays(columns, schema=STEP_SCHEMA))
