"""Programs for the checks' tests: steps by hand, one at a time; one legal program that uses every
instruction."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    STEP_SCHEMA,
    Block,
    ModelRef,
    Port,
    Program,
    Request,
    Schedule,
    StepTable,
)
from mapper_lpu import isa

MACHINE = Path(__file__).parents[2] / "targets/mapper_lpu/machines/groq-lpu1.toml"
X = 16
E, W = isa.EAST, isa.WEST
ONE = 0x3F800000


@dataclass
class Asm:
    """Collects steps, buffers, ports and ops of one decode program; latencies are those of the shipped
    machine."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    buffers: list[dict[str, Any]] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    ops: list[tuple[str, list[int], int]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=lambda: {"exact_time": True, "permutes": []})
    blocks: list[Block] = field(default_factory=list)
    cycles: int | None = None
    machine: str = ""
    top: dict[str, int] = field(default_factory=dict)

    def op(self, kind: str, *operands: int, repeat: int = 1) -> int:
        """Add an op; returns its id."""
        self.ops.append((kind, list(operands), repeat))
        return len(self.ops) - 1

    def buffer(self, name: str, unit: str, rows: int) -> int:
        """Reserve rows of a slice; returns the buffer."""
        low = self.top.get(unit, 0)
        self.top[unit] = low + rows
        self.buffers.append(
            {"memory": isa.UNITS.index(unit), "offset": low * isa.LANES, "bytes": rows * isa.LANES,
             "value": name, "first": -1, "last": -1, "program": ""}
        )  # fmt: skip
        return len(self.buffers) - 1

    def value(self, name: str, first: int, planes: int, rows: int, kind: Any = None) -> list[int]:
        """A value with its byte planes in slices first, first + 1, ... east; a port of that kind, or a
        temporary."""
        found = [self.buffer(f"{name}#{j}", f"mem.e.{first + j:02d}", rows) for j in range(planes)]
        if kind:
            source = ["zeros", [1], "float32"] if kind in ("weight", "constant") else None
            self.ports.append(Port(name, kind, "float32", (rows, 320), tuple(found), None, source))
        return found

    def unit(self, buffer: int) -> str:
        """The slice of a buffer."""
        return isa.UNITS[int(self.buffers[buffer]["memory"])]

    def x(self, buffer: int) -> int:
        """The position of a buffer's slice."""
        return isa.position(self.buffers[buffer]["memory"], X - isa.SXM_POSITION)

    def add(
        self,
        t: int,
        unit: str,
        opcode: str,
        args: list[int],
        op: int = -1,
        reads: Any = None,
        writes: Any = None,
    ) -> None:
        """One step; `reads` and `writes` are (buffer, row) or (buffer, row, rows)."""

        def slices(part: Any) -> list[dict[str, int]]:
            if part is None:
                return []
            buffer, row, rows = (*part, 1)[:3]
            return [{"buffer": buffer, "offset": row * isa.LANES, "bytes": rows * isa.LANES}]

        self.steps.append(
            {"start": t, "duration": 2 if opcode == "mxm.install" else 1, "unit": isa.UNITS.index(unit),
             "opcode": isa.OPCODES.index(opcode), "args": args, "reads": slices(reads),
             "writes": slices(writes), "op": op, "bytes": 0, "flops": 0}
        )  # fmt: skip

    def arrive(self, buffers: list[int], row: int, d: int, s: int, x: int, t: int, op: int) -> None:
        """Read byte planes so that they are on streams s, s + 1, ... at position x in cycle t."""
        for j, b in enumerate(buffers):
            far = x - self.x(b) if d == E else self.x(b) - x
            assert far >= 0
            self.add(t - far - 1, self.unit(b), "mem.read", [d, s + j], op, reads=(b, row))

    def store(self, buffers: list[int], row: int, d: int, s: int, x: int, t: int, op: int) -> None:
        """Write what is on streams s, s + 1, ... at position x in cycle t."""
        for j, b in enumerate(buffers):
            far = self.x(b) - x if d == E else x - self.x(b)
            assert far >= 0
            self.add(t + far, self.unit(b), "mem.write", [d, s + j], op, writes=(b, row))

    def close(
        self, repeat: int = 1, period: int = 0, bindings: list[tuple[int, int, int]] | None = None
    ) -> None:
        """Make the collected steps a block."""
        rows = sorted(self.steps, key=lambda s: (s["start"], s["unit"]))
        table = StepTable(pa.Table.from_pylist(rows, schema=STEP_SCHEMA))
        bound = [dict(zip(BINDING_SCHEMA.names, b, strict=True)) for b in bindings or []]
        bindings_table = pa.Table.from_pylist(bound, schema=BINDING_SCHEMA) if bound else None
        self.blocks.append(Block(f"b{len(self.blocks)}", table, 0, repeat, period, bindings_table))
        self.steps = []

    def schedule(self) -> Schedule:
        """The schedule of all steps so far."""
        copied = copy.deepcopy(self)
        if copied.steps or not copied.blocks:
            copied.close()
        ops = [
            {"program": "decode", "id": i, "kind": k, "name": f"{k}{i}", "repetition": 0, "repeat": repeat,
             "operands": o, "shape": [1], "flops": 0, "weight_bytes": 0}
            for i, (k, o, repeat) in enumerate(self.ops)
        ]  # fmt: skip
        last = 0
        for block in copied.blocks:
            last = max(last, int(block.steps.column("start").max()) + (block.repeat - 1) * block.period)
        cycles = last + 80 if self.cycles is None else self.cycles
        return Schedule(
            target="lpu", machine="groq-lpu1", machine_toml=self.machine or MACHINE.read_text(), chips=1,
            request=Request(), model=ModelRef("m.onnx", ""), clock_hz=9e8, units=isa.UNITS,
            memories=tuple((n, isa.ROWS * isa.LANES) for n in isa.UNITS[:88]), opcodes=isa.OPCODES,
            programs={"decode": Program("decode", tuple(copied.blocks), cycles, 1)},
            buffers=pa.Table.from_pylist(copied.buffers, schema=BUFFER_SCHEMA),
            ops=pa.Table.from_pylist(ops, schema=OP_SCHEMA), ports=tuple(copied.ports), plan=copied.plan,
        )  # fmt: skip


def good() -> Asm:
    """One legal program with every kind of instruction. Ops: 0 gather, 1 linear (after 0), 2 add, 3
    permute."""
    a = Asm()
    embed, linear, add, permute = a.op("embed", -1), a.op("linear", 0), a.op("add", 1), a.op("copy", -1)
    x = a.value("x", 0, 4, 4, "input")
    h = a.value("h", 4, 2, 1)
    index = a.value("index", 10, 2, 1, "input")
    y, z = a.value("y", 4, 4, 2, "output"), a.value("z", 20, 4, 1, "output")
    table = a.value("table", 24, 4, 8, "weight")
    state = a.value("state", 32, 4, 8, "state")
    permuted = a.value("permuted", 40, 4, 1, "output")
    _embedding(a, index, table, h, embed)
    _matmul(a, h, z, linear)
    _elementwise(a, x, index, y, state, add)
    a.plan["permutes"] = [[*range(1, isa.LANES), -1]]
    a.arrive(x, 2, E, 28, 12, 400, permute)
    a.add(400, "sxm.e.permute", "sxm.permute", [E, 28, W, 24, 4, 0], permute)
    a.store(permuted, 0, W, 24, 12, 404, permute)
    return a


def _embedding(a: Asm, index: list[int], table: list[int], h: list[int], op: int) -> None:
    """Gather a table row at cycle 20 in position 7, cast it to f16 on ALU 0, store it."""
    a.arrive(index, 0, E, 0, 7, 20, op)
    for j, b in enumerate(table):
        a.add(20, a.unit(b), "mem.gather", [W, 8 + j, E, 0], op, reads=(b, 0, 8))
    a.add(31, "vxm.00", "vxm.cast", [isa.OUTER, W, 8, E, 12, isa.F32, isa.F16], op)
    a.store(h, 0, E, 12, 0, 34, op)


def _matmul(a: Asm, h: list[int], z: list[int], op: int) -> None:
    """One f16 tile in the east: loads in cycles 100..119, install, one activation; ALU 0 joins both
    results."""
    w = {
        (i, p): a.buffer(f"w.{i}#{p}", f"mem.e.{12 + 16 * p + i:02d}", 20) for i in range(16) for p in (0, 1)
    }
    buffers = tuple(w[i, p] for i in range(16) for p in (0, 1))
    a.ports.append(Port("w", "weight", "float32", (320, 320), buffers, None, ["zeros", [1], "float32"]))
    for g in range(20):
        for p in (0, 1):
            for i in range(16):
                a.arrive([w[i, p]], g, E, 16 * p + i, X, 100 + g, op)
            a.add(100 + g, f"mxm.e.{p}.load", "mxm.load", [g, 16 * p], op)
    a.arrive(h, 0, E, 0, X, 130, op)
    for p in (0, 1):
        a.add(120, f"mxm.e.{p}.load", "mxm.install", [], op)
        a.add(130, f"mxm.e.{p}.in", "mxm.activate", [isa.F16, 0], op)
        a.add(162, f"mxm.e.{p}.out", "mxm.emit", [4 * p], op)
    a.add(181, "vxm.00", "vxm.add", [isa.OUTER, W, 0, isa.OUTER, W, 4, E, 8], op)
    a.store(z, 0, E, 8, 0, 184, op)


def _elementwise(a: Asm, x: list[int], index: list[int], y: list[int], state: list[int], op: int) -> None:
    """x[0] + 1 on ALU 0, times x[1] on ALU 1 of rank 1, which then subtracts 1; scatter to the state."""
    a.arrive(x, 0, W, 0, 0, 200, op)
    a.add(203, "vxm.00", "vxm.add", [isa.OUTER, W, 0, isa.IMMEDIATE, ONE, 0, E, 4], op)
    a.arrive(x, 1, W, 12, 0, 203, op)
    a.add(206, "vxm.01", "vxm.mul", [isa.INNER, E, 4, isa.OUTER, W, 12, E, 16], op)
    a.add(209, "vxm.01", "vxm.sub", [isa.ACC, 0, 0, isa.IMMEDIATE, ONE, 0, E, 20], op)
    a.store(y, 0, E, 16, 0, 209, op)
    a.store(y, 1, E, 20, 0, 212, op)
    a.arrive(index, 0, E, 24, 9, 221, op)
    for j, b in enumerate(state):
        a.add(221, a.unit(b), "mem.scatter", [E, 20 + j, E, 24], op, writes=(b, 0, 8))


def pick(steps: list[dict[str, Any]], opcode: str, unit: str = "", at: int | None = None) -> dict[str, Any]:
    """The first step with that opcode, unit and start."""
    for step in steps:
        if isa.OPCODES[step["opcode"]] != opcode or (at is not None and step["start"] != at):
            continue
        if isa.UNITS[step["unit"]].startswith(unit):
            return step
    raise LookupError((opcode, unit, at))


def looped() -> Asm:
    """Four repetitions: h = h + w_r, with the row of weights bound per repetition."""
    a = Asm()
    begin, body = a.op("embed", -1), a.op("add", 0, repeat=4)
    x, h = a.value("x", 0, 4, 1, "input"), a.value("h", 4, 4, 1, "output")
    w = [a.value(f"w/{r}", 8, 4, 1, "weight") for r in range(4)]
    a.arrive(x, 0, W, 0, 0, 3, begin)
    a.add(6, "vxm.00", "vxm.copy", [isa.OUTER, W, 0, E, 4], begin)
    a.store(h, 0, E, 4, 0, 9, begin)
    a.close()
    a.arrive(h, 0, W, 0, 0, 20, body)
    a.arrive(w[0], 0, W, 8, 0, 20, body)
    a.add(23, "vxm.00", "vxm.add", [isa.OUTER, W, 0, isa.OUTER, W, 8, E, 4], body)
    a.store(h, 0, E, 4, 0, 26, body)
    a.close(4, 12, [(w[0][j], r, w[r][j]) for r in range(1, 4) for j in range(4)])
    return a
