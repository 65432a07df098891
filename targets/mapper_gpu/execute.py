"""Runs a program of tasks in time order on poisoned memories. Knows the tables and the plan's programs, no
scheduler.

A task finds its operands' places by its coordinates and the operands' layouts, and holds them against the
slices that its row names: a slice that lies elsewhere, or is longer or shorter, is a fault, and so is
reading a byte that nothing has written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault
from mapper.runtime.interface import Memories
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import Int, Phase, Schedule
from mapper.schedule.timeline import Slices, timeline
from mapper_gpu import expert_ops, lowbit_ops, tile_ops

Array = npt.NDArray[Any]
NUMPY = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i64": "int64", "u8": "uint8"}
MEANINGS = tile_ops.MEANINGS | expert_ops.MEANINGS
COORDINATES = slice(2, 8)
"""Where a task's coordinates are among its immediates; the first one is its program."""
LEAST = 19


@dataclass(frozen=True)
class Operand:
    """An operand of a program: its element type and layout, and which rows and columns a task takes. `bits`
    is the size of packed elements (0: the type's own); a column stands for `per` columns of K."""

    dtype: np.dtype[Any]
    rows: int
    width: int
    panel: int
    r: str
    c: Any
    chip: int
    bits: int = 0
    per: int = 1
    stack: int = 1

    def span(self, columns: int) -> int:
        """Bytes of some columns of one row."""
        return lowbit_ops.row_bytes(columns, self.bits) if self.bits else columns * self.dtype.itemsize


@dataclass(frozen=True)
class Stack:
    """The weights of all experts [stack, rows, width] that a task may read, of each the rows that are its
    columns: which expert's is read, and has to be there, its data says."""

    memories: Memories
    memory: int
    low: int
    operand: Operand
    first: int
    last: int

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return self.last - self.first

    def read(self, task: Task, expert: int) -> Array:
        """The rows of one expert's weight, as float32, packed elements as they are. Raises ExecutionFault
        outside of the stack, or on unwritten bytes."""
        o = self.operand
        if not 0 <= expert < o.stack:
            task.fail(f"expert {expert} of {o.stack}")
        row = o.span(o.width)
        low = self.low + (expert * o.rows + self.first) * row
        size = self.columns * row
        unknown = self.memories.written(self.memory).missing(low, low + size)
        if unknown is not None:
            task.fail(f"byte {unknown} of memory {self.memory} is read and was never written")
        flat = self.memories.data(self.memory)[low : low + size].view(o.dtype)
        if o.bits:
            return lowbit_ops.unpacked(flat.reshape(self.columns, row), o.bits, o.width)
        return _floats(flat.reshape(self.columns, o.width))


@dataclass(frozen=True)
class Code:
    """A parsed program."""

    kind: str
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    code: tuple[tuple[Any, ...], ...]


@dataclass
class Task:
    """One task: its slices as (memory, first byte, bytes, offset in its buffer), its coordinates."""

    name: str
    code: Code
    at: tuple[int, ...]
    reads: list[tuple[int, int, int, int]]
    writes: list[tuple[int, int, int, int]]
    batch: int

    def fail(self, reason: str) -> NoReturn:
        raise ExecutionFault(f"{self.name}: {reason}")


def parse(plan: Any, phase: str) -> list[Code]:
    """The programs of a phase. Raises KeyError, TypeError, ValueError where the plan is malformed."""

    def operand(o: Any) -> Operand:
        return Operand(
            dtype(NUMPY[o["dtype"]]),
            int(o["rows"]),
            int(o["width"]),
            int(o["panel"]),
            o["r"],
            o["c"],
            int(o["chip"]),
            int(o.get("bits", 0)),
            max(1, int(o.get("per", 1))),
            int(o.get("stack", 1)),
        )

    return [
        Code(
            p["kind"], tuple(map(operand, p["reads"])), tuple(map(operand, p["writes"])),
            tuple(tuple(i) for i in p["code"]),
        )
        for p in plan["programs"][phase]
    ]  # fmt: skip


def run(schedule: Schedule, phase: Phase, memories: Memories) -> int:
    """Execute a program; the cycles it takes. Raises ExecutionFault."""
    times = timeline(schedule, phase)
    codes = parse(schedule.plan, phase)
    batch = int(schedule.plan["batch"])
    memory, first = (
        np.asarray(schedule.buffers.column(c).to_numpy(), np.int64) for c in ("memory", "offset")
    )
    arguments = [b.steps.args() for b in schedule.programs[phase].blocks]
    steps = np.arange(len(times) + 1)
    accesses = (times.reads, times.writes)
    sides = [(a.slices, a.part.tolist(), np.searchsorted(a.step, steps)) for a in accesses]
    for step in range(len(times)):
        offsets, flat = arguments[times.block[step]]
        row = times.row[step]
        args = flat[offsets[row] : offsets[row + 1]]
        name = f"{phase} {times.name(step)}"
        if len(args) < LEAST or not 0 <= args[0] < len(codes):
            raise ExecutionFault(f"{name}: its immediates name no program")
        code = codes[int(args[0])]
        if schedule.opcodes[times.opcode[step]] != code.kind:
            raise ExecutionFault(
                f"{name}: a {schedule.opcodes[times.opcode[step]]} with the program of a {code.kind}"
            )
        operands = [
            _slices(slices, parts[bound[step] : bound[step + 1]], memory, first)
            for slices, parts, bound in sides
        ]
        task = Task(name, code, tuple(int(v) for v in args[COORDINATES]), operands[0], operands[1], batch)
        with np.errstate(all="ignore"):
            execute(task, memories)
    return schedule.programs[phase].cycles


def _slices(of: Slices, parts: list[int], memory: Int, first: Int) -> list[tuple[int, int, int, int]]:
    return [
        (
            int(memory[of.buffer[i]]),
            int(first[of.buffer[i]] + of.low[i]),
            int(of.high[i] - of.low[i]),
            int(of.low[i]),
        )
        for i in parts
    ]


def execute(task: Task, memories: Memories) -> None:
    """One task: its instructions in order. Writes take effect at once; a row's reads are all before them."""
    registers: dict[str, Any] = {}
    taken = _assign(task, task.code.reads, task.reads, "reads")
    given = _assign(task, task.code.writes, task.writes, "writes")
    for instruction in task.code.code:
        op, *rest = instruction
        if op == "read":
            registers[rest[0]] = _read(task, rest[1], taken, memories)
        elif op == "write":
            _write(task, rest[0], given, registers[rest[1]], memories)
        elif op == "append":
            _append(task, rest, given, registers, memories)
        else:
            meaning: Callable[..., Any] | None = MEANINGS.get(op)
            if meaning is None:
                task.fail(f"unknown instruction {op!r}")
            meaning(task, registers, *rest)


Taken = list[tuple[Operand, list[tuple[int, int, int, int]], tuple[int, int, int, int]]]


def _assign(
    task: Task, operands: tuple[Operand, ...], slices: list[tuple[int, int, int, int]], what: str
) -> Taken:
    """Each operand with its slices and its (r0, r1, c0, c1). Raises ExecutionFault where they do not
    agree."""
    found: Taken = []
    at = 0
    for o in operands:
        ranges, runs = _expected(task, o, what)
        mine = slices[at : at + len(runs)]
        if [(low, n) for _, _, n, low in mine] != runs:
            task.fail(f"{what} {[(low, n) for _, _, n, low in mine]} where its coordinates mean {runs}")
        found.append((o, mine, ranges))
        at += len(runs)
    if at != len(slices):
        task.fail(f"{len(slices)} slices of {what}, its program has {at}")
    return found


def _expected(task: Task, o: Operand, what: str) -> tuple[tuple[int, int, int, int], list[tuple[int, int]]]:
    """(r0, r1, c0, c1) of an operand, and the runs (offset, bytes) of its buffer that hold them."""
    m0, m1, n0, n1, k0, k1 = task.at
    item = o.dtype.itemsize
    if o.r == "cache":
        return _cache_runs(task, o)
    each = max(1, o.width - 1)
    r0, r1 = {"m": (m0, m1), "n": (n0, n1), "all": (0, o.rows), "expert": (n0, n1),
              "blocks": (m0 // each, m1 // each)}[o.r]  # fmt: skip
    if isinstance(o.c, str):
        width = n1 - n0
        attend = next((i for i in task.code.code if i[0] in ("attend", "attend_latent")), None)
        merge = o.c in ("stats", "groups") and attend is None
        dim, value, group = (attend[7], attend[8], attend[9]) if attend else (0, 0, 0)
        if merge:
            spread = [x for x in (*task.code.reads, *task.code.writes) if x.c == "n"]
            whole = next(x.width for x in spread)
            stats = next((x.width for x in task.code.reads if x.c == "stats"), 0)
            group = width * stats // (2 * whole) if whole else 0
        head = n0 // width if width else 0
        each = {"q": dim * group, "stats": 2 * group, "groups": group}.get(o.c, 0)
        del value
        if o.c.startswith("head:"):
            depth, columns = (int(x) for x in o.c.split(":")[1:])
            head, each = n0 // columns, depth
        c0, c1 = {"n": (n0, n1), "k": (k0 // o.per, -(-k1 // o.per)), "all": (0, o.width)}.get(
            o.c, (head * each, (head + 1) * each)
        )
    else:
        c0, c1 = int(o.c[0]), int(o.c[1])
    if not (0 <= r0 < r1 <= o.rows and 0 <= c0 < c1 <= o.width):
        task.fail(f"rows {r0}..{r1}, columns {c0}..{c1} of a value [{o.rows}, {o.width}]")
    if what == "writes":
        return (r0, r1, c0, c1), _runs(o, r0, r1, c0, c1, item)
    if o.r == "expert":
        return (r0, r1, c0, c1), [(0, o.stack * o.rows * o.span(o.width))]
    low, high = c0 // o.panel, -(-c1 // o.panel)
    begin, end, row = low * o.rows + r0, (high - 1) * o.rows + r1, o.span(o.panel)
    return (r0, r1, c0, c1), [(begin * row, (end - begin) * row)]


def _runs(o: Operand, r0: int, r1: int, c0: int, c1: int, item: int) -> list[tuple[int, int]]:
    if o.rows == 1:
        return [(c0 * item, (c1 - c0) * item)]
    if (r0, r1) == (0, o.rows):
        return [(c0 * o.rows * item, (c1 - c0) * o.rows * item)]
    size = (r1 - r0) * o.panel * item
    return [((c * o.rows + r0 * o.panel) * item, size) for c in range(c0, c1, o.panel)]


def _cache_runs(task: Task, o: Operand) -> tuple[tuple[int, int, int, int], list[tuple[int, int]]]:
    """Of a cache [heads, batch, positions, elements]; `panel` is the width of a head."""
    m0, m1, n0, n1, k0, k1 = task.at
    batch = task.batch
    length, row = o.rows // batch, o.panel * o.dtype.itemsize
    tokens = tile_ops.tokens_of(task)
    if o.c == "keys":
        head, sequence = 0 if o.width == o.panel else n0 // (n1 - n0), m0 // tokens
        base = (head * batch + sequence) * length
        return (k0, k1, 0, o.panel), [((base + k0) * row, (k1 - k0) * row)]
    b0, b1 = m0 // tokens, -(-m1 // tokens)
    h0, h1 = n0 // o.panel, -(-n1 // o.panel)
    if (b0, b1) == (0, batch):
        return (b0, b1, h0, h1), [(h0 * batch * length * row, (h1 - h0) * batch * length * row)]
    return (b0, b1, h0, h1), [
        ((h * batch + b0) * length * row, (b1 - b0) * length * row) for h in range(h0, h1)
    ]


def _read(task: Task, number: int, taken: Taken, memories: Memories) -> Array | Stack:
    o, slices, (r0, r1, c0, c1) = taken[number]
    if o.r == "cache" and o.c == "heads":
        return np.zeros(0)
    memory, low, size, _ = slices[0]
    if o.r == "expert":
        return Stack(memories, memory, low, o, r0, r1)
    unknown = memories.written(memory).missing(low, low + size)
    if unknown is not None:
        task.fail(f"byte {unknown} of memory {memory} is read and was never written")
    flat = memories.data(memory)[low : low + size].view(o.dtype)
    if o.r == "cache":
        return _floats(flat.reshape(k1_of(r0, r1), o.panel))
    p, height = o.panel, r1 - r0
    panels = -(-c1 // p) - c0 // p
    first = c0 - c0 // p * p
    if o.bits:
        row = o.span(p)
        raw = np.lib.stride_tricks.as_strided(flat, (height, panels, row), (row, o.rows * row, 1))
        codes = lowbit_ops.unpacked(raw, o.bits, p).reshape(height, panels * p)
        return codes[:, first : first + c1 - c0]
    step = o.rows * p * o.dtype.itemsize
    strides = (step, p * o.dtype.itemsize, o.dtype.itemsize)
    blocks = np.lib.stride_tricks.as_strided(flat, (panels, height, p), strides)
    whole = blocks.transpose(1, 0, 2).reshape(height, panels * p)
    return _floats(whole[:, first : first + c1 - c0])


def k1_of(r0: int, r1: int) -> int:
    """Rows of a stretch."""
    return r1 - r0


def _floats(array: Array) -> Array:
    return array if array.dtype.kind == "i" else array.astype(np.float32)


def _write(task: Task, number: int, given: Taken, value: Array, memories: Memories) -> None:
    o, slices, (r0, r1, c0, c1) = given[number]
    height = r1 - r0
    if value.shape != (height, c1 - c0):
        task.fail(f"writes an array {value.shape} to rows {r0}..{r1}, columns {c0}..{c1}")
    stored = value.astype(o.dtype)
    if o.rows == 1:
        parts = [stored]
    elif len(slices) == 1 and height == o.rows:
        parts = [np.ascontiguousarray(stored.reshape(height, -1, o.panel).transpose(1, 0, 2))]
    else:
        parts = [np.ascontiguousarray(stored[:, c : c + o.panel]) for c in range(0, c1 - c0, o.panel)]
    for (memory, low, size, _), part in zip(slices, parts, strict=True):
        memories.data(memory)[low : low + size] = part.reshape(-1).view(np.uint8)
        memories.written(memory).add(low, low + size)


def _append(task: Task, rest: list[Any], given: Taken, registers: dict[str, Any], memories: Memories) -> None:
    """Rows past .. past + tokens of the cache of each sequence and head of the tile."""
    number, x, past_register, tokens, head = rest
    o, slices, (b0, b1, h0, h1) = given[number]
    past, value = int(registers[past_register][0, 0]), registers[x]
    length = o.rows // task.batch
    if not 0 <= past <= length - tokens:
        task.fail("the position is outside of the context that the program was made for")
    if value.shape != (task.at[1] - task.at[0], (h1 - h0) * head):
        task.fail(f"appends an array {value.shape}")
    row = head * o.dtype.itemsize
    for h in range(h0, h1):
        for i in range(value.shape[0]):
            sequence, token = divmod(task.at[0] + i, tokens)
            place = ((h * task.batch + sequence) * length + past + token) * row
            memory, low = next(
                (m, base + place - off) for m, base, n, off in slices if off <= place < off + n
            )
            part = np.ascontiguousarray(value[i, (h - h0) * head : (h - h0 + 1) * head].astype(o.dtype))
            memories.data(memory)[low : low + row] = part.view(np.uint8)
            memories.written(memory).add(low, low + row)
    del b0, b1
