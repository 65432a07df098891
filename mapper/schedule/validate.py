"""Is a schedule well formed? Every index in range, every slice in its buffer: what makes it safe to run.

This is not legality (see `checks.py`): it asks only whether each number refers to something that exists, so
that compiled executors can run without bounds checks. All of it is vectorised.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa

from mapper.errors import ScheduleError
from mapper.schedule.dtypes import HALVES, dtype
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    STEP_SCHEMA,
    Block,
    Int,
    Port,
    Schedule,
    StepTable,
)

MAX_CYCLE = 2**52
"""Cycles and addresses stay below this, so that sums of a few of them never overflow 64 bits."""

MAX_UNROLLED = 2**31
"""Most steps that one program may have when its repeats are unrolled."""


def validate(schedule: Schedule) -> None:
    """Raises ScheduleError, naming the first number that refers to nothing."""
    for table, schema, what in (
        (schedule.buffers, BUFFER_SCHEMA, "buffers"),
        (schedule.ops, OP_SCHEMA, "ops"),
    ):
        _schema(table, schema, what)
    _memories(schedule)
    _buffers(schedule)
    _ops(schedule)
    for phase, program in schedule.programs.items():
        if phase != program.phase or phase not in ("decode", "prefill"):
            raise ScheduleError(f"program {phase!r} is marked {program.phase!r}")
        _range(program.cycles, 0, MAX_CYCLE, f"{phase}: cycles")
        _range(program.sequence, 1, MAX_CYCLE, f"{phase}: sequence")
        for number, block in enumerate(program.blocks):
            _block(schedule, block, f"{phase}, block {number}")
    _ports(schedule)
    _weights(schedule)
    _plan(schedule)


def _range(value: int, low: int, high: int, what: str) -> None:
    if not low <= value < high:
        raise ScheduleError(f"{what} = {value} is outside {low}..{high - 1}")


def _column(values: Int, low: int, high: int, what: str) -> None:
    if not len(values):
        return
    bad = (values < low) | (values >= high)
    if bad.any():
        row = int(np.argmax(bad))
        raise ScheduleError(f"{what}, row {row}: {int(values[row])} is outside {low}..{high - 1}")


def _schema(table: pa.Table, schema: pa.Schema, what: str) -> None:
    if not table.schema.equals(schema):
        raise ScheduleError(f"{what}: the table's columns are not those of this version")
    for name in schema.names:
        column = table.column(name)
        if column.null_count or any(_inner_nulls(chunk) for chunk in column.chunks):
            raise ScheduleError(f"{what}: column {name} has empty values")


def _inner_nulls(array: Any) -> bool:
    if pa.types.is_list(array.type):
        return bool(array.flatten().null_count) or _inner_nulls(array.flatten())
    if pa.types.is_struct(array.type):
        return any(array.field(k).null_count for k in range(array.type.num_fields))
    return False


def _int(table: pa.Table, name: str) -> Int:
    return np.asarray(table.column(name).to_numpy(), np.int64)


def _memories(schedule: Schedule) -> None:
    for name, size in schedule.memories:
        _range(size, 0, MAX_CYCLE, f"memory {name}: bytes")
    for what in ("units", "opcodes", "memories"):
        names: Any = getattr(schedule, what)
        names = [n[0] for n in names] if what == "memories" else list(names)
        twice = [n for n, k in Counter(names).items() if k > 1]
        if twice:
            raise ScheduleError(f"{what}: {twice[0]!r} is listed twice")
    if not (schedule.clock_hz > 0 and math.isfinite(schedule.clock_hz)):
        raise ScheduleError(f"clock_hz = {schedule.clock_hz} is not a frequency")


def _buffers(schedule: Schedule) -> None:
    table = schedule.buffers
    _column(_int(table, "memory"), 0, len(schedule.memories), "buffers.memory")
    for name in ("offset", "bytes"):
        _column(_int(table, name), 0, MAX_CYCLE, f"buffers.{name}")
    for name in ("first", "last"):
        _column(_int(table, name), -1, MAX_CYCLE, f"buffers.{name}")
    programs = set(table.column("program").unique().to_pylist())
    unknown = programs - {"", *schedule.programs}
    if unknown:
        raise ScheduleError(f"buffers.program: no program {min(map(str, unknown))!r}")


def _ops(schedule: Schedule) -> None:
    table = schedule.ops
    count = table.num_rows
    if not np.array_equal(_int(table, "id"), np.arange(count)):
        raise ScheduleError("ops.id is not the row number")
    for name, low in (("repetition", 0), ("repeat", 1), ("flops", 0), ("weight_bytes", 0)):
        _column(_int(table, name), low, 2**62, f"ops.{name}")
    chunks: Any = table.column("operands").chunks
    for chunk in chunks:
        _column(
            np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), np.int64), -1, count, "ops.operands"
        )
    unknown = set(table.column("program").unique().to_pylist()) - set(schedule.programs)
    if unknown:
        raise ScheduleError(f"ops.program: no program {min(map(str, unknown))!r}")


def _block(schedule: Schedule, block: Block, what: str) -> None:
    table = block.steps.table
    _schema(table, STEP_SCHEMA, what)
    _range(block.repeat, 1, MAX_UNROLLED, f"{what}: repeat")
    _range(block.start, 0, MAX_CYCLE, f"{what}: start")
    _range(block.period, 0, MAX_CYCLE, f"{what}: period")
    _range(block.repeat * max(1, table.num_rows), 0, MAX_UNROLLED, f"{what}: unrolled steps")
    _range(block.repeat * block.period, 0, MAX_CYCLE, f"{what}: repeat * period")
    steps = block.steps
    _column(steps.column("start"), -MAX_CYCLE, MAX_CYCLE, f"{what}: start")
    _column(steps.column("duration"), 0, MAX_CYCLE, f"{what}: duration")
    _column(steps.column("unit"), 0, len(schedule.units), f"{what}: unit")
    _column(steps.column("opcode"), 0, len(schedule.opcodes), f"{what}: opcode")
    _column(steps.column("op"), -1, schedule.ops.num_rows, f"{what}: op")
    for name in ("bytes", "flops"):
        _column(steps.column(name), 0, 2**62, f"{what}: {name}")
    sizes = _int(schedule.buffers, "bytes")
    for which in ("reads", "writes"):
        _slices(steps, which, sizes, what)
    if block.bindings is not None:
        _bindings(block, sizes, what)


def _slices(steps: StepTable, which: Any, sizes: Int, what: str) -> None:
    _, buffer, offset, length = steps.slices(which)
    _column(buffer, 0, len(sizes), f"{what}: {which}.buffer")
    _column(offset, 0, MAX_CYCLE, f"{what}: {which}.offset")
    _column(length, 0, MAX_CYCLE, f"{what}: {which}.bytes")
    over = offset + length > sizes[buffer]
    if over.any():
        row = int(np.argmax(over))
        raise ScheduleError(
            f"{what}: slice {row} of {which} ends at byte {offset[row] + length[row]} of buffer "
            f"{buffer[row]}, which has {sizes[buffer[row]]}"
        )


def _bindings(block: Block, sizes: Int, what: str) -> None:
    table = block.bindings
    assert table is not None
    _schema(table, BINDING_SCHEMA, f"{what}: bindings")
    slot, repetition, buffer = (_int(table, n) for n in BINDING_SCHEMA.names)
    _column(slot, 0, len(sizes), f"{what}: bindings.slot")
    _column(buffer, 0, len(sizes), f"{what}: bindings.buffer")
    _column(repetition, 0, block.repeat, f"{what}: bindings.repetition")
    if len(np.unique(slot * block.repeat + repetition)) != len(slot):
        raise ScheduleError(f"{what}: bindings: a slot is bound twice in one repetition")
    _column(
        (sizes[buffer] < sizes[slot]).astype(np.int64), 0, 1, f"{what}: bindings.buffer smaller than its slot"
    )


def _ports(schedule: Schedule) -> None:
    seen: set[tuple[str, str]] = set()
    for port in schedule.ports:
        what = f"port {port.name}"
        names = {(port.name, program) for program in port.programs or tuple(schedule.programs)}
        if names & seen:
            raise ScheduleError(f"{what} is listed twice")
        seen |= names
        _range(array_bytes(port.shape, port.dtype), 0, MAX_CYCLE, f"{what}: bytes")
        _column(np.array(port.buffers, np.int64), 0, schedule.buffers.num_rows, f"{what}: buffers")
        if set(port.programs) - set(schedule.programs):
            raise ScheduleError(f"{what} names a program that is not there")
        _source(schedule, port)


def _source(schedule: Schedule, port: Port) -> None:
    from mapper.schedule.values import leaves

    if port.source is None:
        if port.kind in ("weight", "constant"):
            raise ScheduleError(f"port {port.name}: a {port.kind} without a source")
        return
    try:
        found = leaves(port.source)
    except (TypeError, ValueError, IndexError, RecursionError) as error:
        raise ScheduleError(f"port {port.name}: its source is no value expression") from error
    for kind, name in found:
        table: Any = schedule.weights if kind == "weight" else schedule.constants
        if not isinstance(name, str) or name not in table:
            raise ScheduleError(f"port {port.name}: no {kind} {str(name)[:80]!r}")


def array_bytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes of an array of this shape and element type. Raises ScheduleError for negative dims."""
    if any(d < 0 for d in shape):
        raise ScheduleError(f"shape {shape} has a negative dimension")
    return math.prod(shape) * dtype(name).itemsize


def inside(name: str) -> bool:
    """Whether `name` is a plain relative path that stays inside its folder, on any system."""
    if not name or "\0" in name or "\\" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def _weights(schedule: Schedule) -> None:
    for name, entry in schedule.weights.items():
        what = f"weight {name}"
        if not isinstance(entry, dict):
            raise ScheduleError(f"{what}: not a table")
        file, begin, size, shape = (entry.get(k) for k in ("file", "offset", "bytes", "shape"))
        if not (isinstance(file, str) and inside(file)):
            raise ScheduleError(f"{what}: file {str(file)[:80]!r} is not inside the model's folder")
        whole = [begin, size, *(shape if isinstance(shape, list | tuple) else [None])]
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < MAX_CYCLE for v in whole):
            raise ScheduleError(f"{what}: offset, bytes and shape must be whole numbers")
        kind, stored = entry.get("dtype", ""), array_bytes(tuple(whole[2:]), entry.get("dtype", ""))
        if (-(-stored // 2) if kind in HALVES else stored) != size:
            raise ScheduleError(f"{what}: {size} bytes is not what {entry.get('dtype')} {whole[2:]} takes")


ARITHMETIC = ("matmul", "accumulate", "key_cache", "value_cache", "table")


def _plan(schedule: Schedule) -> None:
    """The entries of a plan that mean the same for every target; all others belong to the target."""
    plan: Any = schedule.plan
    if plan is None:
        return
    if not isinstance(plan, dict):
        raise ScheduleError("plan: not a table")
    for name in ("gather", "commutative"):
        if not (
            isinstance(plan.get(name, []), list | tuple)
            and all(isinstance(v, str) for v in plan.get(name, []))
        ):
            raise ScheduleError(f"plan.{name}: not a list of opcodes")
    fused, timing, arithmetic = (plan.get(k) or {} for k in ("fused", "access_timing", "arithmetic"))
    if not all(isinstance(v, dict) for v in (fused, timing, arithmetic)):
        raise ScheduleError("plan: fused, access_timing and arithmetic are tables")
    for op, by in fused.items():
        doers = by if isinstance(by, list) and by else [by]
        known = str(op).isdecimal() and int(op) < schedule.ops.num_rows
        if not known or not all(_whole(b) and 0 <= b < schedule.ops.num_rows for b in doers):
            raise ScheduleError(f"plan.fused: {op!r} by {by!r} are not rows of ops")
    for opcode, offsets in timing.items():
        if not (isinstance(offsets, list | tuple) and len(offsets) == 2 and all(_whole(v) for v in offsets)):
            raise ScheduleError(f"plan.access_timing.{opcode}: not [cycles, cycles]")
        _column(np.array(offsets, np.int64), -1, MAX_CYCLE, f"plan.access_timing.{opcode}")
    for name, kind in arithmetic.items():
        if name not in ARITHMETIC:
            raise ScheduleError(f"plan.arithmetic: unknown entry {str(name)[:40]!r}")
        if kind is not None:
            dtype(kind)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_CYCLE
