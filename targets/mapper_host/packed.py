"""A program of a schedule as the interpreter takes it: one line per executed step, with raw addresses.

Everything that does not depend on data is checked here, once: that each step has the operands its opcode
takes, that every operand lies inside its buffer, and that no mapped weight is written. A schedule that
passes cannot make the interpreter touch a byte outside of the memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mapper.backend import Memories
from mapper.errors import ExecutionFault
from mapper.schedule.tables import Block, Int, Schedule
from mapper_host.opcodes import OPERANDS, extents

Span = tuple[int, int, int]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Packed:
    """The interpreter's tables, and what the steps read and write as (memory, first byte, end) per step."""

    rows: Int
    args: Int
    reads: list[list[Span]]
    writes: list[list[Span]]
    names: list[str]

    @property
    def floats(self) -> npt.NDArray[np.float64]:
        """The arguments as float64 of the same bits."""
        return self.args.view(np.float64)


def pack(schedule: Schedule, phase: str, memories: Memories) -> Packed:
    """Tables of program `phase` in time order, on these memories. Raises ExecutionFault."""
    buffers = [memories.bytes_of(i) for i in range(schedule.buffers.num_rows)]
    base = np.array([b.ctypes.data for b in buffers], np.int64)
    size = np.array([b.size for b in buffers], np.int64)
    fixed = np.array([not b.flags.writeable for b in buffers], np.bool_)
    memory, first, length = (
        np.asarray(schedule.buffers.column(c).to_numpy(), np.int64) for c in ("memory", "offset", "bytes")
    )
    parts = [
        _Block(b, n, memory, first, length, size, fixed)
        for n, b in enumerate(schedule.programs[phase].blocks)
    ]
    steps: list[tuple[int, int, int, int]] = []
    arg_base = 0
    for part in parts:
        steps += part.order()
        arg_base += len(part.args[1])
    steps.sort()
    rows = np.zeros((len(steps), 2 + OPERANDS), np.int64)
    reads: list[list[Span]] = []
    writes: list[list[Span]] = []
    starts = np.cumsum([0] + [len(p.args[1]) for p in parts])
    for i, (_, number, repetition, row) in enumerate(steps):
        part = parts[number]
        r, w = part.spans(row, repetition)
        rows[i, 0] = part.opcodes[row]
        rows[i, 1] = starts[number] + part.args[0][row]
        for j, (b, offset) in enumerate(part.places(row, repetition)):
            rows[i, 2 + j] = base[b] + offset
        reads.append(r)
        writes.append(w)
    args = np.concatenate([np.zeros(0, np.int64), *(p.args[1] for p in parts), np.zeros(1, np.int64)])
    names = [f"block {n} row {row} repetition {r}" for _, n, r, row in steps]
    return Packed(rows, args, reads, writes, names)


class _Block:
    """Columns of one block, its slices checked and ready to be bound."""

    def __init__(
        self, block: Block, number: int, memory: Int, first: Int, length: Int, size: Int, fixed: Bools
    ) -> None:
        steps = block.steps
        self.block, self.number = block, number
        self.memory, self.first = memory, first
        self.opcodes, self.starts = steps.column("opcode"), steps.column("start")
        self.args = steps.args()
        self.reads, self.writes = steps.slices("reads"), steps.slices("writes")
        self.bound: dict[int, dict[int, int]] = {}
        if block.bindings is not None:
            columns = (block.bindings.column(k).to_pylist() for k in range(3))
            for slot, repetition, to in zip(*columns, strict=True):
                self.bound.setdefault(slot, {})[repetition] = to
        for row in range(len(steps)):
            self._check(row, length)
        for slices, writing in ((self.reads, False), (self.writes, True)):
            for b in self._reached(slices[1]):
                if length[b] > size[b]:
                    raise ExecutionFault(f"buffer {b} ends beyond its memory")
                if writing and fixed[b]:
                    raise ExecutionFault(f"block {number} writes buffer {b}, which holds weights of a file")

    def _reached(self, buffer: Int) -> set[int]:
        slots = {int(slot) for slot in np.unique(buffer)}
        return slots | {b for slot in slots for b in self.bound.get(slot, {}).values()}

    def _check(self, row: int, length: Int) -> None:
        name = f"block {self.number} row {row}"
        opcode = int(self.opcodes[row])
        args = self.args[1][self.args[0][row] : self.args[0][row + 1]].tolist()
        try:
            wanted = extents(opcode, args)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ExecutionFault(f"{name}: the arguments do not fit opcode {opcode} ({error})") from error
        given: list[int] = []
        for offsets, buffer, offset, count in (self.reads, self.writes):
            for i in range(offsets[row], offsets[row + 1]):
                slots = (int(buffer[i]), *self.bound.get(int(buffer[i]), {}).values())
                if offset[i] + count[i] > min(int(length[b]) for b in slots):
                    raise ExecutionFault(f"{name} reaches beyond buffer {buffer[i]}")
                given.append(int(count[i]))
        if len(given) != len(wanted) or len(given) > OPERANDS:
            raise ExecutionFault(f"{name}: {len(given)} operands for an opcode that takes {len(wanted)}")
        if given != wanted:
            raise ExecutionFault(f"{name}: operands of {given} bytes where the opcode takes {wanted}")

    def order(self) -> list[tuple[int, int, int, int]]:
        """(cycle, block, repetition, row) of every executed step."""
        b = self.block
        return [
            (b.start + r * b.period + int(s), self.number, r, row)
            for r in range(b.repeat)
            for row, s in enumerate(self.starts)
        ]

    def spans(self, row: int, repetition: int) -> tuple[list[Span], list[Span]]:
        """(memory, first byte, end) of each read and write of a step."""
        return self._spans(self.reads, row, repetition), self._spans(self.writes, row, repetition)

    def _spans(self, slices: tuple[Int, Int, Int, Int], row: int, repetition: int) -> list[Span]:
        found: list[Span] = []
        for b, offset, count in self._operands(slices, row, repetition):
            low = int(self.first[b]) + offset
            found.append((int(self.memory[b]), low, low + count))
        return found

    def places(self, row: int, repetition: int) -> list[tuple[int, int]]:
        """(buffer, first byte in it) of each read and write of a step."""
        both = (*self._operands(self.reads, row, repetition), *self._operands(self.writes, row, repetition))
        return [(b, offset) for b, offset, _ in both]

    def _operands(
        self, slices: tuple[Int, Int, Int, Int], row: int, repetition: int
    ) -> list[tuple[int, int, int]]:
        offsets, buffer, offset, count = slices
        found = []
        for i in range(offsets[row], offsets[row + 1]):
            b = int(buffer[i])
            found.append((self.bound.get(b, {}).get(repetition, b), int(offset[i]), int(count[i])))
        return found


def merged(spans: Sequence[Sequence[Span]]) -> list[Span]:
    """The union of spans as few, disjoint ones."""
    out: list[Span] = []
    for m, low, high in sorted({s for group in spans for s in group}):
        if out and out[-1][0] == m and low <= out[-1][2]:
            out[-1] = (m, out[-1][1], max(out[-1][2], high))
        else:
            out.append((m, low, high))
    return out
