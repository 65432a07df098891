"""Checks of operands: slices belong to the values that a task's program names; and of rates: no task is
faster than its SM, its share of the memory, or its link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper import machine as machines
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import ITEM, NETWORK, Rows, replicas_of, rows_of

ENGINES = ("bf16", "f16", "fp8", "int8", "fp4", "f32")


@dataclass(frozen=True)
class OperandsNamed:
    """A task has the opcode of its program; each of its slices lies in a buffer that holds the value of the
    program's operand, in its own chip's memory or the one that the operand names; repetitions replace a
    weight or cache by one of the same kind."""

    name: str = "OperandsNamed"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        values = [str(v) for v in schedule.buffers.column("value").to_pylist()]
        memory = schedule.buffers.column("memory").to_numpy().tolist()
        per_chip = len(schedule.units) // schedule.chips
        for rows, _ in rows_of(schedule):
            programs = schedule.plan["programs"][rows.phase]
            sides = [rows.block.steps.slices(w) for w in ("reads", "writes")]
            opcode, unit, program = (rows[k].tolist() for k in ("opcode", "unit", "program"))
            for row in range(len(opcode)):
                if not 0 <= program[row] < len(programs):
                    yield Violation(f"{rows.name(row)} names no program", (row,))
                    continue
                p = programs[program[row]]
                if p["kind"] != schedule.opcodes[opcode[row]]:
                    yield Violation(f"{rows.name(row)}: the program of a {p['kind']}", (row,))
                chip = unit[row] // per_chip
                for which, (offsets, buffer, _, _) in zip(("reads", "writes"), sides, strict=True):
                    mine = buffer[offsets[row] : offsets[row + 1]].tolist()
                    wrong = _named(p[which], mine, chip, values, memory)
                    if wrong:
                        yield Violation(f"{rows.name(row)}, {which}: {wrong}", (row,))


def _named(operands: Any, buffers: list[int], chip: int, values: list[str], memory: list[int]) -> str:
    """Slices come operand by operand, one run or several each, and no operand is passed over; "" where they
    fit."""
    at = -1
    for b in buffers:
        if at < 0 or not _fits(operands[at], b, chip, values, memory):
            at += 1
            if at >= len(operands) or not _fits(operands[at], b, chip, values, memory):
                return f"buffer {b} holds {values[b]!r}, which its program does not take there"
    return "" if at == len(operands) - 1 else "an operand without a slice"


def _fits(operand: Any, buffer: int, chip: int, values: list[str], memory: list[int]) -> bool:
    where = chip if int(operand["chip"]) < 0 else int(operand["chip"])
    return bool(values[buffer] == operand["value"] and memory[buffer] == where)


@dataclass(frozen=True)
class ProgramsWhole:
    """A program reads and writes each of its operands, takes no register that nothing has filled, and fills
    none that nothing takes (the rows of a cache that it appends to are read only to name them)."""

    name: str = "ProgramsWhole"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(
            Violation(f"{phase}, program {number} of a {p['kind']}: {wrong}")
            for phase, programs in schedule.plan["programs"].items()
            for number, p in enumerate(programs)
            for wrong in _flaws(p)
        )


_TWO = ("attend", "attend_latent", "merge")
"""Instructions that fill two registers; others fill one, or write."""


def _flaws(program: Any) -> Iterator[str]:
    touched: dict[str, set[int]] = {"reads": set(), "writes": set()}
    used: dict[str, bool] = {}  # of registers that are filled: whether something has taken them since
    for op, *rest in program["code"]:
        made, taken = _effects(op, rest)
        if op in ("read", "write", "append"):
            which, number = ("reads", rest[1]) if op == "read" else ("writes", rest[0])
            touched[which].add(int(number))
        for register in taken:
            if register not in used:
                yield f"{op} takes {register}, which nothing has filled"
            used[register] = True
        for register in made:
            if not used.get(register, True):
                yield f"nothing takes what {register} is filled with, before {op} fills it"
            used[register] = op == "read" and program["reads"][int(rest[1])]["c"] == "heads"
    for which, numbers in touched.items():
        if numbers != set(range(len(program[which]))):
            yield f"it has {len(program[which])} operands of {which}, its instructions {sorted(numbers)}"
    for register in (r for r, taken in used.items() if not taken):
        yield f"nothing takes what {register} is filled with"


def _effects(op: str, rest: list[Any]) -> tuple[list[str], set[str]]:
    """Registers that an instruction fills, and that it takes."""
    if op == "write":
        return [], {rest[1]}
    if op == "append":
        return [], _registers(rest)
    count = 2 if op in _TWO else 1
    return rest[:count], set() if op == "read" else _registers(rest[count:])


def _registers(values: Any) -> set[str]:
    """Registers among an instruction's values: r and a number."""
    found: set[str] = set()
    for v in values:
        if isinstance(v, list):
            found |= _registers(v)
        elif isinstance(v, str) and v[:1] == "r" and v[1:].isdigit():
            found.add(v)
    return found


@dataclass(frozen=True)
class SlicesPlaced:
    """A task's slices are the bytes that its coordinates mean in the layouts of its program's operands, and
    each buffer has the size of its layout: a read is the shortest run from the first to the last byte of its
    rows and columns, a write has a run for each panel (one, where it takes all rows), the rows of a cache a
    run for each head (one, where it takes all sequences)."""

    name: str = "SlicesPlaced"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        bytes_of = np.asarray(schedule.buffers.column("bytes").to_numpy(), np.int64)
        replicas = replicas_of(schedule)
        for rows, record in rows_of(schedule):
            sizes = schedule.request.batch // replicas, schedule.programs[rows.phase].sequence
            programs = schedule.plan["programs"][rows.phase]
            sides = [rows.block.steps.slices(w) for w in ("reads", "writes")]
            pairs = np.unique(np.stack([rows["program"], rows["kernel"]]), axis=1)
            for number, kernel in pairs.T.tolist():
                mine = np.flatnonzero((rows["program"] == number) & (rows["kernel"] == kernel))
                at = {k: rows[k][mine] for k in ("m0", "m1", "n0", "n1", "k0", "k1")}
                heads = record["kernels"][kernel].get("attention", {})
                for which, side in zip(("reads", "writes"), sides, strict=True):
                    found = [_place(o, at, heads, sizes, which) for o in programs[number][which]]
                    whole = [_layout(o)[1] for o in programs[number][which]]
                    for task, wrong in _misplaced(found, whole, side, mine, bytes_of):
                        yield Violation(f"{rows.name(task)}, {which}: {wrong}", (task,))


@dataclass(frozen=True)
class _Place:
    """Where an operand lies, an entry per task: `count` runs of `size` bytes, `step` bytes apart, from byte
    `low` on; and whether its rows and columns exist."""

    count: Int
    low: Int
    size: Int
    step: Int
    exists: npt.NDArray[np.bool_]


def _layout(o: Any) -> tuple[int, int]:
    """(bytes of a row of a panel, bytes of the buffer) of an operand's layout."""
    panel, bits = int(o["panel"]), int(o.get("bits", 0)) or 8 * ITEM[o["dtype"]]
    row = (panel * bits + 7) // 8
    return row, int(o.get("stack", 1)) * int(o["rows"]) * (int(o["width"]) // panel) * row


def _place(o: Any, at: dict[str, Int], heads: Any, sizes: tuple[int, int], which: str) -> _Place:
    """The runs of an operand of the tasks at some coordinates; `sizes` are a replica's sequences and
    their new tokens."""
    row, whole = _layout(o)
    count, panel = int(o["rows"]), int(o["panel"])
    one = np.ones_like(at["m0"])
    if o["r"] == "expert":  # the task's data says which
        return _Place(one, 0 * one, whole * one, 0 * one, (at["n0"] >= 0) & (at["n1"] <= count))
    if o["r"] == "cache":
        return _rows_of_cache(o, at, row, heads, sizes)
    (r0, r1), (c0, c1) = _rows(o, at), _columns(o, at, heads)
    exists = (r0 >= 0) & (r0 < r1) & (r1 <= count) & (c0 >= 0) & (c0 < c1) & (c1 <= int(o["width"]))
    if which == "reads" or count == 1:
        first_byte = (c0 // panel * count + r0) * row
        last_byte = ((c1 - 1) // panel * count + r1) * row
        if which == "writes":  # parts of a single row
            item = ITEM[o["dtype"]]
            first_byte, last_byte = c0 * item, c1 * item
        return _Place(one, first_byte, last_byte - first_byte, 0 * one, exists)
    exists &= (c0 % panel == 0) & (c1 % panel == 0)
    panels, all_rows = (c1 - c0) // panel, r1 - r0 == count
    low = (c0 // panel * count + r0) * row
    size = np.where(all_rows, panels, 1) * (r1 - r0) * row
    return _Place(np.where(all_rows, 1, panels), low, size, count * row * one, exists)


def _rows_of_cache(o: Any, at: dict[str, Int], row: int, attention: Any, sizes: tuple[int, int]) -> _Place:
    """Rows of a cache [heads, sequences, positions], each of `row` bytes: a stretch of one sequence's, or all
    positions of some sequences and heads."""
    batch, tokens = sizes
    length, heads = int(o["rows"]) // batch, int(o["width"]) // int(o["panel"])
    one = np.ones_like(at["m0"])
    if o["c"] == "keys":
        group = int(attention["heads"]) // heads  # query heads that read one cache head
        head, sequence = at["n0"] // (group * int(attention["value_dim"])), at["m0"] // tokens
        exists = (at["k0"] >= 0) & (at["k0"] < at["k1"]) & (at["k1"] <= length)
        exists &= (head >= 0) & (head < heads) & (sequence >= 0) & (sequence < batch)
        low = ((head * batch + sequence) * length + at["k0"]) * row
        return _Place(one, low, (at["k1"] - at["k0"]) * row, 0 * one, exists)
    b0, b1 = at["m0"] // tokens, -(-at["m1"] // tokens)
    h0, h1 = at["n0"] // int(o["panel"]), -(-at["n1"] // int(o["panel"]))
    exists = (b0 >= 0) & (b0 < b1) & (b1 <= batch) & (h0 >= 0) & (h0 < h1) & (h1 <= heads)
    together, step = b1 - b0 == batch, batch * length * row
    size = np.where(together, (h1 - h0) * step, (b1 - b0) * length * row)
    return _Place(np.where(together, 1, h1 - h0), h0 * step + b0 * length * row, size, step * one, exists)


def _rows(o: Any, at: dict[str, Int]) -> tuple[Int, Int]:
    if o["r"] == "all":
        return 0 * at["m0"], 0 * at["m0"] + int(o["rows"])
    if o["r"] == "blocks":  # a row per block: its expert, and the places of its rows
        each = int(o["width"]) - 1
        return at["m0"] // each, at["m1"] // each
    return at[f"{o['r']}0"], at[f"{o['r']}1"]


def _columns(o: Any, at: dict[str, Int], heads: Any) -> tuple[Int, Int]:
    """Columns of an operand. A task of attention has the columns n that some of the query heads make."""
    c = o["c"]
    if not isinstance(c, str) or c == "all":
        low, high = (0, int(o["width"])) if c == "all" else (int(v) for v in c)
        return 0 * at["n0"] + low, 0 * at["n0"] + high
    if c == "n":
        return at["n0"], at["n1"]
    if c == "k":
        per = max(1, int(o.get("per", 1)))
        return at["k0"] // per, -(-at["k1"] // per)
    if c.startswith("head:"):
        each, width = (int(v) for v in c.split(":")[1:])
    else:
        width, each = int(heads["value_dim"]), {"q": int(heads["dim"]), "stats": 2, "groups": 1}[c]
        return at["n0"] // width * each, at["n1"] // width * each
    return at["n0"] // width * each, (at["n0"] // width + 1) * each


def _misplaced(
    found: list[_Place], whole: list[int], side: tuple[Int, Int, Int, Int], mine: Int, bytes_of: Int
) -> Iterator[tuple[int, str]]:
    """(row, what is wrong) of tasks `mine` whose slices are not the runs of their operands."""
    offsets, buffer, low, size = side
    wrong = sum((p.count for p in found), 0 * mine) != np.diff(offsets)[mine]
    for p in found:
        wrong |= ~p.exists
    for row in mine[wrong].tolist():
        yield row, "rows or columns that an operand does not have, or other slices than it takes"
    good = np.flatnonzero(~wrong)
    at = offsets[mine[good]]
    for p, bytes_ in zip(found, whole, strict=True):
        count = p.count[good]
        task = np.repeat(np.arange(len(good)), count)
        turn = np.arange(len(task)) - np.repeat(np.cumsum(count) - count, count)
        here = at[task] + turn
        want = p.low[good][task] + turn * p.step[good][task]
        bad = (low[here] != want) | (size[here] != p.size[good][task]) | (buffer[here] != buffer[at[task]])
        bad |= bytes_of[buffer[here]] != bytes_
        for i in np.flatnonzero(bad).tolist():
            given = f"bytes {low[here[i]]}..{low[here[i]] + size[here[i]]} of buffer {buffer[here[i]]}"
            yield int(mine[good[task[i]]]), f"{given}, its coordinates mean {want[i]} and on"
        at = at + count


@dataclass(frozen=True)
class RatesHold:
    """No task is shorter than what its bytes take through its SM's port, or at what the SM keeps in flight,
    or its operations on its engine, or its link; a kernel's first task on an SM also pays the start and the
    memory latency. Kernels follow each other at the launch gap or later, and no program starts before the
    graph is launched."""

    name: str = "RatesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        for rows, _ in rows_of(schedule):
            need = _least(machine, rows, rows["opcode"] == list(schedule.opcodes).index("collective"))
            length = rows["duration"]
            for row in np.flatnonzero(length + 1 < need * schedule.clock_hz).tolist():
                least = need[row] * schedule.clock_hz
                message = f"{rows.name(row)}: {length[row]} cycles for what takes {least:.1f}"
                yield Violation(message, (row,), schedule.units[rows["unit"][row]], None, float(need[row]))
        for phase, program in schedule.programs.items():
            step = machine.value("launch.step") * schedule.clock_hz
            if program.blocks and program.blocks[0].start + 1 < step:
                yield Violation(f"{phase} starts before cycle {step:.0f}, when its graph is launched")


def _least(machine: machines.Machine, rows: Rows, link: Any) -> Any:
    v = machine.value
    clock = v("sm.clock")
    port = v("sm.port") * clock
    far, near, work = rows["bytes"], rows["near"], rows["work"]
    alone = min(port, v("sm.in_flight") / v("memory.hbm.latency"))
    sms = v("sm.count")
    peak = np.full(len(far), v("vector.f32") / sms)
    for number, name in enumerate(ENGINES):
        if f"tensor.{name}" in machine.constants:
            peak[rows["engine"] == number] = v(f"tensor.{name}") / sms
    busy = np.maximum(np.maximum(far / alone, (far + near) / port), work / peak)
    busy = np.where(link, near / v("link.bandwidth"), busy)
    slow = near / min(v("link.bandwidth"), v("network.bandwidth"))
    busy = np.where(rows["lead"] == NETWORK, slow, busy)
    lead = np.array([0.0, v("launch.start") + v("memory.hbm.latency"), v("signal.latency"), v("signal.fetch"),
                     v("link.latency"), v("link.latency") + v("network.latency")])  # fmt: skip
    return busy + lead[np.clip(rows["lead"], 0, NETWORK)]


@dataclass(frozen=True)
class BytesHold:
    """The tasks of a kernel together bring in from HBM at least every byte of the weights that they read,
    once."""

    name: str = "BytesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        weight = np.zeros(schedule.buffers.num_rows, bool)
        for port in schedule.ports:
            if port.kind == "weight" and port.shape[0] > 1:
                weight[list(port.buffers)] = True
        for rows, record in rows_of(schedule):
            offsets, buffer, low, size = rows.block.steps.slices("reads")
            owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
            product = rows["opcode"][owner] == list(schedule.opcodes).index("product")
            for number in range(len(record["kernels"])):
                mine = weight[buffer] & product & (rows["kernel"][owner] == number)
                need = _union(buffer[mine], low[mine], size[mine])
                got = int(rows["bytes"][rows["kernel"] == number].sum())
                # every task rounds its share to whole bytes
                if got + int(mine.sum()) < need:
                    yield Violation(f"{rows.kernel(number)} moves {got} bytes, its weights have {need}")


def _union(buffer: Int, low: Int, size: Int) -> int:
    """Bytes of the union of slices."""
    order = np.lexsort((low, buffer))
    b, a, e = buffer[order], low[order], low[order] + size[order]
    total, at, held = 0, -1, -1
    for i in range(len(b)):
        if b[i] != held:
            held, at = b[i], -1
        if e[i] > at:
            total += int(e[i] - max(a[i], at))
            at = int(e[i])
    return total


CHECKS = (OperandsNamed(), ProgramsWhole(), SlicesPlaced(), RatesHold(), BytesHold())
