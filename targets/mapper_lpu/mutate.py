"""Mutation operators of the lpu target: each breaks one rule of ISA.md, or changes what is computed.

All random choices come from `rng`. An operator returns None where the schedule has nothing that it could
break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mapper.schedule.edit import Place, Row, step_at, with_step
from mapper.schedule.mutate import Mutant, Mutation
from mapper.schedule.tables import Int, Schedule
from mapper_lpu import isa

TRIES = 64
Change = Callable[[Schedule, Place, Row, np.random.Generator], tuple[Row | None, str] | None]


@dataclass(frozen=True)
class OnOpcodes:
    """Changes one random step with one of `opcodes`. `change` gives the new row (None: drop it) and words for
    it, or None to try another step."""

    name: str
    opcodes: tuple[str, ...]
    change: Change

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = _steps(schedule, self.opcodes)
        for _ in range(TRIES if found else 0):
            place = _choose(found, rng)
            row = step_at(schedule, place)
            done = self.change(schedule, place, row, rng)
            if done is not None:
                opcode, unit = schedule.opcodes[row["opcode"]], schedule.units[row["unit"]]
                words = f"{place} ({opcode} on {unit}, cycle {row['start']}): {done[1]}"
                return with_step(schedule, place, done[0]), words
        return None


def _steps(schedule: Schedule, opcodes: tuple[str, ...]) -> list[tuple[str, int, Int]]:
    """(phase, block, rows) of the steps with these opcodes; each block has at least one."""
    numbers = [n for n, name in enumerate(schedule.opcodes) if name in opcodes]
    found = []
    for phase, program in schedule.programs.items():
        for block, content in enumerate(program.blocks):
            rows = np.flatnonzero(np.isin(content.steps.column("opcode"), numbers))
            if len(rows):
                found.append((phase, block, rows))
    return found


def _choose(found: list[tuple[str, int, Int]], rng: np.random.Generator) -> Place:
    sizes = np.array([len(rows) for _, _, rows in found])
    phase, block, rows = found[rng.choice(len(found), p=sizes / sizes.sum())]
    return Place(phase, block, int(rng.choice(rows)))


def _other(value: int, choices: range | list[int], rng: np.random.Generator) -> int:
    return int(rng.choice([c for c in choices if c != value]))


def _with_args(row: Row, values: dict[int, int]) -> Row:
    return {**row, "args": [values.get(i, v) for i, v in enumerate(row["args"])]}


def _code(schedule: Schedule, row: Row) -> str:
    return str(schedule.opcodes[row["opcode"]])


def _shift(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    by = int(rng.choice([-1, 1]))
    return {**row, "start": row["start"] + by}, f"issued {by:+d} cycle"


def _stream_args(schedule: Schedule, row: Row) -> list[tuple[int, int]]:
    """(place of the direction in the arguments or -1, place of the stream) of every operand on a stream."""
    code, args = _code(schedule, row), row["args"]
    if code in ("mem.read", "mem.write"):
        return [(0, 1)]
    if code in ("mem.gather", "mem.scatter"):
        return [(0, 1), (2, 3)]
    if code == "sxm.permute":
        return [(0, 1), (2, 3)]
    if code in ("mxm.activate", "mxm.emit"):
        return [(-1, len(args) - 1)]
    if code == "mxm.load":
        return [(-1, 1)]
    if not code.startswith("vxm."):
        return []
    binary = code in isa.BINARY_OPS
    starts = [0, 3] if binary else [0]
    places = [(k + 1, k + 2) for k in starts if args[k] in (isa.OUTER, isa.INNER)]
    out = 6 if binary else 3
    return [*places, (out, out + 1)] if args[out] >= 0 else places


def _grain(schedule: Schedule, row: Row, stream: int) -> int:
    """The alignment of the stream at that place of the arguments."""
    code = _code(schedule, row)
    if code == "vxm.cast":
        return isa.TYPE_BYTES[row["args"][5 if stream == 2 else 6]]
    if code.startswith("vxm.") or code == "mxm.emit":
        return 4
    if code == "mxm.load":
        return 16
    if code in ("mem.gather", "mem.scatter") and stream == 3:
        return 2
    return 2 if code == "mxm.activate" and row["args"][0] == isa.F16 else 1


def _stream(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    operands = _stream_args(schedule, row)
    if not operands:
        return None
    _, at = operands[rng.integers(len(operands))]
    old, grain = row["args"][at], _grain(schedule, row, at)
    last = isa.STREAMS - (row["args"][4] if _code(schedule, row) == "sxm.permute" else grain)
    new = _other(old, range(0, last + 1, grain), rng)
    return _with_args(row, {at: new}), f"argument {at}: stream {new} instead of {old}"


def _direction(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    operands = [d for d, _ in _stream_args(schedule, row) if d >= 0]
    if not operands:
        return None
    at = operands[rng.integers(len(operands))]
    return _with_args(row, {at: 1 - row["args"][at]}), f"argument {at}: the other direction"


def _alu(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """An ALU that cannot take the step's place: too small, not wired to its operands, or with another
    output."""
    names = [n for n, name in enumerate(schedule.units) if name.startswith("vxm.") and n != row["unit"]]
    units = [n for n in names if _unfit(schedule, row, int(schedule.units[n].split(".")[1]))]
    if not units:
        return None
    new = int(rng.choice(units))
    return {**row, "unit": new}, f"on {schedule.units[new]}"


def _unfit(schedule: Schedule, row: Row, alu: int) -> bool:
    code, args = _code(schedule, row), row["args"]
    starts = (0, 3) if code in isa.BINARY_OPS else (0,)
    groups = [args[k + 2] // 4 for k in starts if args[k] in (isa.OUTER, isa.INNER)]
    if alu not in isa.LARGE_ALUS and code not in isa.SMALL_OPS:
        return True
    return any(args[k] == isa.ACC for k in starts) or any((g - 2 * (alu // 4)) % 8 > 3 for g in groups)


def _swap(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    args = row["args"]
    if args[:3] == args[3:6]:
        return None
    return {**row, "args": [*args[3:6], *args[:3], *args[6:]]}, "operands A and B change places"


_INSTEAD = {
    "vxm.add": "vxm.sub", "vxm.sub": "vxm.add", "vxm.mul": "vxm.add", "vxm.max": "vxm.min",
    "vxm.min": "vxm.max", "vxm.iadd": "vxm.add", "vxm.neg": "vxm.copy", "vxm.copy": "vxm.neg",
    "vxm.relu": "vxm.neg", "vxm.exp2": "vxm.tanh", "vxm.rsqrt": "vxm.exp2", "vxm.tanh": "vxm.exp2",
}  # fmt: skip


def _opcode(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    new = _INSTEAD[_code(schedule, row)]
    if new not in schedule.opcodes:
        return None
    return {**row, "opcode": schedule.opcodes.index(new)}, f"{new} instead"


def _operand(row: Row) -> tuple[str, dict[str, int]] | None:
    for which in ("reads", "writes"):
        if row[which]:
            return which, row[which][0]
    return None


def _row(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    which, old = _operand(row) or ("", {})
    rows = schedule.buffers.column("bytes")[old["buffer"]].as_py() // isa.LANES if old else 0
    if rows < 2 or old["bytes"] != isa.LANES:
        return None
    here = old["offset"] // isa.LANES
    new = _other(here, range(rows), rng)
    return {**row, which: [{**old, "offset": new * isa.LANES}]}, f"row {new} of its buffer instead of {here}"


def _buffer(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    which, old = _operand(row) or ("", {})
    if not old:
        return None
    table = schedule.buffers
    memory, size = (table.column(n).to_numpy() for n in ("memory", "bytes"))
    program = table.column("program").to_numpy(zero_copy_only=False)
    fits = (memory == memory[old["buffer"]]) & (size >= old["offset"] + old["bytes"])
    fits &= (program == "") | (program == place.phase)
    fits[old["buffer"]] = False
    if not fits.any():
        return None
    new = int(rng.choice(np.flatnonzero(fits)))
    names = [table.column("value")[b].as_py() for b in (new, old["buffer"])]
    return {**row, which: [{**old, "buffer": new}]}, f"buffer {names[0]} instead of {names[1]}"


def _drop(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    return None, "dropped"


def _group(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    new = _other(row["args"][0], range(20), rng)
    return _with_args(row, {0: new}), f"load group {new} instead of {row['args'][0]}"


def _index(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    new = _other(row["args"][3], range(0, isa.STREAMS, 2), rng)
    return _with_args(row, {3: new}), f"index from stream {new} instead of {row['args'][3]}"


def _immediate(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    binary = _code(schedule, row) in isa.BINARY_OPS
    places = [k + 1 for k in ((0, 3) if binary else (0,)) if row["args"][k] == isa.IMMEDIATE]
    if not places:
        return None
    at = places[rng.integers(len(places))]
    old = row["args"][at]
    # one bit of the upper mantissa or the exponent; a zero becomes 1.0
    new = old ^ (1 << int(rng.integers(19, 30))) if old & 0x7FFFFFFF else 0x3F800000
    return _with_args(row, {at: new}), f"immediate {new & 0xFFFFFFFF:#x} instead of {old & 0xFFFFFFFF:#x}"


def _type(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    if _code(schedule, row) == "mxm.activate":
        new = isa.I8 if row["args"][0] == isa.F16 else isa.F16
        return _with_args(row, {0: new}), "activation of the other type"
    at = int(rng.integers(5, 7))
    new = _other(row["args"][at], range(5), rng)
    return _with_args(row, {at: new}), f"type code {new} instead of {row['args'][at]}"


@dataclass(frozen=True)
class SwapSteps:
    """Two steps of one block exchange part of their content; `pair` finds the partner of a random step."""

    name: str
    opcodes: tuple[str, ...]
    pair: Callable[[Schedule, Place, Row, np.random.Generator], tuple[int, tuple[str, ...], str] | None]

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = _steps(schedule, self.opcodes)
        for _ in range(TRIES if found else 0):
            place = _choose(found, rng)
            row = step_at(schedule, place)
            partner = self.pair(schedule, place, row, rng)
            if partner is None:
                continue
            other_place = replace(place, row=partner[0])
            other = step_at(schedule, other_place)
            swapped = [{**a, **{k: b[k] for k in partner[1]}} for a, b in ((row, other), (other, row))]
            # same start and unit before and after, so the rows stay where they are
            first = with_step(schedule, place, swapped[0])
            return with_step(first, other_place, swapped[1]), f"{place} and row {partner[0]}: {partner[2]}"
        return None


def _partner(rows: Int, rng: np.random.Generator) -> int | None:
    return int(rng.choice(rows)) if len(rows) else None


def _load_pair(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    steps = schedule.programs[place.phase].blocks[place.block].steps
    rows = np.flatnonzero((steps.column("unit") == row["unit"]) & (steps.column("opcode") == row["opcode"]))
    near = rows[np.abs(steps.column("start")[rows] - row["start"]) < 20]
    other = _partner(near[near != place.row], rng)
    return None if other is None else (other, ("args",), "load groups change places")


def _plane_pair(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    steps = schedule.programs[place.phase].blocks[place.block].steps
    same = (steps.column("opcode") == row["opcode"]) & (steps.column("start") == row["start"])
    same &= steps.column("op") == row["op"]
    names = schedule.buffers.column("value")
    which, mine = _operand(row) or ("reads", {"buffer": 0})
    value = str(names[mine["buffer"]].as_py()).split("#")[0]
    offsets, buffer, _, _ = steps.slices("reads" if which == "reads" else "writes")
    rows = []
    for r in np.flatnonzero(same):
        if r != place.row and offsets[r + 1] > offsets[r]:
            other = str(names[int(buffer[offsets[r]])].as_py())
            if other.split("#")[0] == value:
                rows.append(int(r))
    found = _partner(np.array(rows, np.int64), rng)
    return None if found is None else (found, ("args",), "byte planes change places")


@dataclass(frozen=True)
class Duplicate:
    """Issues a step twice: again a few cycles later, on the same queue."""

    name: str = "duplicate_step"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = _steps(schedule, isa.OPCODES)
        if not found:
            return None
        place, by = _choose(found, rng), int(rng.integers(1, 8))
        row = step_at(schedule, place)
        doubled = _doubled(schedule, place)
        # of the two equal rows the second becomes the later one
        second = replace(place, row=place.row + 1)
        return with_step(
            doubled, second, {**row, "start": row["start"] + by}
        ), f"{place}: again {by} cycles later"


def _doubled(schedule: Schedule, place: Place) -> Schedule:
    """The schedule with this row of a step table twice."""
    program = schedule.programs[place.phase]
    block = program.blocks[place.block]
    table = block.steps.table
    pieces = [table.slice(0, place.row + 1), table.slice(place.row)]
    steps = replace(block.steps, table=pa.concat_tables(pieces).combine_chunks())
    blocks = list(program.blocks)
    blocks[place.block] = replace(block, steps=steps)
    programs = {**schedule.programs, place.phase: replace(program, blocks=tuple(blocks))}
    return replace(schedule, programs=programs)


@dataclass(frozen=True)
class PermuteEntry:
    """Changes one entry of a permutation map that a step uses."""

    name: str = "permute_entry"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> Mutant | None:
        """See Mutation."""
        found = _steps(schedule, ("sxm.permute",))
        plan: Any = schedule.plan
        if not found or not isinstance(plan, dict):
            return None
        number = step_at(schedule, _choose(found, rng))["args"][5]
        maps = [list(m) for m in plan["permutes"]]
        lanes = [lane for lane, source in enumerate(maps[number]) if source >= 0]
        if not lanes:
            return None
        lane = int(rng.choice(lanes))
        old = maps[number][lane]
        maps[number][lane] = _other(old, range(isa.LANES), rng)
        words = f"map {number}, lane {lane}: from lane {maps[number][lane]} instead of {old}"
        return replace(schedule, plan={**plan, "permutes": maps}), words


_MEM = ("mem.read", "mem.write", "mem.gather", "mem.scatter")
_VXM = (*isa.BINARY_OPS, *isa.UNARY_OPS, "vxm.cast")
_STREAMS = tuple(name for name in isa.OPCODES if name != "mxm.install")
_DIRECTED = (*_MEM, *_VXM, "sxm.permute")

MUTATIONS: tuple[Mutation, ...] = (
    OnOpcodes("shift_stream_cycle", _STREAMS, _shift),
    OnOpcodes("stream_number", _STREAMS, _stream),
    OnOpcodes("stream_direction", _DIRECTED, _direction),
    OnOpcodes("other_alu", _VXM, _alu),
    OnOpcodes("swap_sub_operands", ("vxm.sub",), _swap),
    OnOpcodes("vxm_opcode", tuple(_INSTEAD), _opcode),
    OnOpcodes("wrong_row", _MEM, _row),
    OnOpcodes("wrong_buffer", _MEM, _buffer),
    OnOpcodes("drop_instruction", isa.OPCODES, _drop),
    OnOpcodes("drop_install", ("mxm.install",), _drop),
    OnOpcodes("load_group", ("mxm.load",), _group),
    OnOpcodes("index_stream", ("mem.gather", "mem.scatter"), _index),
    OnOpcodes("immediate", _VXM, _immediate),
    OnOpcodes("type_code", ("vxm.cast", "mxm.activate"), _type),
    SwapSteps("swap_load_groups", ("mxm.load",), _load_pair),
    SwapSteps("swap_byte_planes", _MEM, _plane_pair),
    Duplicate(),
    PermuteEntry(),
)
"""The operators of this target, beside the shared ones."""
