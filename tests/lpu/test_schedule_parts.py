"""The pieces of the scheduler against brute force: calendar, VXM assignment, levels, retiming."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mapper import driver, machine
from mapper.errors import CapacityError, LoweringError
from mapper.schedule.tables import Request
from mapper_lpu import BACKEND
from mapper_lpu.assign import assign, window
from mapper_lpu.calendar import Calendar, Use, merge, span
from mapper_lpu.chain import Chain, Hold, Imm, Mem, Res
from mapper_lpu.instruction import Latencies
from mapper_lpu.isa import EAST, F32, LARGE_ALUS, SMALL_OPS, WEST
from mapper_lpu.storage import Stored, mem
from mapper_lpu.template import build, levelled
from tests.ir.models import gpt2, llama

MACHINE = machine.read(BACKEND.machine_files()[0])
LATENCIES = Latencies.of(MACHINE)


def stored(hemisphere: int, first: int, rows: int = 64) -> Stored:
    units = mem(hemisphere, first, 4)
    return Stored("v", F32, rows, units, (0,) * 4, tuple(range(4)))


@pytest.mark.parametrize("period", [None, 7, 13])
def test_calendar_finds_the_first_free_cycle(period: int | None) -> None:
    rng = random.Random(3)
    grid = Calendar(period)
    taken: set[tuple[int, int]] = set()

    def wrapped(cycle: int) -> int:
        return cycle if period is None else cycle % period

    for _ in range(40):
        raw = {(rng.randrange(3), rng.randrange(-3, 5)) for _ in range(rng.randrange(1, 3))}
        uses = merge(raw)
        assert uses is not None
        if len({(k, wrapped(c)) for k, c in raw}) < len(raw):
            assert grid.fold(uses) is None
            continue
        free = [t for t in range(60) if not any((key, wrapped(cycle + t)) in taken for key, cycle in raw)]
        found = grid.earliest(uses, 0, 60)
        assert found == (free[0] if free else None)
        if found is not None:
            folded = grid.fold(uses)
            assert folded is not None
            grid.take(folded, found)
            taken |= {(key, wrapped(cycle + found)) for key, cycle in raw}


def test_a_key_taken_twice_in_one_cycle_is_never_placeable() -> None:
    assert merge([(1, 5), (1, 5)]) is None
    assert Calendar(4).fold([Use(1, 0, 0b10001)]) is None


def test_zones_split_a_hemisphere_where_weights_begin() -> None:
    assert len(span(EAST, EAST, 0, 1, 3)) == 1
    assert len(span(EAST, EAST, 0, 4, 16)) == 1
    assert set(span(EAST, EAST, 0, 1, 16)) == {*span(EAST, EAST, 0, 1, 3), *span(EAST, EAST, 0, 4, 16)}
    assert not set(span(EAST, EAST, 0, 1, 16)) & set(span(WEST, EAST, 0, 1, 16))


def silu(count: int) -> Chain:
    """A chain with values that wait, on both sides."""
    chain = Chain("silu", count)
    rows = tuple(range(count))
    x = chain.add("vxm.mul", Mem(stored(EAST, 0), rows), Mem(stored(WEST, 0), rows))
    power = chain.add("vxm.exp2", chain.add("vxm.mul", x, Imm(-1.5)))
    root = chain.add("vxm.rsqrt", chain.add("vxm.add", power, Imm(1.0)))
    made = chain.add("vxm.mul", chain.add("vxm.mul", root, root), x)
    chain.write(made, stored(EAST, 8), rows)
    return chain


@pytest.mark.parametrize("count", [1, 5, 64])
def test_every_inner_edge_takes_one_alu_latency(count: int) -> None:
    ops, offsets = levelled(silu(count), LATENCIES.alu)
    assert len(ops) > 8, "x waits in copies"
    for op, offset in zip(ops, offsets, strict=True):
        for operand in (op.a, op.b):
            if isinstance(operand, Res):
                assert offsets[operand.op] + LATENCIES.alu == offset
            if isinstance(operand, Hold):
                assert offsets[operand.op] + LATENCIES.alu <= offset


@pytest.mark.parametrize("seed", range(4))
def test_assignments_obey_the_wiring_rule(seed: int) -> None:
    template = build(silu(5), LATENCIES, seed)
    assert template is not None
    made: dict[tuple[int, int, int], int] = {}
    first_alu = 88
    for i in sorted(template.instructions, key=lambda i: i.cycle):
        if not i.opcode.startswith("vxm."):
            continue
        alu = i.unit - first_alu
        assert i.opcode in SMALL_OPS or alu in LARGE_ALUS
        operands = [i.args[k : k + 3] for k in range(0, len(i.args) - 2, 3)]
        for kind, direction, stream in operands:
            if kind in (1, 2):
                assert stream // 4 in window(alu)
            if kind == 2:
                producer = made[(direction, stream, i.cycle)]
                assert producer % 4 < alu % 4 if direction == EAST else producer % 4 > alu % 4
        direction, stream = i.args[-2:]
        made[(direction, stream, i.cycle + LATENCIES.alu)] = alu


def test_an_impossible_assignment_is_none() -> None:
    chain = Chain("wide", 64)
    x = Mem(stored(EAST, 0), tuple(range(64)))
    for _ in range(9):  # nine large operations at once, eight large ALUs
        chain.write(chain.add("vxm.relu", x), stored(WEST, 0), range(64))
    assert build(chain, LATENCIES, 0) is None
    assert assign((), LATENCIES.entry, LATENCIES.alu, 0) is not None


@pytest.mark.parametrize("key, value", [("mxm.latency", 64), ("vxm.alu", 4), ("sxm.crossing", 6)])
def test_retiming_comes_near_to_scheduling_again(example_model: Path, key: str, value: int) -> None:
    other = MACHINE.replace({key: value})
    before = driver.compile(example_model, "lpu", phase="decode", context=16)
    text = MACHINE.text.replace(f"[{key}]\nvalue = {MACHINE.whole(key)}", f"[{key}]\nvalue = {value}")
    assert text != MACHINE.text
    again = driver.compile(example_model, "lpu", phase="decode", context=16, machine=machine.parse(text))
    retimed = BACKEND.retime(before, other)["decode"] * MACHINE.value("chip.clock")
    scheduled = again.programs["decode"].cycles
    assert scheduled != before.programs["decode"].cycles
    assert abs(retimed - scheduled) <= 0.06 * scheduled


def test_what_the_chip_cannot_hold_is_named(example_model: Path) -> None:
    with pytest.raises(CapacityError, match="bytes"):
        driver.compile(example_model, "lpu", phase="decode", context=200_000)


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(LoweringError, match="lpu does not map"):
        BACKEND.lower(gpt2(), MACHINE, Request(("decode",), context=16))


def test_a_model_larger_than_the_chip_is_refused() -> None:
    small = MACHINE.replace({"mem.rows": 1})
    with pytest.raises(CapacityError, match="of SRAM"):
        BACKEND.lower(llama(), small, Request(("decode",), context=16))
