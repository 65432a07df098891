"""A small schedule written by hand for a machine with two vector units, and what its opcodes mean.

h = copy x; three times: t = h * w[r]; h' = h + t (in place); acc' = acc + h; y = copy h
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mapper.errors import ExecutionFault
from mapper.runtime.interface import Memories
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    ModelRef,
    Port,
    Program,
    Request,
    Schedule,
    StepTable,
    step_table,
)
from mapper.schedule.timeline import timeline

MACHINE = """
name = "toy"
target = "toy"
summary = "two vector units and one memory"
[memory.mem.bandwidth]
value = 64e9
unit = "B/s"
kind = "assumed"
source = "a test"
[memory.mem.capacity]
value = 4096
unit = "B"
kind = "assumed"
source = "a test"
"""
N = 4
BYTES = 4 * N
X, H, T, ACC, Y, W0, W1, W2 = range(8)
COPY, MUL, ADD = range(3)

Row = tuple[int, int, int, int, list[int], list[int], int]


def steps(rows: list[Row]) -> StepTable:
    """A StepTable from rows (start, duration, unit, opcode, read buffers, written buffers, op)."""

    def slices(k: int) -> tuple[Any, Any, Any, Any]:
        lists: list[list[int]] = [r[k] for r in rows]  # type: ignore[misc]
        flat = np.array([b for part in lists for b in part], np.int64)
        offsets = np.cumsum([0] + [len(part) for part in lists])
        return offsets, flat, np.zeros(len(flat), np.int64), np.full(len(flat), BYTES)

    column = [np.array([r[k] for r in rows], np.int64) for k in (0, 1, 2, 3)]
    empty = (np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int64))
    op = np.array([r[6] for r in rows], np.int64)
    flops = np.where(column[3] == COPY, 0, N)
    moved = np.array([BYTES * (len(r[4]) + len(r[5])) for r in rows], np.int64)
    start, duration, unit, opcode = column
    return step_table(start, duration, unit, opcode, empty, slices(4), slices(5), op, moved, flops)


def buffers(rows: list[tuple[int, int, int, str, int, int, str]]) -> pa.Table:
    """A buffer table from rows in the order of BUFFER_SCHEMA."""
    columns = [pa.array([r[k] for r in rows], BUFFER_SCHEMA.types[k]) for k in range(7)]
    return pa.Table.from_arrays(columns, schema=BUFFER_SCHEMA)


def ops(rows: list[dict[str, Any]]) -> pa.Table:
    """An ops table from rows; `id` is filled in."""
    return pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(rows)], schema=OP_SCHEMA)


def op(
    kind: str, operands: list[int], repeat: int = 1, flops: int = 0, weight_bytes: int = 0
) -> dict[str, Any]:
    """One row of the ops table."""
    return {
        "program": "decode", "kind": kind, "name": kind, "repetition": 0, "repeat": repeat,
        "operands": operands, "shape": [N], "flops": flops, "weight_bytes": weight_bytes,
    }  # fmt: skip


def schedule(layers: int = 3) -> Schedule:
    """The schedule of this module's docstring; a layer takes 8 cycles."""
    body = 8
    end = 4 + layers * body
    table = [
        (0, 0, BYTES, "x", -1, 3, "decode"),
        (0, 64, BYTES, "h", 0, end + 8, "decode"),
        (0, 128, BYTES, "t", 4, end, "decode"),
        (0, 192, BYTES, "acc", -1, -1, ""),
        (0, 256, BYTES, "y", end + 4, -1, "decode"),
        *((0, 320 + 64 * i, BYTES, f"w{i}", -1, -1, "") for i in range(layers)),
    ]
    layer = steps([(0, 4, 0, MUL, [H, W0], [T], 1), (4, 4, 0, ADD, [H, T], [H], 2)])
    rows = [{"slot": W0, "repetition": r, "buffer": W0 + r} for r in range(1, layers)]
    blocks = (
        Block("head", steps([(0, 4, 0, COPY, [X], [H], 0)])),
        Block("layers", layer, 4, layers, body, pa.Table.from_pylist(rows, schema=BINDING_SCHEMA)),
        Block("tail", steps([(0, 4, 1, ADD, [ACC, H], [ACC], 3), (4, 4, 0, COPY, [H], [Y], 4)]), end),
    )
    weights = [
        Port(f"w{i}", "weight", "float32", (N,), (W0 + i,), None, ["weight", f"w{i}"]) for i in range(layers)
    ]
    ports = (
        Port("x", "input", "float32", (N,), (X,)),
        Port("y", "output", "float32", (N,), (Y,)),
        Port("acc", "state", "float32", (N,), (ACC,), None, ["const", "start"]),
        *weights,
    )
    return Schedule(
        target="toy",
        machine="toy",
        machine_toml=MACHINE,
        chips=1,
        request=Request(("decode",)),
        model=ModelRef("model.onnx", "0" * 64, {"w.bin": ""}, N * layers, layers),
        clock_hz=1e9,
        units=("alu0", "alu1"),
        memories=(("mem", 4096),),
        opcodes=("copy", "mul", "add"),
        programs={"decode": Program("decode", blocks, end + 8, 1)},
        buffers=buffers(table),
        ops=ops(
            [
                op("input", [-1]),
                op("mul", [0], layers, N, BYTES),
                op("add", [1], layers, N),
                op("add", [2], 1, N),
                op("copy", [2]),
            ]
        ),
        ports=ports,
        weights={
            f"w{i}": {"file": "w.bin", "offset": i * BYTES, "bytes": BYTES, "dtype": "float32", "shape": [N]}
            for i in range(layers)
        },
        constants={"start": np.array([1, 2, 3, 4], np.float32)},
        plan={"commutative": ["mul", "add"]},
        roles={"inputs": {}, "outputs": {}},
        provenance={},
    )


class ToySemantics:
    """NumPy meaning of copy, mul and add."""

    def place(self, schedule: Schedule, port: Port, array: npt.NDArray[Any], memories: Memories) -> None:
        """See runtime.interface."""
        (buffer,) = port.buffers
        low = schedule.buffers.column("offset")[buffer].as_py()
        memories.data(0)[low : low + BYTES] = np.ascontiguousarray(array).view(np.uint8)
        memories.written(0)[low : low + BYTES] = True

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> npt.NDArray[Any]:
        """See runtime.interface."""
        low = schedule.buffers.column("offset")[port.buffers[0]].as_py()
        return self._read(memories, low, low + BYTES).copy()

    def _read(self, memories: Memories, low: int, high: int) -> npt.NDArray[np.float32]:
        if not memories.written(0)[low:high].all():
            raise ExecutionFault(f"bytes {low}..{high} were never written")
        return memories.data(0)[low:high].view(np.float32)

    def run(self, schedule: Schedule, phase: Any, memories: Memories) -> int:
        """See runtime.interface."""
        times = timeline(schedule, phase)
        base = schedule.buffers.column("offset").to_numpy()
        for step in range(len(times)):
            reads = np.flatnonzero(times.reads.step == step)
            write = int(np.flatnonzero(times.writes.step == step)[0])
            low = base[times.reads.buffer[reads]]
            values = [
                self._read(memories, int(a + i), int(a + j))
                for a, i, j in zip(low, times.reads.low[reads], times.reads.high[reads], strict=True)
            ]
            code = times.opcode[step]
            if len(values) < (1 if code == COPY else 2):
                raise ExecutionFault(f"step {step} lacks an operand")
            out = (
                values[0] if code == COPY else values[0] * values[1] if code == MUL else values[0] + values[1]
            )
            at = int(base[times.writes.buffer[write]])
            a, b = at + int(times.writes.low[write]), at + int(times.writes.high[write])
            memories.data(0)[a:b] = np.ascontiguousarray(out).view(np.uint8)[: b - a]
            memories.written(0)[a:b] = True
        return schedule.programs[phase].cycles
