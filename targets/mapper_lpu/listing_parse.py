"""Reads an assembly listing back. Written from the format's description alone; shares no code with
`listing.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mapper.errors import ScheduleError
from mapper_lpu.isa import OPCODES, UNITS

Int = npt.NDArray[np.int64]

_OPCODE = {name.split(".")[1]: number for number, name in enumerate(OPCODES)}
_UNIT = {name: number for number, name in enumerate(UNITS)}
_TYPE = {"i8": 0, "i16": 1, "i32": 2, "f16": 3, "f32": 4}
_DIRECTION = {"E": 0, "W": 1}
_MOST = 8
_LIMIT = 1 << 26  # instructions of a program


@dataclass(frozen=True)
class Instructions:
    """One row per issued instruction, by queue and then by cycle, in the numbering of isa.py.

    `args` is padded with 0 to 8 columns. `row`, `rows`: the MEM rows that a MEM instruction accesses, else 0.
    """

    cycles: int
    unit: Int
    cycle: Int
    opcode: Int
    args: Int
    row: Int
    rows: Int


@dataclass
class _Line:
    """One instruction of the text: as in Instructions, and its repetitions."""

    unit: int
    cycle: int
    opcode: int
    args: tuple[int, ...]
    row: int
    rows: int
    times: int = 0
    distance: int = 0
    stride: int = 0


def parse(text: str, install: int) -> Instructions:
    """The instructions of one program. `install`: cycles that `install` takes. Raises ScheduleError."""
    lines: list[_Line] = []
    unit, cycle, cycles = -1, 0, 0
    known: dict[str, tuple[int, tuple[int, ...], int, int]] = {}
    for number, raw in enumerate(text.split("\n"), 1):
        words = raw.split(";", 1)[0].split()
        try:
            if not words:
                continue
            if words[0] == ".program":
                cycles = int(words[words.index("cycles") + 1])
            elif words[0] == ".queue":
                unit, cycle = _UNIT[words[1]], 0
            elif words[0] == "nop":
                cycle += int(words[1])
            elif words[0] == "repeat":
                last = lines[-1]
                last.times, last.distance = int(words[1]), int(words[2])
                last.stride = int(words[3]) if len(words) > 3 else 0
                cycle += last.times * last.distance
            else:
                if unit < 0:
                    raise ValueError("no queue")
                found = known.get(raw)
                if found is None:
                    found = known[raw] = _instruction(words)
                lines.append(_Line(unit, cycle, *found))
                cycle += install if words[0] == "install" else 1
        except (ValueError, KeyError, IndexError) as error:
            raise ScheduleError(f"listing line {number}: {raw[:80]!r}: {error}") from error
    return _expand(lines, cycles)


def _instruction(words: list[str]) -> tuple[int, tuple[int, ...], int, int]:
    """(opcode, args, first row, rows) of one line; the row is the group for a load."""
    name, *parts = words[0].split(".")
    code = _OPCODE[name]
    if name == "read":
        return code, _stream(words[3]), int(words[1]), 1
    if name == "write":
        return code, _stream(words[1]), int(words[3]), 1
    if name == "gather":
        row, rows = words[1].split("+")
        return code, (*_stream(words[4]), *_stream(words[2])), int(row), int(rows)
    if name == "scatter":
        row, rows = words[4].split("+")
        return code, (*_stream(words[1]), *_stream(words[2])), int(row), int(rows)
    if name == "load":
        return code, (0, int(words[2].removeprefix("@"))), int(words[1]), 0
    if name == "install":
        return code, (), 0, 0
    if name == "activate":
        return code, (_TYPE[words[1]], int(words[2])), 0, 0
    if name == "emit":
        return code, (int(words[1]),), 0, 0
    if name == "permute":
        return code, (*_stream(words[1]), *_stream(words[3]), int(words[5]), int(words[7])), 0, 0
    at = words.index(">")
    args = [number for word in words[1:at] for number in _operand(word)]
    return code, (*args, *_result(words[at + 1]), *(_TYPE[p] for p in parts)), 0, 0


def _stream(word: str) -> tuple[int, int]:
    return _DIRECTION[word[0]], int(word[1:])


def _operand(word: str) -> tuple[int, int, int]:
    if word[0] == "#":
        bits, *rest = word[1:].split("~")
        return 0, int(bits, 16), int(rest[0]) if rest else 0
    if word.startswith("acc"):
        rest = word.split("~")[1:] or ["0", "0"]
        return 3, int(rest[0]), int(rest[1])
    return {"o": 1, "i": 2}[word[0]], *_stream(word[2:])


def _result(word: str) -> tuple[int, int]:
    if re.fullmatch(r"-(~-?\d+)?", word):
        return -1, int(word[2:] or 0)
    return _stream(word)


def _expand(lines: list[_Line], cycles: int) -> Instructions:
    fields = ("unit", "cycle", "opcode", "row", "rows", "times", "distance", "stride")
    column = {f: np.array([getattr(line, f) for line in lines], np.int64) for f in fields}
    if (column["times"] < 0).any() or int(column["times"].sum()) + len(lines) > _LIMIT:
        raise ScheduleError("the listing repeats an instruction too often")
    args = np.zeros((len(lines), _MOST), np.int64)
    for number, line in enumerate(lines):
        args[number, : len(line.args)] = line.args
    count = column["times"] + 1
    owner = np.repeat(np.arange(len(lines)), count)
    turn: Int = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    cycle = column["cycle"][owner] + turn * column["distance"][owner]
    row = column["row"][owner] + turn * column["stride"][owner]
    opcode, args = column["opcode"][owner], args[owner]
    load = opcode == _OPCODE["load"]
    args[load, 0] = row[load]
    row[load] = 0
    return Instructions(cycles, column["unit"][owner], cycle, opcode, args, row, column["rows"][owner])
