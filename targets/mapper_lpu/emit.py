"""The instructions of a chain whose VXM assignment is known: reads, activations, operations, writes."""

from __future__ import annotations

from mapper.errors import LoweringError
from mapper_lpu import calendar
from mapper_lpu.assign import Assignment, Node
from mapper_lpu.chain import Chain, Gather, Hold, Imm, Mem, Mxm, Op, Operand, Res, Scatter, Self, Tile
from mapper_lpu.instruction import (
    FIRST_ALU,
    Form,
    Instruction,
    Latencies,
    Template,
    distance,
    form,
    immediate,
    unit,
)
from mapper_lpu.isa import ACC, F16, I8, IMMEDIATE, INNER, LANES, OUTER, TYPE_BYTES
from mapper_lpu.storage import Stored


class Emitter:
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
