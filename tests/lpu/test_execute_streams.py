"""Streams and MEM: when a vector is where, and what a reader of the wrong moment gets."""

from __future__ import annotations

import numpy as np
import pytest

from mapper.errors import ExecutionFault
from mapper.schedule.tables import Block
from mapper_lpu.execute import Executor
from tests.lpu.assembler import MACHINE, Bench, E, Line, W, bindings, table

RANDOM = np.random.default_rng(7)


def vector() -> np.ndarray:
    """320 random bytes."""
    return RANDOM.integers(0, 256, 320, dtype=np.uint8)


def read(cycle: int, unit: str, buffer: int, d: int, s: int) -> Line:
    """mem.read of a buffer's first row."""
    return Line(cycle, unit, "mem.read", (d, s), (buffer, 0, 320))


def write(cycle: int, unit: str, buffer: int, d: int, s: int) -> Line:
    """mem.write to a buffer's first row."""
    return Line(cycle, unit, "mem.write", (d, s), (buffer, 0, 320))


def test_west_to_east_takes_one_cycle_per_position() -> None:
    bench = Bench()
    sent = vector()
    a = bench.put("mem.w.07", 3, sent)  # x = -2
    b = bench.buffer("mem.e.43")  # x = 11
    cycle = 5 + 1 + 13
    assert bench.run([read(5, "mem.w.07", a, E, 9), write(cycle, "mem.e.43", b, E, 9)]) == 1000
    assert np.array_equal(bench.row("mem.e.43"), sent)


@pytest.mark.parametrize("shift", [-1, 1])
def test_one_cycle_off_finds_nothing(shift: int) -> None:
    bench = Bench()
    a = bench.put("mem.w.07", 3, vector())
    b = bench.buffer("mem.e.43")
    with pytest.raises(ExecutionFault, match=rf"cycle {19 + shift}: mem.e.43 mem.write: no valid vector"):
        bench.run([read(5, "mem.w.07", a, E, 9), write(19 + shift, "mem.e.43", b, E, 9)])


def test_one_cycle_off_takes_the_neighbour() -> None:
    bench = Bench()
    first, second = vector(), vector()
    a, b = bench.put("mem.e.20", 0, first), bench.put("mem.e.20", 1, second)  # x = 6
    c = bench.buffer("mem.w.00")  # x = -1: 1 + 7 cycles later
    program = [read(0, "mem.e.20", a, W, 0), read(1, "mem.e.20", b, W, 0)]
    bench.run([*program, write(8, "mem.w.00", c, W, 0)])
    assert np.array_equal(bench.row("mem.w.00"), first)
    bench.run([*program, write(9, "mem.w.00", c, W, 0)])
    assert np.array_equal(bench.row("mem.w.00"), second)


def test_directions_and_streams_are_apart_and_consuming_does_not_remove() -> None:
    bench = Bench()
    sent = [vector() for _ in range(4)]
    ways = [(E, 0), (E, 31), (W, 0), (W, 31)]
    lines = []
    for i, (d, s) in enumerate(ways):  # four slices of one group, x = 4
        unit = f"mem.e.{12 + i}"
        lines.append(read(0, unit, bench.put(unit, 0, sent[i]), d, s))
    for i, (d, s) in enumerate(ways):
        for hops in (1, 2, 3):
            unit = f"mem.e.{12 + i + 4 * (hops if d == E else -hops):02d}"
            lines.append(write(1 + hops, unit, bench.buffer(unit, 5), d, s))
    bench.run(lines)
    for i, (d, _) in enumerate(ways):
        for hops in (1, 2, 3):
            unit = f"mem.e.{12 + i + 4 * (hops if d == E else -hops):02d}"
            assert np.array_equal(bench.row(unit, 5), sent[i])


def test_a_later_producer_overrides_and_two_at_once_collide() -> None:
    bench = Bench()
    far, near = vector(), vector()
    a = bench.put("mem.e.08", 0, far)  # x = 3
    b = bench.put("mem.e.04", 0, near)  # x = 2
    c = bench.buffer("mem.e.00")  # x = 1
    bench.run([read(0, "mem.e.08", a, W, 5), read(1, "mem.e.04", b, W, 5), write(3, "mem.e.00", c, W, 5)])
    assert np.array_equal(bench.row("mem.e.00"), near)
    d = bench.put("mem.e.05", 0, far)
    with pytest.raises(ExecutionFault, match="two producers"):
        bench.run([read(0, "mem.e.04", b, W, 5), read(0, "mem.e.05", d, W, 5)])


def test_a_vector_leaves_at_the_edge() -> None:
    """x = 11 east of position 16: 33 positions later its register number comes round, without the vector."""
    bench = Bench()
    a = bench.put("mem.e.40", 0, vector())
    b = bench.buffer("mem.e.40", 1)
    with pytest.raises(ExecutionFault, match="no valid vector"):
        bench.run([read(0, "mem.e.40", a, E, 1), write(1 + 33, "mem.e.40", b, E, 1)])


def test_a_write_is_seen_one_cycle_later_and_unwritten_bytes_are_poison() -> None:
    bench = Bench()
    sent = vector()
    a, b, c = bench.put("mem.w.10", 0, sent), bench.buffer("mem.w.11"), bench.buffer("mem.w.04")
    program = [read(0, "mem.w.10", a, E, 0), write(1, "mem.w.11", b, E, 0)]
    bench.run([*program, read(2, "mem.w.11", b, E, 1), write(4, "mem.w.04", c, E, 1)])
    assert np.array_equal(bench.row("mem.w.04"), sent)
    empty = bench.buffer("mem.w.11", 1)
    with pytest.raises(
        ExecutionFault, match=r"cycle 9: mem.w.11 mem.read: reads bytes that nothing has written"
    ):
        bench.run([*program, read(9, "mem.w.11", empty, E, 1)])


def test_one_instruction_per_queue_and_cycle() -> None:
    bench = Bench()
    a = bench.put("mem.w.10", 0, vector())
    with pytest.raises(ExecutionFault, match="queue is taken"):
        bench.run([read(3, "mem.w.10", a, E, 0), read(3, "mem.w.10", a, E, 1)])


def test_malformed_instructions_are_refused() -> None:
    bench = Bench(rows=2)
    a, far = bench.put("mem.w.10", 0, vector()), bench.buffer("mem.w.10", 7)
    bad = [
        (read(-1, "mem.w.10", a, E, 0), "before cycle 0"),
        (read(0, "mem.w.11", a, E, 0), "another unit's memory"),
        (read(0, "mem.w.10", a, 2, 0), "direction"),
        (read(0, "mem.w.10", a, E, 32), "stream"),
        (read(0, "mem.w.10", far, E, 0), "outside the memory"),
        (Line(0, "mem.w.10", "mem.read", (E, 0), (a, 320, 320)), "outside its buffer"),
        (Line(0, "mem.w.10", "mem.read", (E, 0), (a, 16, 320)), "begin at a row"),
        (Line(0, "mem.w.10", "mem.read", (E, 0)), "number of memory reads"),
        (Line(0, "mem.w.10", "mem.read", (E,), (a, 0, 320)), "number of arguments"),
        (Line(0, "vxm.00", "mem.read", (E, 0), (a, 0, 320)), "another unit's memory"),
        (Line(0, "mem.w.10", "vxm.neg", (0, 0, 0, -1, 0)), "cannot run on this unit"),
        (read(981, "mem.w.10", a, E, 0), "ends after the program's 1000 cycles"),
    ]
    for line, reason in bad:
        with pytest.raises(ExecutionFault, match=reason):
            bench.run([line])


def test_the_machine_file_decides_the_latencies() -> None:
    slow = MACHINE.replace("[mem.read]\nvalue = 1", "[mem.read]\nvalue = 2")
    slow = slow.replace("[sxm.crossing]\nvalue = 4", "[sxm.crossing]\nvalue = 6")
    assert slow != MACHINE
    bench = Bench()
    sent = vector()
    a, b = bench.put("mem.w.07", 0, sent), bench.buffer("mem.e.43")
    bench.run([read(5, "mem.w.07", a, E, 9), write(20, "mem.e.43", b, E, 9)], machine=slow)
    assert np.array_equal(bench.row("mem.e.43"), sent)


def indices(values: list[int]) -> np.ndarray:
    """An index vector: one u16 per superlane, in its first lane; the other lanes hold noise."""
    lanes = RANDOM.integers(0, 65536, 320).astype(np.uint16)
    lanes[::16] = values
    return lanes


def test_gather_takes_sixteen_bytes_per_superlane() -> None:
    bench = Bench()
    rows = RANDOM.integers(0, 256, (10, 320), dtype=np.uint8)
    for i, row in enumerate(rows):
        bench.put("mem.e.30", 3 + i, row)  # x = 8
    t = bench.buffer("mem.e.30", 3, 10)
    chosen = [int(i) for i in RANDOM.integers(0, 10, 20)]
    low, high = bench.planes(["mem.e.04", "mem.e.05"], 0, indices(chosen))  # x = 2
    out = bench.buffer("mem.e.27")  # x = 7

    def program(number: int) -> list[Line]:
        return [
            read(0, "mem.e.04", low, E, 6),
            read(0, "mem.e.05", high, E, 7),
            Line(7, "mem.e.30", "mem.gather", (W, 3, E, 6), (t, 0, number * 320)),
            write(9, "mem.e.27", out, W, 3),
        ]

    bench.run(program(10))
    hole = (3 + chosen[7]) * 320 + 16 * 7 + 4
    bench.written(30)[hole : hole + 1] = False
    with pytest.raises(
        ExecutionFault, match=r"cycle 7: mem.e.30 mem.gather: reads bytes that nothing has written"
    ):
        bench.run(program(10))
    bench.written(30)[hole : hole + 1] = True
    expected = rows[np.repeat(chosen, 16), np.arange(320)]
    assert np.array_equal(bench.row("mem.e.27"), expected)
    with pytest.raises(ExecutionFault, match="an index is outside the table"):
        bench.run(program(max(chosen)))


def test_scatter_skips_65535() -> None:
    bench = Bench()
    before = RANDOM.integers(0, 256, (20, 320), dtype=np.uint8)
    for i, row in enumerate(before):
        bench.put("mem.w.30", i, row)  # x = -8
    t = bench.buffer("mem.w.30", 0, 20)
    chosen = [65535 if j % 3 == 0 else 19 - j for j in range(20)]
    low, high = bench.planes(["mem.w.04", "mem.w.05"], 0, indices(chosen))
    sent = vector()
    data = bench.put("mem.w.06", 0, sent)
    bench.run(
        [
            read(0, "mem.w.04", low, W, 30),
            read(0, "mem.w.05", high, W, 31),
            read(0, "mem.w.06", data, W, 8),
            Line(7, "mem.w.30", "mem.scatter", (W, 8, W, 30), (t, 0, 20 * 320)),
        ]
    )
    expected = before.copy()
    for j, index in enumerate(chosen):
        if index != 65535:
            expected[index, 16 * j : 16 * j + 16] = sent[16 * j : 16 * j + 16]
    assert np.array_equal(np.stack([bench.row("mem.w.30", i) for i in range(20)]), expected)


def test_permute_moves_lanes_of_all_its_streams() -> None:
    bench = Bench()
    sent = RANDOM.integers(0, 65536, 320).astype(np.uint16)
    a, b = bench.planes(["mem.e.40", "mem.e.41"], 0, sent)  # x = 11
    lanes = RANDOM.permutation(320)
    lanes[5] = -1
    outs = [bench.buffer(f"mem.e.{n}", 2) for n in (40, 41)]
    bench.run(
        [
            read(0, "mem.e.40", a, E, 2),
            read(0, "mem.e.41", b, E, 3),
            Line(2, "sxm.e.permute", "sxm.permute", (E, 2, W, 4, 2, 1)),
            write(7, "mem.e.40", outs[0], W, 4),
            write(7, "mem.e.41", outs[1], W, 5),
        ],
        plan={"permutes": [list(range(320)), [int(i) for i in lanes]]},
    )
    expected = np.where(lanes >= 0, sent[lanes], 0)
    assert np.array_equal(bench.numbers(["mem.e.40", "mem.e.41"], 2, np.uint16), expected)


def test_repetitions_overlap_and_are_bound_to_buffers() -> None:
    bench = Bench()
    sent = [vector() for _ in range(5)]
    sources = [bench.put("mem.w.40", 10 + i, v) for i, v in enumerate(sent)]
    targets = [bench.buffer("mem.e.40", 20 + i) for i in range(5)]
    steps = table([read(-4, "mem.w.40", sources[0], E, 0), write(19, "mem.e.40", targets[0], E, 0)])
    rows = [(sources[0], i, sources[i]) for i in range(1, 5)] + [
        (targets[0], i, targets[i]) for i in range(1, 5)
    ]
    block = Block("body", steps, start=4, repeat=5, period=3, bindings=bindings(rows))
    schedule = bench.schedule([block])
    executor = Executor()
    for _ in range(2):  # the second run uses the expanded program again
        bench.written(40)[:] = False
        assert executor.run(schedule, "decode", bench) == 1000
        for i, v in enumerate(sent):
            assert np.array_equal(bench.row("mem.e.40", 20 + i), v)
