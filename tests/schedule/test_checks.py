"""Each shared check holds on a legal schedule and names what is wrong on an illegal one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mapper.schedule.checks import SHARED, run_checks
from mapper.schedule.ranges import NEVER, paint_min, query_max
from mapper.schedule.tables import Block, Schedule
from mapper.schedule.timeline import timeline
from tests.schedule import toy
from tests.schedule.toy import ACC, ADD, COPY, MUL, W0, H, T, X, Y


def broken(schedule: Schedule) -> dict[str, list[str]]:
    """Check name -> messages, of the checks that fail."""
    return {name: [v.message for v in found] for name, found in run_checks(schedule).items() if found}


def with_block(made: Schedule, number: int, **changes: Any) -> Schedule:
    program = made.programs["decode"]
    blocks = list(program.blocks)
    blocks[number] = replace(blocks[number], **changes)
    return replace(made, programs={"decode": replace(program, blocks=tuple(blocks))})


def with_buffer(made: Schedule, row: int, name: str, value: int) -> Schedule:
    rows = made.buffers.to_pylist()
    rows[row][name] = value
    return replace(made, buffers=pa.Table.from_pylist(rows, schema=made.buffers.schema))


def test_the_schedule_is_legal() -> None:
    assert broken(toy.schedule()) == {}
    assert [c.name for c in SHARED] == list(run_checks(toy.schedule()))


def test_timeline_unrolls_and_binds() -> None:
    times = timeline(toy.schedule(), "decode")
    assert times.start.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert times.repetition.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0]
    weights = times.reads.buffer[times.reads.buffer >= W0]
    assert weights.tolist() == [W0, W0 + 1, W0 + 2]


RACE = toy.steps(
    [
        (0, 4, 1, ADD, [ACC, H], [ACC], 3),
        (2, 4, 0, COPY, [X], [H], 0),
        (6, 2, 0, COPY, [H], [Y], 4),
    ]
)

ILLEGAL: dict[str, tuple[str, str, Callable[[Schedule], Schedule]]] = {
    "two steps on a unit": (
        "UnitExclusive",
        "alu0, cycle 10.*occupies the unit until cycle 12",
        lambda s: with_block(s, 1, period=6),
    ),
    "a step after the end": ("UnitExclusive", "36 cycles", lambda s: with_block(s, 2, start=30)),
    "a slice outside of its buffer": (
        "CapacityFits",
        r"buffer 2 \(t\), which has 8",
        lambda s: with_buffer(s, T, "bytes", 8),
    ),
    "a buffer outside of its memory": ("CapacityFits", "4096", lambda s: with_buffer(s, T, "offset", 4090)),
    "a memory larger than the machine's": (
        "CapacityFits",
        "8192 bytes here and 4096",
        lambda s: replace(s, memories=(("mem", 8192),)),
    ),
    "two values in one place": (
        "LifetimesDisjoint",
        r"buffer 1 \(h\).*buffer 2 \(t\)|buffer 2 \(t\).*buffer 1 \(h\)",
        lambda s: with_buffer(s, T, "offset", 72),
    ),
    "a use after the end of life": (
        "LifetimesDisjoint",
        "outside its life 4..10",
        lambda s: with_buffer(s, T, "last", 10),
    ),
    "a weight overwritten": (
        "WeightsIntact",
        "overwrites a weight in buffer 6",
        lambda s: with_block(
            s, 0, steps=toy.steps([(0, 4, 0, COPY, [X], [H], 0), (0, 4, 1, COPY, [X], [6], 0)])
        ),
    ),
    "a weight that does not live": ("WeightsIntact", "w1", lambda s: with_buffer(s, W0 + 1, "last", 40)),
    "a read before the write": (
        "DependenceHolds",
        r"reads at cycle 4 byte 0 of buffer 2 \(t\), which is written at cycle 8",
        lambda s: with_block(
            s, 1, steps=toy.steps([(0, 4, 0, MUL, [H, W0], [T], 1), (0, 4, 1, ADD, [H, T], [H], 2)])
        ),
    ),
    "a read of what nobody writes": (
        "DependenceHolds",
        "never written",
        lambda s: with_block(s, 1, steps=toy.steps([(4, 4, 0, ADD, [H, T], [H], 2)])),
    ),
    "a write during a read": ("DependenceHolds", "at once", lambda s: with_block(s, 2, steps=RACE)),
    "an op without steps": (
        "CoversGraph",
        r"no step does op 1 \(mul mul\)",
        lambda s: with_block(
            s, 1, steps=toy.steps([(0, 4, 0, COPY, [H], [T], -1), (4, 4, 0, ADD, [H, T], [H], 2)])
        ),
    ),
    "an op too few times": (
        "CoversGraph",
        "needs 12 operations, its steps do 8",
        lambda s: with_block(s, 1, repeat=2),
    ),
    "an output that nobody writes": (
        "CoversGraph",
        "output y",
        lambda s: with_block(s, 2, steps=toy.steps([(0, 4, 1, ADD, [ACC, H], [ACC], 3)])),
    ),
    "more bytes than the memory delivers": (
        "BandwidthHolds",
        r"mem, which\s+moves 5",
        lambda s: replace(s, machine_toml=toy.MACHINE.replace("64e9", "5e9")),
    ),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_schedules_are_named(case: str) -> None:
    check, words, change = ILLEGAL[case]
    found = broken(change(toy.schedule()))
    assert check in found, found
    assert any(re.search(words, message) for message in found[check]), found[check]


def test_an_op_that_another_does_is_covered() -> None:
    made = toy.schedule()
    fused = toy.steps([(0, 4, 0, MUL, [H, W0], [T], 2), (4, 4, 0, ADD, [H, T], [H], 2)])
    assert "CoversGraph" in broken(with_block(made, 1, steps=fused))
    told = replace(with_block(made, 1, steps=fused), plan={"fused": {"1": 2}})
    assert broken(told) == {}


def test_exact_access_times_decide_where_the_plan_gives_them() -> None:
    # the sum starts 2 cycles after the product, on another unit: legal only if products appear by then
    tight = toy.steps([(0, 4, 0, MUL, [H, W0], [T], 1), (2, 2, 1, ADD, [H, T], [H], 2)])
    made = with_block(toy.schedule(), 1, steps=tight)
    timing = {"mul": [0, 2], "add": [0, 2], "copy": [0, 4]}
    assert "DependenceHolds" in broken(made)
    assert "DependenceHolds" not in broken(replace(made, plan={"access_timing": timing}))
    late = {**timing, "mul": [0, 3]}
    assert "DependenceHolds" in broken(replace(made, plan={"access_timing": late}))


@pytest.mark.parametrize("seed", range(5))
def test_range_minimum_and_maximum_equal_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(40):
        size, count = int(rng.integers(1, 40)), int(rng.integers(0, 20))
        ends = np.sort(rng.integers(0, size + 1, (2, count)), axis=0)
        value = rng.integers(0, 100, count)
        wanted = np.full(size, NEVER)
        for a, b, v in zip(*ends, value, strict=True):
            wanted[a:b] = np.minimum(wanted[a:b], v)
        assert np.array_equal(paint_min(size, ends[0], ends[1], value), wanted)
        a, b = ends[:, ends[1] > ends[0]]
        assert query_max(wanted, a, b).tolist() == [wanted[x:y].max() for x, y in zip(a, b, strict=True)]


def many(repeat: int, length: int) -> Schedule:
    """A body of `length` dependent steps on eight units, repeated, each step with a buffer of its own."""
    made = toy.schedule()
    count = length + 2
    end = 4 * repeat * length
    rows = [(0, 32 * i, 16, f"v{i}", 0, end, "decode") for i in range(count)]
    rows[0] = (0, 0, 16, "v0", -1, -1, "decode")
    body = [(4 * i, 4, i % 8, ADD, [i, i], [i + 1], -1) for i in range(length)]
    block = Block("body", toy.steps(body), 0, repeat, 4 * length)
    program = replace(made.programs["decode"], blocks=(block,), cycles=end + 8)
    return replace(
        made,
        units=tuple(f"alu{i}" for i in range(8)),
        memories=(("mem", 32 * count),),
        machine_toml=toy.MACHINE.replace("4096", str(32 * count)),
        programs={"decode": program},
        buffers=toy.buffers(rows),
        ops=made.ops.slice(0, 0),
        ports=(made.ports[0],),
    )


@pytest.mark.parametrize(("repeat", "length"), [(30, 10_000), (1, 300_000)])
def test_checks_of_300k_steps(repeat: int, length: int) -> None:
    made = many(repeat, length)
    began = time.process_time()
    found = broken(made)
    took = time.process_time() - began
    print(f"checks of {repeat * length} steps: {took:.2f} s")
    assert found == {}
