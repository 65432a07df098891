"""Changes of one instruction: another stream, direction, ALU, opcode, row, buffer, immediate, type.

Each takes (schedule, place, row, rng) and returns the new row (None: the step is dropped) and words for it,
or None where the step offers nothing to change in that way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper.schedule.edit import Place, Row
from mapper.schedule.tables import Schedule
from mapper_lpu import isa
from mapper_lpu.mutate_base import operand_of, other


def _with_args(row: Row, values: dict[int, int]) -> Row:
    return {**row, "args": [values.get(i, v) for i, v in enumerate(row["args"])]}


def _code(schedule: Schedule, row: Row) -> str:
    return str(schedule.opcodes[row["opcode"]])


def shift(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """One cycle earlier or later."""
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


def stream(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another stream, aligned alike."""
    operands = _stream_args(schedule, row)
    if not operands:
        return None
    _, at = operands[rng.integers(len(operands))]
    old, grain = row["args"][at], _grain(schedule, row, at)
    last = isa.STREAMS - (row["args"][4] if _code(schedule, row) == "sxm.permute" else grain)
    new = other(old, range(0, last + 1, grain), rng)
    return _with_args(row, {at: new}), f"argument {at}: stream {new} instead of {old}"


def direction(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """The other direction of a stream."""
    operands = [d for d, _ in _stream_args(schedule, row) if d >= 0]
    if not operands:
        return None
    at = operands[rng.integers(len(operands))]
    return _with_args(row, {at: 1 - row["args"][at]}), f"argument {at}: the other direction"


def alu(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
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


def swap_operands(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Operands A and B change places."""
    args = row["args"]
    if args[:3] == args[3:6]:
        return None
    return {**row, "args": [*args[3:6], *args[:3], *args[6:]]}, "operands A and B change places"


HUGE = 0x58000000
"""Bits of 2**49."""

INSTEAD = {
    "vxm.add": "vxm.sub", "vxm.sub": "vxm.add", "vxm.mul": "vxm.add", "vxm.max": "vxm.min",
    "vxm.min": "vxm.max", "vxm.iadd": "vxm.add", "vxm.neg": "vxm.copy", "vxm.copy": "vxm.neg",
    "vxm.relu": "vxm.neg", "vxm.exp2": "vxm.rsqrt", "vxm.rsqrt": "vxm.exp2",
}  # fmt: skip
"""An opcode of the same form that computes something else."""


def opcode(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """An opcode that computes something else; see INSTEAD."""
    new = INSTEAD[_code(schedule, row)]
    if new not in schedule.opcodes:
        return None
    return {**row, "opcode": schedule.opcodes.index(new)}, f"{new} instead"


def row_of_buffer(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another row of the same buffer."""
    which, old = operand_of(row) or ("", {})
    rows = schedule.buffers.column("bytes")[old["buffer"]].as_py() // isa.LANES if old else 0
    if rows < 2 or old["bytes"] != isa.LANES:
        return None
    here = old["offset"] // isa.LANES
    new = other(here, range(rows), rng)
    return {**row, which: [{**old, "offset": new * isa.LANES}]}, f"row {new} of its buffer instead of {here}"


def buffer_of_slice(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another buffer of the same slice."""
    which, old = operand_of(row) or ("", {})
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


def drop(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """No such step."""
    return None, "dropped"


def load_group(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another group of the load buffer."""
    new = other(row["args"][0], range(20), rng)
    return _with_args(row, {0: new}), f"load group {new} instead of {row['args'][0]}"


def index_stream(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another pair of streams for the index."""
    new = other(row["args"][3], range(0, isa.STREAMS, 2), rng)
    return _with_args(row, {3: new}), f"index from stream {new} instead of {row['args'][3]}"


def immediate(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another immediate: one bit of the upper mantissa or the exponent; for zero and for numbers that only
    have to be huge another number altogether."""
    binary = _code(schedule, row) in isa.BINARY_OPS
    places = [k + 1 for k in ((0, 3) if binary else (0,)) if row["args"][k] == isa.IMMEDIATE]
    if not places:
        return None
    at = places[rng.integers(len(places))]
    old = row["args"][at]
    size = old & 0x7FFFFFFF
    # adding a number to all scores of a softmax changes nothing, so a bound of zero must go far
    instead = {"vxm.min": 0xFF61B1E6, "vxm.max": 0x7F61B1E6}.get(_code(schedule, row), 0x3F800000)
    new = old ^ (1 << int(rng.integers(19, 30))) if 0 < size < HUGE else instead
    return _with_args(row, {at: new}), f"immediate {new & 0xFFFFFFFF:#x} instead of {old & 0xFFFFFFFF:#x}"


def type_code(schedule: Schedule, place: Place, row: Row, rng: np.random.Generator) -> Any:
    """Another type of a cast or an activation."""
    if _code(schedule, row) == "mxm.activate":
        new = isa.I8 if row["args"][0] == isa.F16 else isa.F16
        return _with_args(row, {0: new}), "activation of the other type"
    at = int(rng.integers(5, 7))
    new = other(row["args"][at], range(5), rng)
    return _with_args(row, {at: new}), f"type code {new} instead of {row['args'][at]}"
