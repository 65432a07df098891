"""A program as one matrix of instructions in time order for the compiled loop; refused where malformed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ExecutionFault, MachineError, ScheduleError
from mapper.machine import Machine, parse
from mapper.schedule.tables import Block, Int, Phase, Schedule
from mapper_lpu import isa
from mapper_lpu.chip import codes
from mapper_lpu.chip.state import Timing

Bool = npt.NDArray[np.bool_]

_NAMES = tuple(codes.OPERATIONS)
_ARGUMENTS = {"mem.read": 2, "mem.write": 2, "mem.gather": 4, "mem.scatter": 4, "vxm.cast": 7, "mxm.load": 2}
_ARGUMENTS |= {"mxm.install": 0, "mxm.activate": 2, "mxm.emit": 1, "sxm.permute": 6}
_ARGUMENTS |= dict.fromkeys(isa.BINARY_OPS, 8) | dict.fromkeys(isa.UNARY_OPS, 5)
_COUNTS = np.array([_ARGUMENTS[n] for n in _NAMES])
_QUEUES = {"mem": "mem", "vxm": "vxm", "load": "load", "install": "load", "activate": "in", "emit": "out"}
_QUEUES |= {"permute": "permute"}
_BYTES = np.array(isa.TYPE_BYTES)


def _queue(name: str) -> str:
    """Which sort of queue a unit is: mem, vxm, load, in, out, permute, ..."""
    head, *_, tail = name.split(".")
    return head if head in ("mem", "vxm") else tail


_UNIT_QUEUES = np.array([_queue(u) for u in isa.UNITS])
_OPERATION_QUEUES = np.array([_QUEUES.get(n.split(".")[0]) or _QUEUES[n.split(".")[1]] for n in _NAMES])


@dataclass(frozen=True)
class Expanded:
    """matrix: int64 [n, codes.COLUMNS] sorted by (cycle, unit); order: rows that produce, by OUT_CYCLE.

    `place` [n, 3]: block, row in its table, and repetition of every instruction. `pool`: rows of the pool.
    """

    matrix: Int
    order: Int
    place: Int
    pool: int
    timing: Timing
    tiles: int
    permutes: Int

    def fault(self, row: int, reason: str) -> ExecutionFault:
        """The error that names an instruction: cycle, unit, opcode, place in the schedule, reason."""
        m, (block, step, repetition) = self.matrix[row], self.place[row]
        return ExecutionFault(
            f"cycle {m[codes.CYCLE]}: {isa.UNITS[m[codes.UNIT]]} {_NAMES[m[codes.OPERATION]]}: {reason} "
            f"(block {block}, step {step}, repetition {repetition})"
        )

    def refuse(self, bad: Bool, reason: str) -> None:
        """Raise `fault` for the first instruction that is bad."""
        if bad.any():
            raise self.fault(int(np.flatnonzero(bad)[0]), reason)


def expand(schedule: Schedule, phase: Phase) -> Expanded:
    """Unroll the program of a phase.

    Raises ExecutionFault for an instruction that no chip could take, ScheduleError for a name or map that
    does not exist, MachineError for latencies below one cycle.
    """
    program = schedule.programs[phase]
    machine = parse(schedule.machine_toml)
    parts = [_block(schedule, block, number) for number, block in enumerate(program.blocks)]
    matrix = np.concatenate([p[0] for p in parts]) if parts else np.zeros((0, codes.COLUMNS), np.int64)
    place = np.concatenate([p[1] for p in parts]) if parts else np.zeros((0, 3), np.int64)
    rank = np.lexsort((matrix[:, codes.UNIT], matrix[:, codes.CYCLE]))
    matrix, place = matrix[rank], place[rank]
    _locate(matrix, machine)
    latency = _outputs(matrix, machine)
    timing = Timing(
        machine.whole("vxm.entry"),
        machine.whole("vxm.alu"),
        machine.whole("mxm.latency"),
        machine.whole("mxm.install"),
        isa.mxm_position(machine),
    )
    pool = _pool(matrix, latency + 2 * timing.edge + timing.entry + 2)
    makes = np.flatnonzero(matrix[:, codes.OUT_WIDTH])
    order = makes[np.argsort(matrix[makes, codes.OUT_CYCLE], kind="stable")]
    plan: Any = schedule.plan
    maps = plan.get("permutes", []) if isinstance(plan, dict) else []
    permutes = np.array(maps, np.int64).reshape(-1, isa.LANES)
    done = Expanded(matrix, order, place, pool, timing, machine.whole("chip.tiles"), permutes)
    _verify(done)
    return done


def _numbers(names: tuple[str, ...], known: dict[str, int], what: str) -> Int:
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ScheduleError(f"the lpu has no {what} {unknown[0]!r}")
    return np.array([known[n] for n in names], np.int64)


def _block(schedule: Schedule, block: Block, number: int) -> tuple[Int, Int]:
    """Instruction matrix and places of one block, all repetitions, in table order."""
    count, times = len(block.steps), block.repeat
    units = _numbers(schedule.units, {n: i for i, n in enumerate(isa.UNITS)}, "unit")
    operations = _numbers(schedule.opcodes, codes.OPERATIONS, "opcode")
    one = np.zeros((count, codes.COLUMNS), np.int64)
    one[:, codes.CYCLE] = block.steps.column("start") + block.start
    one[:, codes.UNIT] = units[block.steps.column("unit")]
    one[:, codes.OPERATION] = operations[block.steps.column("opcode")]
    place = np.stack([np.full(count, number), np.arange(count), np.zeros(count, np.int64)], axis=1)
    _arguments(one, place, *block.steps.args())
    matrix, places = np.tile(one, (times, 1)), np.tile(place, (times, 1))
    repetition = np.repeat(np.arange(times), count)
    matrix[:, codes.CYCLE] += repetition * block.period
    places[:, 2] = repetition
    _memory(schedule, block, matrix, places)
    return matrix, places


def _bare(matrix: Int, place: Int) -> Expanded:
    """Rows that can be named in an error, before the rest is known."""
    return Expanded(matrix, place[:0, 0], place, 0, Timing(0, 0, 0, 0, 0), 0, place[:0])


def _arguments(matrix: Int, place: Int, offsets: Int, flat: Int) -> None:
    """Spread the arguments over ten columns, the VXM's in its fixed order."""
    operation = matrix[:, codes.OPERATION]
    given = np.diff(offsets)
    _bare(matrix, place).refuse(given != _COUNTS[operation], "has a wrong number of arguments")
    table = np.zeros((len(matrix), 10), np.int64)
    row = np.repeat(np.arange(len(matrix)), given)
    table[row, np.arange(len(flat)) - offsets[row]] = flat
    single = (operation >= codes.NEG) & (operation <= codes.CAST)
    table[single, 8:10] = table[single, 5:7]
    table[single, 6:8] = table[single, 3:5]
    table[single, 3:6] = (-1, 0, 0)
    plain = (operation >= codes.ADD) & (operation < codes.CAST)
    table[plain, 8:10] = codes.F32
    table[operation == codes.TANH, 8:10] = codes.I16
    matrix[:, codes.ARGS : codes.ARGS + 10] = table


def _memory(schedule: Schedule, block: Block, matrix: Int, place: Int) -> None:
    """Resolve the memory operand of every MEM instruction, buffers bound per repetition."""
    times = block.repeat
    operation = matrix[: len(block.steps), codes.OPERATION]
    bare = _bare(matrix, place)
    for which, wanted in (
        ("reads", np.isin(operation, (codes.READ, codes.GATHER))),
        ("writes", np.isin(operation, (codes.WRITE, codes.SCATTER))),
    ):
        offsets, buffer, offset, size = block.steps.slices(which)  # type: ignore[arg-type]
        bare.refuse(np.tile(np.diff(offsets) != wanted, times), f"has a wrong number of memory {which}")
        rows = (np.arange(times)[:, None] * len(operation) + np.flatnonzero(wanted)).ravel()
        repetition = np.repeat(np.arange(times), wanted.sum())
        bound = _bind(block, np.tile(buffer, times), repetition, schedule.buffers.num_rows)
        _address(schedule, matrix, place, rows, bound, np.tile(offset, times), np.tile(size, times))


def _bind(block: Block, buffer: Int, repetition: Int, count: int) -> Int:
    """The buffer that stands for each slot in its repetition."""
    if block.bindings is None or not block.bindings.num_rows:
        return buffer
    table = np.tile(np.arange(count), (block.repeat, 1))
    slot, at, to = (
        block.bindings.column(n).to_numpy().astype(np.int64) for n in ("slot", "repetition", "buffer")
    )
    table[at, slot] = to
    return np.asarray(table[repetition, buffer], np.int64)


def _address(
    schedule: Schedule, matrix: Int, place: Int, rows: Int, buffer: Int, offset: Int, size: Int
) -> None:
    memory, base, length = (
        schedule.buffers.column(n).to_numpy().astype(np.int64)[buffer] for n in ("memory", "offset", "bytes")
    )
    part = _bare(matrix[rows], place[rows])
    homes = _numbers(
        tuple(n for n, _ in schedule.memories),
        {n: i for i, n in enumerate(isa.UNITS[: 2 * isa.SLICES])},
        "memory",
    )
    single = np.isin(part.matrix[:, codes.OPERATION], (codes.READ, codes.WRITE))
    part.refuse(homes[memory] != part.matrix[:, codes.UNIT], "its operand is in another unit's memory")
    part.refuse((base + offset) % isa.LANES != 0, "its operand does not begin at a row")
    part.refuse((size % isa.LANES != 0) | (size <= 0), "its operand is not a whole number of rows")
    part.refuse(single & (size != isa.LANES), "its operand is not one row")
    part.refuse((offset < 0) | (offset + size > length), "its operand is outside its buffer")
    part.refuse(
        (base + offset < 0) | (base + offset + size > isa.ROWS * isa.LANES),
        "its operand is outside the slice",
    )
    matrix[rows, codes.MEMORY] = memory
    matrix[rows, codes.ADDRESS] = base + offset
    matrix[rows, codes.ROWS] = size // isa.LANES


def _locate(matrix: Int, machine: Machine) -> None:
    """Position of each instruction's unit and the number of its ALU or MXM plane."""
    crossing = machine.whole("sxm.crossing")
    positions = np.array([isa.position(u, crossing) for u in range(len(isa.UNITS))])
    local = np.zeros(len(isa.UNITS), np.int64)
    for number, name in enumerate(isa.UNITS):
        parts = name.split(".")
        if parts[0] == "vxm":
            local[number] = int(parts[1])
        elif parts[0] == "mxm":
            local[number] = 2 * "ew".index(parts[1]) + int(parts[2])
    matrix[:, codes.X] = positions[matrix[:, codes.UNIT]]
    matrix[:, codes.LOCAL] = local[matrix[:, codes.UNIT]]


def _outputs(matrix: Int, machine: Machine) -> int:
    """Fill in what each instruction produces, where and when. Returns the longest latency."""
    operation, args = matrix[:, codes.OPERATION], matrix[:, codes.ARGS : codes.ARGS + 10]
    latency = np.zeros(len(codes.OPERATIONS), np.int64)
    latency[codes.READ] = machine.whole("mem.read")
    latency[codes.GATHER] = machine.whole("mem.gather")
    latency[codes.ADD : codes.LOAD] = machine.whole("vxm.alu")
    latency[codes.PERMUTE] = machine.whole("sxm.permute")
    if min(machine.value(k) for k in ("mem.read", "mem.gather", "vxm.alu", "sxm.permute", "mxm.latency")) < 1:
        raise MachineError(f"machine {machine.name!r}: a latency is below one cycle")
    matrix[:, codes.OUT_CYCLE] = matrix[:, codes.CYCLE] + latency[operation]
    out = matrix[:, codes.OUT_DIRECTION : codes.OUT_WIDTH + 1]
    simple = (operation == codes.READ) | (operation == codes.GATHER)
    out[simple, :2], out[simple, 2] = args[simple, :2], 1
    vxm = (operation >= codes.ADD) & (operation < codes.LOAD) & (args[:, 6] != -1)
    out[vxm, :2] = args[vxm, 6:8]
    out[vxm, 2] = _BYTES[np.clip(args[vxm, 9], 0, 4)]
    emit = operation == codes.EMIT
    out[emit, 0] = np.where(matrix[emit, codes.X] > 0, isa.WEST, isa.EAST)
    out[emit, 1], out[emit, 2] = args[emit, 0], 4
    permute = operation == codes.PERMUTE
    out[permute] = args[permute, 2:5]
    return int(latency.max())


def _pool(matrix: Int, life: int) -> int:
    """Give each produced vector its rows of a ring in which no row is reused within `life` cycles."""
    width = matrix[:, codes.OUT_WIDTH]
    ends = np.cumsum(width)
    cycle = matrix[:, codes.CYCLE]
    until = np.searchsorted(cycle, cycle + life, side="right")
    first = ends - width
    rows = int((ends[until - 1] - first).max(initial=1))
    matrix[:, codes.OUT_ROW] = first % rows
    return rows


def _verify(done: Expanded) -> None:
    """Refuse instructions that are malformed whatever the data."""
    m, refuse = done.matrix, done.refuse
    operation, args = m[:, codes.OPERATION], m[:, codes.ARGS : codes.ARGS + 10]
    refuse(m[:, codes.CYCLE] < 0, "is issued before cycle 0")
    refuse(_UNIT_QUEUES[m[:, codes.UNIT]] != _OPERATION_QUEUES[operation], "cannot run on this unit")
    makes = m[:, codes.OUT_WIDTH] > 0
    _streams(done, makes, m[:, codes.OUT_DIRECTION], m[:, codes.OUT_STREAM], m[:, codes.OUT_WIDTH])
    moves = np.isin(operation, (codes.WRITE, codes.SCATTER))
    _streams(done, moves, args[:, 0], args[:, 1], 1)
    indexed = np.isin(operation, (codes.GATHER, codes.SCATTER))
    _streams(done, indexed, args[:, 2], args[:, 3], 2)
    permute = operation == codes.PERMUTE
    refuse(permute & ~np.isin(args[:, 4], (1, 2, 4)), "its width is not 1, 2 or 4")
    _streams(done, permute, args[:, 0], args[:, 1], args[:, 4])
    refuse(permute & ((args[:, 5] < 0) | (args[:, 5] >= len(done.permutes))), "its map does not exist")
    if (done.permutes < -1).any() or (done.permutes >= isa.LANES).any():
        raise ScheduleError(f"a permute map has entries outside -1..{isa.LANES - 1}")
    load = operation == codes.LOAD
    refuse(load & ((args[:, 0] < 0) | (args[:, 0] >= 20)), "its group is outside 0..19")
    refuse(load & ~np.isin(args[:, 1], (0, 16)), "its base is not 0 or 16")
    activate = operation == codes.ACTIVATE
    refuse(activate & ~np.isin(args[:, 0], (codes.I8, codes.F16)), "its type is not i8 or f16")
    _streams(done, activate, 0, args[:, 1], np.where(args[:, 0] == codes.F16, 2, 1))
    _vector(done)


def _streams(done: Expanded, where: Bool, direction: Any, stream: Any, width: Any) -> None:
    """Streams must exist and be aligned to the width."""
    done.refuse(where & ((direction != isa.EAST) & (direction != isa.WEST)), "its direction is not 0 or 1")
    span = np.maximum(width, 1)
    done.refuse(where & ((stream < 0) | (stream + span > isa.STREAMS)), "its stream is outside 0..31")
    done.refuse(where & (stream % span != 0), "its streams are not aligned to their type")


def _vector(done: Expanded) -> None:
    """The VXM's types, operand kinds and wiring rule."""
    m, refuse = done.matrix, done.refuse
    operation, args = m[:, codes.OPERATION], m[:, codes.ARGS : codes.ARGS + 10]
    vxm = (operation >= codes.ADD) & (operation < codes.LOAD)
    refuse(vxm & ((args[:, 8:10] < 0) | (args[:, 8:10] > 4)).any(axis=1), "its type does not exist")
    small = np.isin(operation, [codes.OPERATIONS[n] for n in isa.SMALL_OPS])
    large = np.isin(m[:, codes.LOCAL], sorted(isa.LARGE_ALUS))
    refuse(vxm & ~small & ~large, "needs a large ALU")
    size = _BYTES[np.clip(args[:, 8], 0, 4)]
    low = 2 * (m[:, codes.LOCAL] // 4)
    travels = []
    for which in (0, 1):
        kind, direction, stream = args[:, 3 * which], args[:, 3 * which + 1], args[:, 3 * which + 2]
        there = vxm & ((operation < codes.NEG) | (which == 0))
        refuse(there & ((kind < 0) | (kind > 3)), "its operand is of no known kind")
        travelling = there & ((kind == isa.OUTER) | (kind == isa.INNER))
        _streams(done, travelling, direction, stream, size)
        refuse(
            travelling & ((stream // 4 - low) % 8 > 3), "its operand's streams do not reach this row of ALUs"
        )
        travels.append(travelling)
    opposite = travels[0] & travels[1] & (args[:, 1] != args[:, 4])
    refuse(opposite & (args[:, 2] // 4 == args[:, 5] // 4), "takes one stream group from both directions")
