"""One program of an lpu schedule as flat columns with named operands: what all checks of this target read.

Arguments are checked here, once per row of a step table; steps with a fault are left out by the other checks
(`legal` is false) and reported by `QueueOrder`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mapper import machine as machines
from mapper.schedule.tables import Int, Program, Schedule
from mapper.schedule.timeline import Timeline, timeline
from mapper_lpu import isa

Bool = npt.NDArray[np.bool_]
T = TypeVar("T")

MAX_CYCLE = 1 << 38
"""No program is longer; keys of stream diagonals are packed on that ground."""

ARGS = 8
"""Most arguments of an instruction."""

CODE = {name: number for number, name in enumerate(isa.OPCODES)}
MEM = tuple(CODE[f"mem.{n}"] for n in ("read", "write", "gather", "scatter"))
READ, WRITE, GATHER, SCATTER = MEM
VXM = tuple(n for name, n in CODE.items() if name.startswith("vxm."))
BINARY = tuple(CODE[n] for n in isa.BINARY_OPS)
CAST = CODE["vxm.cast"]
LOAD, INSTALL, ACTIVATE, EMIT = (CODE[f"mxm.{n}"] for n in ("load", "install", "activate", "emit"))
PERMUTE = CODE["sxm.permute"]
WIDTH = np.array(isa.TYPE_BYTES)


@dataclass(frozen=True)
class Timing:
    """Latencies in cycles, and X, the distance of the MXM from the VXM."""

    read: int
    gather: int
    entry: int
    alu: int
    latency: int
    install: int
    permute: int
    tiles: int
    mxm: int

    @staticmethod
    def of(schedule: Schedule) -> Timing:
        """From the machine file inside the schedule."""
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        return Timing(
            read=machine.whole("mem.read"),
            gather=machine.whole("mem.gather"),
            entry=machine.whole("vxm.entry"),
            alu=machine.whole("vxm.alu"),
            latency=machine.whole("mxm.latency"),
            install=machine.whole("mxm.install"),
            permute=machine.whole("sxm.permute"),
            tiles=machine.whole("chip.tiles"),
            mxm=isa.mxm_position(machine),
        )


@dataclass(frozen=True)
class Columns:
    """One program. `rows` of the step tables of all blocks are stacked; a step is one execution of a row.

    Columns of rows: `code` (of isa.OPCODES, -1 unknown), `unit` (of isa.UNITS, -1 unknown), `args` [rows,
    ARGS] padded with 0, `fault` (index into `faults`, 0 = legal), `x` (position), `block`, `index` (row in
    its block). Columns of steps (rows of the Timeline): `row`, `legal`, `step_code`, `step_unit`, and the MEM
    operand: `buffer` (-1 none), `line` (first 320-byte row within the buffer), `address` (the same within the
    memory), `lines` (number of rows), `reads` and `writes` (number of slices).
    """

    phase: str
    times: Timeline
    timing: Timing
    code: Int
    unit: Int
    args: Int
    fault: Int
    faults: tuple[str, ...]
    x: Int
    row: Int
    legal: Bool
    step_code: Int
    step_unit: Int
    buffer: Int
    line: Int
    address: Int
    lines: Int
    reads: Int
    writes: Int

    def steps(self, *codes: int) -> Int:
        """Legal steps with one of these opcodes, in time order."""
        return np.flatnonzero(self.legal & np.isin(self.step_code, codes))


class Cache:
    """Results of a function of (schedule, phase), kept for as long as the schedule lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Schedule], dict[str, Any]]] = {}

    def get(self, schedule: Schedule, phase: str, make: Callable[[Schedule, str], T]) -> T:
        """`make(schedule, phase)`, computed once."""
        key = id(schedule)
        if key not in self._known:
            reference = weakref.ref(schedule, lambda _: self._known.pop(key, None))
            self._known[key] = (reference, {})
        known: dict[str, T] = self._known[key][1]
        if phase not in known:
            known[phase] = make(schedule, phase)
        return known[phase]


_CACHE = Cache()


def columns(schedule: Schedule, phase: str) -> Columns:
    """The flat columns of program `phase` of a validated schedule."""
    return _CACHE.get(schedule, phase, _columns)


def programs(schedule: Schedule) -> Iterator[Columns]:
    """The columns of every program."""
    for phase in schedule.programs:
        yield columns(schedule, phase)


def unit_map(schedule: Schedule) -> Int:
    """For each of Schedule.units its row in isa.UNITS, or -1."""
    known = {name: number for number, name in enumerate(isa.UNITS)}
    return np.array([known.get(name, -1) for name in schedule.units], np.int64)


def _columns(schedule: Schedule, phase: str) -> Columns:
    times, timing = timeline(schedule, phase), Timing.of(schedule)
    code, unit, args, count = _rows(schedule, schedule.programs[phase])
    duration = _stack(schedule.programs[phase], "duration")
    maps = _map_count(schedule)
    found = list(_faults(code, unit, args, count, duration, timing, maps))
    fault = np.zeros(len(code), np.int64)
    for number in range(len(found), 0, -1):
        fault[found[number - 1][0]] = number
    sizes = [len(b.steps) for b in schedule.programs[phase].blocks]
    base = np.cumsum([0, *sizes])[:-1] if sizes else np.zeros(1, np.int64)
    row = base[times.block] + times.row if len(times) else np.zeros(0, np.int64)
    x = np.array([isa.position(u, timing.mxm - isa.SXM_POSITION) for u in range(len(isa.UNITS))] + [0])
    in_time = np.abs(times.start) < MAX_CYCLE
    buffer, low, high, reads, writes = _operands(times)
    offset = np.append(schedule.buffers.column("offset").to_numpy().astype(np.int64), 0)[buffer]
    return Columns(
        phase, times, timing, code, unit, args, fault, ("", *(text for _, text in found)), x[unit], row,
        in_time & (fault[row] == 0), code[row], unit[row], buffer, low // isa.LANES,
        (low + offset) // isa.LANES, (high - low) // isa.LANES, reads, writes,
    )  # fmt: skip


def _operands(times: Timeline) -> tuple[Int, Int, Int, Int, Int]:
    """(buffer, low, high, number of reads, number of writes) of each step; buffer -1 without memory
    operand."""
    n = len(times)
    buffer, low, high = np.full(n, -1, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    for accesses in (times.writes, times.reads):
        buffer[accesses.step] = accesses.buffer
        low[accesses.step], high[accesses.step] = accesses.low, accesses.high
    reads, writes = (np.bincount(a.step, minlength=n) for a in (times.reads, times.writes))
    return buffer, low, high, reads, writes


def _stack(program: Program, name: str) -> Int:
    return np.concatenate([np.zeros(0, np.int64), *(b.steps.column(name) for b in program.blocks)])


def _rows(schedule: Schedule, program: Program) -> tuple[Int, Int, Int, Int]:
    """(opcode, unit, args, number of args) of the stacked rows, in the numbering of isa.py."""
    opcodes = np.array([CODE.get(name, -1) for name in schedule.opcodes], np.int64)
    args, counts = [np.zeros((0, ARGS), np.int64)], [np.zeros(0, np.int64)]
    for block in program.blocks:
        offsets, flat = block.steps.args()
        count = np.diff(offsets)
        owner = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(flat)) - offsets[owner]
        padded = np.zeros((len(count), ARGS), np.int64)
        padded[owner[place < ARGS], place[place < ARGS]] = flat[place < ARGS]
        args.append(padded)
        counts.append(count)
    code, unit = opcodes[_stack(program, "opcode")], unit_map(schedule)[_stack(program, "unit")]
    return code, unit, np.concatenate(args), np.concatenate(counts)


def permutes(schedule: Schedule) -> list[Any]:
    """The permutation maps of the plan."""
    plan: Any = schedule.plan
    maps = plan.get("permutes") if isinstance(plan, dict) else None
    return maps if isinstance(maps, list) else []


def _map_count(schedule: Schedule) -> int:
    """How many leading maps are well formed: 320 whole numbers in -1..319."""
    for number, entries in enumerate(permutes(schedule)):
        good = isinstance(entries, list | tuple) and len(entries) == isa.LANES
        if not good or not all(isinstance(v, int) and -1 <= v < isa.LANES for v in entries):
            return number
    return len(permutes(schedule))


_COUNT = {
    **dict.fromkeys(MEM[:2], 2), **dict.fromkeys(MEM[2:], 4), **dict.fromkeys(VXM, 5),
    **dict.fromkeys(BINARY, 8), CAST: 7, LOAD: 2, INSTALL: 0, ACTIVATE: 2, EMIT: 1, PERMUTE: 6,
}  # fmt: skip


def operand_types(code: Int, args: Int) -> tuple[Int, Int]:
    """(type of the operands, type of the result) of VXM rows: i32 for iadd, i16 for tanh, as given for cast,
    else f32."""
    integer, cast = code == CODE["vxm.iadd"], code == CAST
    plain = np.where(integer, isa.I32, np.where(code == CODE["vxm.tanh"], isa.I16, isa.F32))
    return np.where(cast, args[:, 5], plain), np.where(cast, args[:, 6], plain)


def result_args(code: Int, args: Int) -> tuple[Int, Int]:
    """(direction, stream) of the results of VXM rows."""
    binary = np.isin(code, BINARY)
    return np.where(binary, args[:, 6], args[:, 3]), np.where(binary, args[:, 7], args[:, 4])


def _faults(
    code: Int, unit: Int, args: Int, count: Int, duration: Int, timing: Timing, maps: int
) -> Iterator[tuple[Bool, str]]:
    """(rows, what is wrong with them)."""
    yield code < 0, "is no instruction of the machine"
    yield unit < 0, "is on a unit that the machine does not have"
    yield (code >= 0) & ~_UNIT_OK[unit, code], "is not an instruction of its unit"
    wanted = np.array([_COUNT[c] for c in range(len(isa.OPCODES))] + [-1])[code]
    yield count != wanted, "has the wrong number of arguments"
    yield (
        duration != np.where(code == INSTALL, timing.install, 1),
        "does not take its queue for the right time",
    )
    a = args.T
    mem, indexed = np.isin(code, MEM), np.isin(code, MEM[2:])
    yield mem & _no_stream(a[0], a[1]), "names no stream"
    yield indexed & (_no_stream(a[2], a[3]) | (a[3] % 2 != 0)), "takes its index from no pair of streams"
    yield from _vxm_faults(code, args)
    yield (
        (code == LOAD) & ((a[0] < 0) | (a[0] >= 20) | ((a[1] != 0) & (a[1] != 16))),
        "has no such load group or base",
    )
    wide = np.where(a[0] == isa.F16, 2, 1)
    bad = ((a[0] != isa.I8) & (a[0] != isa.F16)) | _no_stream(0 * a[1], a[1]) | (a[1] % wide != 0)
    yield (code == ACTIVATE) & bad, "has no such type or stream"
    yield (code == EMIT) & (_no_stream(0 * a[0], a[0]) | (a[0] % 4 != 0)), "has no such stream group"
    bad = _no_stream(a[0], a[1]) | _no_stream(a[2], a[3]) | ~np.isin(a[4], (1, 2, 4))
    bad |= (a[1] + a[4] > isa.STREAMS) | (a[3] + a[4] > isa.STREAMS)
    yield (code == PERMUTE) & bad, "has no such streams"
    yield (code == PERMUTE) & ((a[5] < 0) | (a[5] >= maps)), "has no well-formed permutation map"


def _no_stream(d: Int, s: Int) -> Bool:
    return (d < 0) | (d > 1) | (s < 0) | (s >= isa.STREAMS)


def _vxm_faults(code: Int, args: Int) -> Iterator[tuple[Bool, str]]:
    vxm, binary, cast = np.isin(code, VXM), np.isin(code, BINARY), code == CAST
    types = (args[:, 5:7] < 0) | (args[:, 5:7] >= len(WIDTH))
    yield cast & types.any(axis=1), "has no such type"
    source, result = (np.clip(t, 0, len(WIDTH) - 1) for t in operand_types(code, args))
    for number, present in ((0, vxm), (3, binary)):
        kind, d, s = (args[:, number + k] for k in range(3))
        yield present & ((kind < 0) | (kind > isa.ACC)), "has no such kind of operand"
        flows = present & ((kind == isa.OUTER) | (kind == isa.INNER))
        bad = (d < 0) | (d > 1) | (s < 0) | (s >= isa.STREAMS) | (s % WIDTH[source] != 0)
        yield flows & bad, "takes an operand from no aligned group of streams"
        yield (
            present & (kind == isa.IMMEDIATE) & ((d < -(1 << 31)) | (d >= 1 << 32)),
            "has no 32-bit immediate",
        )
    d, s = result_args(code, args)
    bad = (d < -1) | (d > 1) | ((d >= 0) & ((s < 0) | (s >= isa.STREAMS) | (s % WIDTH[result] != 0)))
    yield vxm & bad, "gives its result to no aligned group of streams"


def _unit_table() -> Bool:
    """[unit, opcode]: which queue takes which instruction; the last row is the unknown unit."""
    queue = {LOAD: "load", INSTALL: "load", ACTIVATE: "in", EMIT: "out", PERMUTE: "permute"}
    table = np.zeros((len(isa.UNITS) + 1, len(isa.OPCODES)), bool)
    for u, name in enumerate(isa.UNITS):
        part = name.split(".")
        for c, opcode in enumerate(isa.OPCODES):
            table[u, c] = part[0] == opcode.split(".")[0] and (c not in queue or part[-1] == queue[c])
    return table


_UNIT_OK = _unit_table()
