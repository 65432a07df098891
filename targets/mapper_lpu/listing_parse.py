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


Line = list[int]
"""One line: unit, cycle, text (row of the list of distinct instructions), times, distance, stride."""


def parse(text: str, install: int) -> Instructions:
    """The instructions of one program. `install`: cycles that `install` takes. Raises ScheduleError."""
    lines: list[Line] = []
    unit, cycle, cycles = -1, 0, 0
    known: dict[str, int] = {}
    texts: list[tuple[int, tuple[int, ...], int, int]] = []
    for number, raw in enumerate(text.split("\n"), 1):
        try:
            found = known.get(raw)
            if found is None:
                words = raw.split(";", 1)[0].split()
                if not words:
                    continue
                if words[0] == ".program":
                    cycles = int(words[words.index("cycles") + 1])
                    continue
                if words[0] == ".queue":
                    unit, cycle = _UNIT[words[1]], 0
                    continue
                if words[0] == "nop":
                    cycle += int(words[1])
                    continue
                if words[0] == "repeat":
                    times, distance = int(words[1]), int(words[2])
                    lines[-1][3:] = times, distance, int(words[3]) if len(words) > 3 else 0
                    cycle += times * distance
                    continue
                texts.append(_instruction(words))
                found = known[raw] = len(texts) - 1
            if unit < 0:
                raise ValueError("no queue")
            lines.append([unit, cycle, found, 0, 0, 0])
            cycle += install if texts[found][0] == _OPCODE["install"] else 1
        except (ValueError, KeyError, IndexError) as error:
            raise ScheduleError(f"listing line {number}: {raw[:80]!r}: {error}") from error
    return _expand(lines, texts, cycles)


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


def _expand(
    lines: list[Line], texts: list[tuple[int, tuple[int, ...], int, int]], cycles: int
) -> Instructions:
    unit, cycle, text, times, distance, stride = np.array(lines, np.int64).reshape(-1, 6).T
    if (times < 0).any() or int(times.sum()) + len(lines) > _LIMIT:
        raise ScheduleError("the listing repeats an instruction too often")
    distinct = np.zeros((len(texts), _MOST + 3), np.int64)
    for number, (code, arguments, first, rows_of) in enumerate(texts):
        distinct[number, : len(arguments)] = arguments
        distinct[number, _MOST:] = code, first, rows_of
    count = times + 1
    owner = np.repeat(np.arange(len(lines)), count)
    turn: Int = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    found = distinct[text[owner]]
    args, opcode, rows = found[:, :_MOST], found[:, _MOST], found[:, _MOST + 2]
    row = found[:, _MOST + 1] + turn * stride[owner]
    load = opcode == _OPCODE["load"]
    args[load, 0] = row[load]
    row[load] = 0
    return Instructions(cycles, unit[owner], cycle[owner] + turn * distance[owner], opcode, args, row, rows)
