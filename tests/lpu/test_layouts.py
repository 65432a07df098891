"""Ports into MEM and back: the bytes are where ISA.md says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mapper.errors import ExecutionFault, ScheduleError
from mapper.schedule.tables import Port, Schedule
from mapper_lpu.execute import Executor
from tests.lpu.assembler import Bench

RANDOM = np.random.default_rng(2)


def given(
    array: Any, layout: Any, buffers: int, rows: int, constants: Any = None
) -> tuple[Bench, Schedule, Port]:
    """A bench with `buffers` buffers in as many slices, a schedule and a port over all of them."""
    bench = Bench()
    numbers = tuple(bench.buffer(f"mem.w.{i:02d}", 2, rows) for i in range(buffers))
    port = Port("p", "state", str(array.dtype), array.shape, numbers, layout)
    return bench, bench.schedule([], ports=[port], constants=constants), port


def test_rows_in_ways_and_byte_planes() -> None:
    array = RANDOM.standard_normal((5, 300)).astype(np.float32)
    layout = {"kind": "rows", "dtype": "f16", "ways": 2, "axes": None, "row_axes": 1, "take": None}
    bench, schedule, port = given(array, layout, 4, 3)
    Executor().place(schedule, port, array, bench)
    half = array.astype(np.float16).view(np.uint8).reshape(5, 300, 2)
    for r in range(5):
        for j in range(2):
            row = bench.row(f"mem.w.{(r % 2) * 2 + j:02d}", 2 + r // 2)
            assert np.array_equal(row[:300], half[r, :, j]) and not row[300:].any()
    got = Executor().fetch(schedule, port, bench)
    assert got.dtype == np.float32 and np.array_equal(got, array.astype(np.float16).astype(np.float32))


def test_axes_row_axes_and_take() -> None:
    array = RANDOM.standard_normal((2, 4, 3, 8)).astype(np.float32)
    take = np.array([7, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0], np.int64)
    layout = {"kind": "rows", "dtype": "f32", "ways": 1, "axes": [2, 0, 1, 3], "row_axes": 3, "take": "t"}
    bench, schedule, port = given(array, layout, 4, 24, {"t": take})
    Executor().place(schedule, port, array, bench)
    matrix = array.transpose(2, 0, 1, 3).reshape(24, 8)
    for r in range(24):
        row = bench.numbers([f"mem.w.{j:02d}" for j in range(4)], 2 + r, np.float32)
        assert np.array_equal(row[:11], np.where(take < 0, 0, matrix[r][take])) and not row[11:].any()
    assert np.array_equal(Executor().fetch(schedule, port, bench), array)


def test_broadcast_and_scalars() -> None:
    layout = {"kind": "broadcast", "dtype": "i32", "ways": 1}
    for array in (np.array(77, np.int64), np.array([3, 1, -2], np.int64)):
        bench, schedule, port = given(array, layout, 4, 4)
        Executor().place(schedule, port, array, bench)
        for r, value in enumerate(array.reshape(-1)):
            row = bench.numbers([f"mem.w.{j:02d}" for j in range(4)], 2 + r, np.int32)
            assert (row == value).all()
        assert np.array_equal(Executor().fetch(schedule, port, bench), array)


def test_multi_is_placed_in_every_part_and_fetched_from_the_first() -> None:
    array = RANDOM.integers(-128, 128, (3, 16)).astype(np.int8)
    rows = {"kind": "rows", "dtype": "i8", "ways": 1}
    bench = Bench()
    a, b = bench.buffer("mem.e.00", 0, 3), bench.buffer("mem.e.05", 9, 3)
    parts = [{"layout": rows, "buffers": [a]}, {"layout": rows, "buffers": [b]}]
    port = Port("p", "state", "int8", (3, 16), (a, b), {"kind": "multi", "parts": parts})
    schedule = bench.schedule([])
    Executor().place(schedule, port, array, bench)
    for r in range(3):
        assert np.array_equal(bench.row("mem.e.00", r)[:16].view(np.int8), array[r])
        assert np.array_equal(bench.row("mem.e.05", 9 + r)[:16].view(np.int8), array[r])
    bench.data(5)[:] = 0
    assert np.array_equal(Executor().fetch(schedule, port, bench), array)


def test_columns_are_spread_over_parts() -> None:
    """Columns 0..319 in one buffer, 320..399 in another."""
    array = RANDOM.integers(-128, 128, (2, 3, 400)).astype(np.int8)
    bench = Bench()
    a, b = bench.buffer("mem.e.00", 0, 6), bench.buffer("mem.e.05", 9, 6)
    rows = {"kind": "rows", "dtype": "i8", "ways": 1}
    parts = [{"layout": rows, "buffers": [a]}, {"layout": rows, "buffers": [b]}]
    layout = {"kind": "columns", "parts": parts, "width": 320, "row_axes": 2}
    port = Port("p", "weight", "int8", array.shape, (a, b), layout)
    schedule = bench.schedule([])
    Executor().place(schedule, port, array, bench)
    for r, row in enumerate(array.reshape(6, 400)):
        assert np.array_equal(bench.row("mem.e.00", r).view(np.int8), row[:320])
        assert np.array_equal(bench.row("mem.e.05", 9 + r)[:80].view(np.int8), row[320:])
    assert np.array_equal(Executor().fetch(schedule, port, bench), array)


def test_unwritten_bytes_and_misfits_are_refused() -> None:
    array = np.ones((5, 320), np.float32)
    layout = {"kind": "rows", "dtype": "f32", "ways": 1}
    bench, schedule, port = given(array, layout, 4, 5)
    Executor().place(schedule, port, array, bench)
    bench.written(44 + 2).remove((2 + 3) * 320 + 9, (2 + 3) * 320 + 10)
    with pytest.raises(ExecutionFault, match="'p': byte 2 of row 3 was never written"):
        Executor().fetch(schedule, port, bench)
    with pytest.raises(ScheduleError, match="takes shape"):
        Executor().place(schedule, port, array[:4], bench)
    bench, schedule, port = given(array, layout, 4, 4)
    with pytest.raises(ScheduleError, match="too small"):
        Executor().place(schedule, port, array, bench)
    bench, schedule, port = given(np.ones((2, 321), np.int8), {"kind": "rows", "dtype": "i8"}, 1, 2)
    with pytest.raises(ScheduleError, match="wider"):
        Executor().fetch(schedule, port, bench)
