"""From a chain to instructions with relative cycles: levels, inserted copies, the VXM assignment, reads and
writes.

Cycle 0 of a template is the issue of its first VXM level for vector 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mapper.errors import LoweringError
from mapper.machine import Machine
from mapper_lpu import calendar
from mapper_lpu.assign import Assignment, Node, assign
from mapper_lpu.chain import Chain, Gather, Hold, Imm, Mem, Mxm, Op, Operand, Res, Scatter, Self, Tile
from mapper_lpu.isa import (
    ACC,
    F16,
    F32,
    I8,
    IMMEDIATE,
    INNER,
    LANES,
    OUTER,
    SLICES,
    TYPE_BYTES,
    UNITS,
    mxm_position,
    position,
)
from mapper_lpu.storage import Stored

FIRST_ALU = UNITS.index("vxm.00")
_UNIT = {name: number for number, name in enumerate(UNITS)}


class Instruction(NamedTuple):
    """One instruction at a relative cycle. mode 0: no memory operand, 1: reads, 2: writes `rows` rows of
    `buffer`.
    """

    cycle: int
    unit: int
    opcode: str
    args: tuple[int, ...]
    ir: int
    mode: int = 0
    buffer: int = -1
    row: int = 0
    rows: int = 1
    duration: int = 1
    flops: int = 0

    def at(self, cycle: int) -> Instruction:
        """The same instruction, `cycle` cycles later."""
        return Instruction(self[0] + cycle, *self[1:])


@dataclass(frozen=True)
class Latencies:
    """The machine's constants in cycles, read once."""

    read: int
    gather: int
    entry: int
    alu: int
    mxm: int
    install: int
    permute: int
    crossing: int
    edge: int  # position of the MXM

    @staticmethod
    def of(machine: Machine) -> Latencies:
        """From a machine file."""
        return Latencies(
            machine.whole("mem.read"),
            machine.whole("mem.gather"),
            machine.whole("vxm.entry"),
            machine.whole("vxm.alu"),
            machine.whole("mxm.latency"),
            machine.whole("mxm.install"),
            machine.whole("sxm.permute"),
            machine.whole("sxm.crossing"),
            mxm_position(machine),
        )


CONSTANTS = (
    "mem.read",
    "mem.gather",
    "vxm.entry",
    "vxm.alu",
    "mxm.latency",
    "mxm.install",
    "sxm.crossing",
)
Form = tuple[int, ...]
"""How often each of CONSTANTS counts in a relative cycle: what retiming with other constants needs."""


def form(**counts: int) -> Form:
    """A Form from counts by constant, dots as underscores."""
    return tuple(counts.get(name.replace(".", "_"), 0) for name in CONSTANTS)


@dataclass
class Template:
    """A chain made rigid. `uses` are calendar uses; the lists below hold (what, relative cycle, form of the
    cycle).
    """

    chain: Chain
    instructions: list[Instruction] = field(default_factory=list)
    uses: list[calendar.Use] = field(default_factory=list)
    reads: list[tuple[Stored, int, int, Form]] = field(default_factory=list)
    writes: list[tuple[Stored, int, int, Form]] = field(default_factory=list)
    activations: list[tuple[Tile, int, Form]] = field(default_factory=list)


def unit(name: str) -> int:
    """Number of a unit by name."""
    return _UNIT[name]


_DISTANCE = tuple(abs(position(number, 0)) for number in range(2 * SLICES))


def distance(number: int) -> int:
    """|x| of a MEM unit."""
    return _DISTANCE[number]


def immediate(value: float) -> int:
    """The bits of an f32 as an int."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def levelled(chain: Chain, latency: int) -> tuple[list[Op], list[int]]:
    """Operations with copies inserted, and their offsets: every inner edge takes exactly `latency` cycles."""
    count = len(chain.ops)
    asap = [0] * count
    for i, op in enumerate(chain.ops):
        for operand in (op.a, op.b):
            if isinstance(operand, Res | Hold):
                asap[i] = max(asap[i], asap[operand.op] + 1)
    level = list(asap)
    for i in reversed(range(count)):
        consumers = [
            level[j]
            for j, op in enumerate(chain.ops)
            if any(isinstance(o, Res | Hold) and o.op == i for o in (op.a, op.b))
        ]
        if consumers:
            level[i] = min(consumers) - 1
    ops = list(chain.ops)
    levels = list(level)
    copies: dict[tuple[int, int], int] = {}

    def at(producer: int, wanted: int) -> int:
        """The operation that has the value of `producer` at level `wanted`."""
        if level[producer] == wanted:
            return producer
        key = (producer, wanted)
        if key not in copies:
            source = at(producer, wanted - 1)
            ops.append(
                Op("vxm.copy", Res(source), None, F32, F32, chain.ops[producer].ir, chain.ops[producer].count)
            )
            levels.append(wanted)
            copies[key] = len(ops) - 1
        return copies[key]

    for i in range(count):
        op = ops[i]
        a, b = op.a, op.b
        if isinstance(a, Res):
            a = Res(at(a.op, levels[i] - 1))
        if isinstance(b, Res):
            b = Res(at(b.op, levels[i] - 1))
        ops[i] = replace(op, a=a, b=b)
    return ops, [n * latency for n in levels]


def _nodes(chain: Chain, ops: list[Op], offsets: list[int], order: list[int], lag: int) -> list[Node]:
    rank = {op: n for n, op in enumerate(order)}
    consumed = {o.op for op in ops for o in (op.a, op.b) if isinstance(o, Res)}
    nodes = []
    for i in order:
        op = ops[i]
        outer, inner = [], []
        hold: int | None = None
        for slot, operand in enumerate((op.a, op.b)):
            if isinstance(operand, Mem | Gather):
                stored = operand.value if isinstance(operand, Mem) else operand.table
                outer.append((slot, 1 - stored.hemisphere))
            elif isinstance(operand, Mxm):
                outer.append((slot, 1 - operand.tile.hemisphere))
            elif isinstance(operand, Res):
                inner.append((slot, rank[operand.op]))
            elif isinstance(operand, Hold):
                hold = rank[operand.op]
        outs = [o for o in chain.outs if o.op == i]
        directions = {o.value.hemisphere for o in outs}
        if len(directions) > 1:
            raise LoweringError(f"{chain.name}: one result is written on both sides")
        accumulates = isinstance(op.b, Self)
        count = op.count or chain.count
        first = max(0, count - lag) if accumulates else 0
        nodes.append(
            Node(
                op.opcode,
                offsets[i],
                count,
                tuple(outer),
                tuple(inner),
                hold,
                directions.pop() if directions else None,
                bool(outs) or i in consumed,
                first,
            )
        )
    return nodes


def _rounded(nodes: list[Node]) -> tuple[Node, ...]:
    """The same problem, or a stricter one, with vector counts rounded up, so that chains of many lengths
    share it.
    """
    return tuple(replace(n, count=1 << (n.count - 1).bit_length(), result_from=0) for n in nodes)


def _active(chain: Chain, ops: list[Op], order: list[int]) -> dict[int, list[int]]:
    """Per operation the vectors whose result is used: those that an output or a consumer needs."""
    needed: dict[int, set[int]] = {i: set() for i in order}
    for output in chain.outs:
        needed[output.op] |= {i for i, row in enumerate(output.rows) if row >= 0}
    for i in reversed(order):
        op = ops[i]
        if isinstance(op.b, Self):  # an accumulation needs all that came before
            needed[i] = set(range(op.count or chain.count))
        for operand in (op.a, op.b):
            if isinstance(operand, Res | Hold):
                needed[operand.op] |= needed[i]
    return {i: sorted(vectors) for i, vectors in needed.items()}


def build(chain: Chain, lat: Latencies, seed: int) -> Template | None:
    """The instructions of a chain with one VXM assignment per seed. None where this seed gives none."""
    ops, offsets = levelled(chain, lat.alu)
    order = sorted(range(len(ops)), key=lambda i: (offsets[i], i))
    nodes = _nodes(chain, ops, offsets, order, lat.alu)
    found = assign(_rounded(nodes), lat.entry, lat.alu, seed) or assign(
        tuple(nodes), lat.entry, lat.alu, seed
    )
    if found is None:
        return None
    builder = _Builder(
        chain, lat, found, nodes, {op: n for n, op in enumerate(order)}, _active(chain, ops, order)
    )
    for number, i in enumerate(order):
        builder.operation(number, i, ops[i], offsets[i], nodes[number])
    uses = calendar.merge(builder.raw)
    if uses is None:
        return None
    builder.template.uses = uses
    return builder.template


class _Builder:
    """Emits instructions and resource uses of one chain into its template."""

    def __init__(
        self,
        chain: Chain,
        lat: Latencies,
        found: Assignment,
        nodes: list[Node],
        rank: dict[int, int],
        active: dict[int, list[int]],
    ) -> None:
        self.chain, self.lat, self.found = chain, lat, found
        self.nodes, self.rank, self.active = nodes, rank, active
        self.vectors: list[int] = []  # those of the operation at hand
        self.level = 0
        self.template = Template(chain)
        self.raw: list[tuple[int, int]] = []
        self.activated: dict[tuple[int, int, tuple[int, ...]], set[int]] = {}

    def _emit(self, instruction: Instruction) -> None:
        self.template.instructions.append(instruction)
        self.raw.append((calendar.queue(instruction.unit), instruction.cycle))

    def operation(self, number: int, index: int, op: Op, offset: int, node: Node) -> None:
        alu = self.found.alu[number]
        self.vectors = self.active[index]
        self.level = offset // self.lat.alu
        operands = []
        for slot, operand in enumerate((op.a, op.b)):
            if operand is not None:
                operands.append(self._operand(number, slot, operand, op, offset))
        out = self.found.out.get(number)
        accumulates = isinstance(op.b, Self)
        for i in self.vectors:
            opcode, args = op.opcode, list(operands)
            if accumulates and i < self.lat.alu:
                opcode, args = "vxm.copy", args[:1]
            flat = [n for triple in args for n in triple]
            travels = out is not None and i >= node.result_from
            flat += [out[0], 4 * out[1]] if out is not None and travels else [-1, 0]
            if opcode == "vxm.cast":
                flat += [op.type, op.out]
            self._emit(Instruction(offset + i, FIRST_ALU + alu, opcode, tuple(flat), op.ir, flops=LANES))
            if out is not None and travels:
                for byte in range(TYPE_BYTES[op.out]):
                    self.raw.append((calendar.centre(out[0], 4 * out[1] + byte), offset + i + self.lat.alu))
        for user in self.nodes[number + 1 :]:
            if user.hold == number:  # nothing else may run on this ALU until its output register is used
                self.raw += [(calendar.queue(FIRST_ALU + alu), c) for c in range(offset + 1, user.offset)]
        if out is not None:
            self._outputs(index, op, offset, out)

    def _operand(self, number: int, slot: int, operand: Operand, op: Op, offset: int) -> tuple[int, int, int]:
        match operand:
            case Imm(value):
                return IMMEDIATE, immediate(value), 0
            case Res(producer):
                direction, group = self.found.out[self.rank[producer]]
                return INNER, direction, 4 * group
            case Hold() | Self():
                return ACC, 0, 0
        group = self.found.outer[(number, slot)]
        arrival = offset - self.lat.entry
        match operand:
            case Mem(stored, rows):
                self._inward(stored, rows, group, arrival, op)
                return OUTER, 1 - stored.hemisphere, 4 * group
            case Gather(table, index, rows):
                self._gather(table, index, rows, group, arrival, op)
                return OUTER, 1 - table.hemisphere, 4 * group
            case Mxm(tile, plane, vector, rows):
                self._result(tile, plane, vector, rows, group, arrival, op)
                return OUTER, 1 - tile.hemisphere, 4 * group
        raise LoweringError(f"{self.chain.name}: unknown operand {operand}")

    def _inward(self, value: Stored, rows: tuple[int, ...], group: int, arrival: int, op: Op) -> None:
        side = value.hemisphere
        for plane in range(value.planes):
            stream = 4 * group + plane
            for i in self.vectors:
                number, buffer, inside = value.place(rows[i], plane)
                cycle = arrival + i - distance(number) - self.lat.read
                self._emit(
                    Instruction(cycle, number, "mem.read", (1 - side, stream), op.ir, 1, buffer, inside)
                )
                self._travels(side, 1 - side, stream, arrival + i, 1, distance(number))
                self.raw.append((calendar.centre(1 - side, stream), arrival + i))
                form_of = form(vxm_alu=self.level, vxm_entry=-1, mem_read=-1)
                self.template.reads.append((value, rows[i], cycle, form_of))

    def _gather(
        self, table: Stored, index: Stored, index_rows: tuple[int, ...], group: int, arrival: int, op: Op
    ) -> None:
        """Index vectors flow outward from slices inside of the table's; the rows flow inward from there."""
        side = table.hemisphere
        for plane in range(table.planes):
            stream = 4 * group + plane
            for i in self.vectors:
                number = table.units[plane]
                cycle = arrival + i - distance(number) - self.lat.gather
                self._emit(
                    Instruction(
                        cycle,
                        number,
                        "mem.gather",
                        (1 - side, stream, side, 4 * group),
                        op.ir,
                        1,
                        table.buffers[plane],
                        0,
                        table.rows,
                    )
                )
                self._travels(side, 1 - side, stream, arrival + i, 1, distance(number))
                self.raw.append((calendar.centre(1 - side, stream), arrival + i))
        # all planes of one table sit at one position, so one index vector serves them
        at = distance(table.units[0])
        if any(distance(u) != at for u in table.units):
            raise LoweringError(f"{self.chain.name}: a gathered table must sit in one slice group")
        for i in self.vectors:
            departs = arrival + i - at - self.lat.gather - at  # at x = 0
            self._outward(
                index,
                index_rows[i],
                side,
                4 * group,
                departs,
                at,
                op,
                form(vxm_alu=self.level, vxm_entry=-1, mem_gather=-1, mem_read=-1),
            )

    def _travels(self, side: int, direction: int, stream: int, diagonal: int, near: int, far: int) -> None:
        self.raw += [(key, diagonal) for key in calendar.span(side, direction, stream, near, far)]

    def _outward(
        self, value: Stored, row: int, side: int, stream: int, departs: int, until: int, op: Op, read: Form
    ) -> None:
        """Read a vector so that it moves outward, up to |x| = until, on the diagonal that leaves x = 0 at
        `departs`.
        """
        for plane in range(value.planes):
            number, buffer, inside = value.place(row, plane)
            cycle = departs + distance(number) - self.lat.read
            self._emit(
                Instruction(cycle, number, "mem.read", (side, stream + plane), op.ir, 1, buffer, inside)
            )
            self._travels(side, side, stream + plane, departs, distance(number), until)
            self.template.reads.append((value, row, cycle, read))

    def _result(
        self, tile: Tile, plane: int, value: Stored, rows: tuple[int, ...], group: int, arrival: int, op: Op
    ) -> None:
        side, name = tile.hemisphere, "ew"[tile.hemisphere]
        emitted = arrival - self.lat.edge
        for i in self.vectors:
            self._emit(
                Instruction(emitted + i, unit(f"mxm.{name}.{plane}.out"), "mxm.emit", (4 * group,), op.ir)
            )
            for byte in range(4):
                self._travels(side, 1 - side, 4 * group + byte, arrival + i, 1, self.lat.edge)
                self.raw.append((calendar.centre(1 - side, 4 * group + byte), arrival + i))
        accepted = emitted - self.lat.mxm
        self._activate(tile, plane, value, rows, accepted, op)

    def _activate(
        self, tile: Tile, plane: int, value: Stored, rows: tuple[int, ...], accepted: int, op: Op
    ) -> None:
        side, name = tile.hemisphere, "ew"[tile.hemisphere]
        key = (id(tile), accepted, rows)
        planes = self.activated.setdefault(key, set())
        stream = 30 if value.type == F16 else 31 - tile.planes[0]
        if not planes:
            for i in self.vectors:
                back = {"vxm_alu": self.level, "vxm_entry": -1, "mxm_latency": -1}
                read = form(**back, sxm_crossing=-2, mem_read=-1)
                self._outward(
                    value, rows[i], side, stream, accepted + i - self.lat.edge, self.lat.edge, op, read
                )
                self.template.activations.append((tile, accepted + i, form(**back, sxm_crossing=-1)))
        planes.add(plane)
        kind = I8 if value.type == I8 else F16
        for i in self.vectors:
            self._emit(
                Instruction(
                    accepted + i,
                    unit(f"mxm.{name}.{plane}.in"),
                    "mxm.activate",
                    (kind, stream),
                    op.ir,
                    flops=2 * LANES * LANES // len(tile.planes),
                )
            )

    def _outputs(self, index: int, op: Op, offset: int, out: tuple[int, int]) -> None:
        direction, group = out
        far: dict[tuple[int, int], int] = {}
        for output in (o for o in self.chain.outs if o.op == index):
            value = output.value
            for i, row in enumerate(output.rows):
                if row < 0:
                    continue
                departs = offset + i + self.lat.alu
                for plane in range(value.planes):
                    stream = 4 * group + plane
                    number, buffer, inside = value.place(row, plane)
                    far[(stream, departs)] = max(far.get((stream, departs), 0), distance(number))
                    cycle = departs + distance(number)
                    if output.scatter is None:
                        self._emit(
                            Instruction(
                                cycle, number, "mem.write", (direction, stream), op.ir, 2, buffer, inside
                            )
                        )
                        self.template.writes.append((value, row, cycle, form(vxm_alu=self.level + 1)))
                if output.scatter is not None:
                    self._scatter(output.scatter, value, direction, group, departs, op)
        for (stream, departs), reach in far.items():
            self._travels(direction, direction, stream, departs, 1, reach)

    def _scatter(self, how: Scatter, value: Stored, direction: int, group: int, departs: int, op: Op) -> None:
        index_stream = 4 * ((group + 4) % 8)
        for plane in range(value.planes):
            number, buffer = value.units[plane], value.buffers[plane]
            cycle = departs + distance(number)
            self._emit(
                Instruction(
                    cycle,
                    number,
                    "mem.scatter",
                    (direction, 4 * group + plane, direction, index_stream),
                    op.ir,
                    2,
                    buffer,
                    0,
                    value.rows,
                )
            )
            for row in range(value.rows):
                self.template.writes.append((value, row, cycle, form(vxm_alu=self.level + 1)))
        until = max(distance(u) for u in value.units)
        read = form(vxm_alu=self.level + 1, mem_read=-1)
        self._outward(how.index, how.index_row, direction, index_stream, departs, until, op, read)
