"""Bytes per cycle against a memory's bandwidth, wherever in time steps overlap."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from mapper.schedule.check_units import BandwidthHolds
from mapper.schedule.tables import BINDING_SCHEMA, Block, Schedule
from mapper.schedule.timeline import timeline
from tests.schedule import toy
from tests.schedule.toy import ADD, BYTES, COPY, MUL

HALF = 4
"""Buffers in each of the two memories, a (0 to 3) and b (4 to 7)."""
CONSTANT = """
[memory.{name}.bandwidth]
value = {value!r}
unit = "B/s"
kind = "assumed"
source = "a test"
"""


def made(*blocks: Block, **bandwidths: float) -> Schedule:
    """Blocks on a machine with memories a and b; bandwidths in bytes per cycle of 1 ns."""
    head = toy.MACHINE.split("[memory")[0]
    text = head + "".join(CONSTANT.format(name=k, value=v * 1e9) for k, v in bandwidths.items())
    rows = [(int(i >= HALF), 64 * (i % HALF), BYTES, f"v{i}", -1, -1, "") for i in range(2 * HALF)]
    base = toy.schedule()
    program = replace(base.programs["decode"], blocks=blocks, cycles=1 << 20)
    return replace(
        base,
        machine_toml=text,
        units=tuple(f"alu{i}" for i in range(4)),
        memories=(("a", 4096), ("b", 4096)),
        programs={"decode": program},
        buffers=toy.buffers(rows),
    )


def bound(rows: list[tuple[int, int, int]]) -> pa.Table:
    """Bindings (slot, repetition, buffer)."""
    return pa.Table.from_pylist(
        [dict(zip(BINDING_SCHEMA.names, r, strict=True)) for r in rows], schema=BINDING_SCHEMA
    )


ALONE = 2 * BYTES / 8
"""Bytes per cycle of a step that reads and writes a slice in 8 cycles."""
PAIR = {
    "begins in the middle of a step": ([(0, 8), (3, 8)], 3),
    "begins and ends in the middle of a step": ([(0, 16), (5, 6)], 5),
    "lasts for one cycle": ([(0, 8), (7, 8)], 7),
    "lasts for no cycle, as steps that follow each other": ([(0, 8), (8, 8)], None),
}


@pytest.mark.parametrize("case", PAIR)
def test_an_overlap_of_two_steps(case: str) -> None:
    """Either step alone is within the bandwidth, both at once are not."""
    spans, cycle = PAIR[case]
    table = toy.steps([(s, d, unit, COPY, [unit], [2 + unit], -1) for unit, (s, d) in enumerate(spans)])
    least = max(2 * BYTES / d for _, d in spans)
    found = BandwidthHolds().run(made(Block("all", table), a=least))
    assert [(v.unit, v.cycle, v.limit, v.steps) for v in found] == (
        [] if cycle is None else [("a", cycle, least, (0, 1))]
    )


def test_an_overlap_of_repetitions() -> None:
    """A repetition that begins in the middle of the one before; of every step there is one at a time."""
    table = toy.steps([(0, 8, 0, COPY, [0], [1], -1)])
    assert BandwidthHolds().run(made(Block("all", table, 0, 5, 8), a=ALONE)) == []
    found = BandwidthHolds().run(made(Block("all", table, 0, 5, 7), a=ALONE))
    assert [(v.cycle, v.steps) for v in found] == [(7, (0, 1))]


def test_an_overlap_of_blocks() -> None:
    """The last repetition of a block reaches into the next block."""
    table = toy.steps([(0, 8, 0, COPY, [0], [1], -1)])
    other = toy.steps([(0, 8, 1, COPY, [2], [3], -1)])
    for begin, cycle in ((24, None), (23, 23), (17, 17)):
        found = BandwidthHolds().run(
            made(Block("a", table, 0, 3, 8), Block("b", other, begin, 1, 0), a=ALONE)
        )
        assert [(v.cycle, v.steps) for v in found] == ([] if cycle is None else [(cycle, (2, 3))])


def test_a_repetition_whose_buffer_is_in_another_memory() -> None:
    """Two steps at once read a and write b; in repetition 3 alone one of them reads b."""
    table = toy.steps([(0, 8, 0, COPY, [0], [4], -1), (2, 8, 1, COPY, [1], [5], -1)])
    block = Block("all", table, 0, 5, 16, bound([(1, 1, 2), (1, 3, 6)]))
    assert BandwidthHolds().run(made(block, a=ALONE, b=1.5 * ALONE)) == []
    found = BandwidthHolds().run(made(block, a=ALONE, b=1.4 * ALONE))
    assert [(v.unit, v.cycle, v.steps) for v in found] == [("b", 3 * 16 + 2, (6, 7))]


def test_a_gathering_step_moves_what_it_says() -> None:
    """Beside a step that moves its slices, one that moves some bytes, or none, of its own."""
    table = toy.steps([(0, 8, 0, COPY, [0], [1], -1), (3, 8, 1, MUL, [2], [3], -1)])
    for moved, cycle, running in ((BYTES, 3, (0, 1)), (1, 3, (0, 1)), (0, None, ())):
        column = pa.array([2 * BYTES, moved], pa.int64())
        block = Block("all", replace(table, table=table.table.set_column(8, "bytes", column)))
        schedule = replace(made(block, a=ALONE), plan={"gather": ["mul"]})
        found = BandwidthHolds().run(schedule)
        assert [(v.cycle, v.steps) for v in found] == ([] if cycle is None else [(cycle, running)])


def rates(schedule: Schedule) -> dict[tuple[int, int], Fraction]:
    """Bytes in each (memory, cycle), step by step and cycle by cycle."""
    found: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for block in schedule.programs["decode"].blocks:
        bindings = [] if block.bindings is None else block.bindings.to_pylist()
        to = {(b["slot"], b["repetition"]): b["buffer"] for b in bindings}
        for r in range(block.repeat):
            for step in block.steps.table.to_pylist():
                begin = block.start + r * block.period + step["start"]
                length = max(1, step["duration"])
                for s in step["reads"] + step["writes"]:
                    buffer = to.get((s["buffer"], r), s["buffer"])
                    for cycle in range(begin, begin + length):
                        found[buffer // HALF, cycle] += Fraction(s["bytes"], length)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_highest_rate_is_that_of_a_count_of_every_cycle(seed: int) -> None:
    """Random blocks that overlap themselves and each other, with buffers that change their memories."""
    rng = np.random.default_rng(seed)
    blocks = []
    for number in range(int(rng.integers(1, 4))):
        rows = sorted(
            (int(rng.integers(-4, 30)), int(rng.integers(0, 9)), int(rng.integers(4)), ADD,
             rng.integers(0, 8, 2).tolist(), rng.integers(0, 8, 1).tolist(), -1)
            for _ in range(int(rng.integers(1, 12)))
        )  # fmt: skip
        repeat = int(rng.integers(1, 6))
        pairs = [(s, r) for s in range(8) for r in range(repeat) if rng.random() < 0.2]
        bindings = bound([(s, r, int(rng.integers(8))) for s, r in pairs]) if pairs else None
        start, period = int(rng.integers(4, 60)), int(rng.integers(1, 40))
        blocks.append(Block(f"b{number}", toy.steps(rows), start, repeat, period, bindings))
    count = rates(made(*blocks))
    for memory, name in enumerate("ab"):
        mine = {cycle: rate for (m, cycle), rate in count.items() if m == memory}
        highest = max(mine.values(), default=Fraction(1))
        assert BandwidthHolds().run(made(*blocks, **{name: float(highest)})) == []
        if mine:
            schedule = made(*blocks, **{name: float(highest) * (1 - 1e-6)})
            (found,) = BandwidthHolds().run(schedule)
            assert found.unit == name
            assert found.cycle is not None
            assert mine[found.cycle] == highest
            times = timeline(schedule, "decode")
            for step in found.steps:
                assert times.start[step] <= found.cycle < max(times.end[step], times.start[step] + 1)
