"""The assembly listing: readable, compressed, deterministic, and read back exactly; the memory map."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from mapper.errors import ScheduleError
from mapper.schedule.tables import Block, Schedule
from mapper_lpu import isa
from mapper_lpu.artifacts import artifacts
from mapper_lpu.check_columns import columns
from mapper_lpu.check_listing import InstructionMemory, differences
from mapper_lpu.checks import CHECKS
from mapper_lpu.listing import compressed, listing
from mapper_lpu.listing_parse import parse
from tests.lpu.check_programs import Asm, E, good, looped


def queue(text: str, name: str) -> list[str]:
    """The lines of one queue."""
    after = text.split(f".queue {name}\n")[1]
    return after.split("\n.queue")[0].strip().split("\n")


def test_lines_are_readable_and_resolved() -> None:
    a = good()
    text = listing(a.schedule(), "decode")
    # weight rows follow the table's 8 rows in slice 24
    assert queue(text, "mem.e.24") == [
        "nop 20",
        "gather 0+8 E0 > W8",
        "nop 69",
        "read 8 > E12",
        "repeat 19 1 1",
    ]
    assert queue(text, "mxm.e.1.load") == ["nop 100", "load 0 @16", "repeat 19 1 1", "install"]
    assert queue(text, "mxm.e.0.in") == ["nop 130", "activate f16 0"]
    assert queue(text, "vxm.01") == [
        "nop 206",
        "mul i:E4 o:W12 > E16",
        "nop 2",
        "sub acc #0x3f800000 > E20 ; 1",
    ]
    assert "permute E28 > W24 width 4 map 0" in text
    assert "cast.f32.f16 o:W8 > E12" in text
    # the slice holds 20 rows of weights below the state
    assert queue(text, "mem.e.32")[-1] == "scatter E20 E24 > 0+8"


def test_repetitions_fold() -> None:
    text = listing(looped().schedule(), "decode")
    assert queue(text, "vxm.00") == ["nop 6", "copy o:W0 > E4", "nop 16", "add o:W0 o:W8 > E4", "repeat 3 12"]
    assert queue(text, "mem.e.08") == ["nop 16", "read 0 > W8", "repeat 3 12 1"]


@pytest.mark.parametrize("make", [good, looped])
def test_listing_reads_back_to_the_table(make: object) -> None:
    schedule = make().schedule()  # type: ignore[operator]
    table = columns(schedule, "decode")
    found = parse(listing(schedule, "decode"), 2)
    assert list(differences(schedule, table, found)) == []
    lines = {
        (isa.UNITS[u], int(t)): isa.OPCODES[o]
        for u, t, o in zip(found.unit, found.cycle, found.opcode, strict=True)
    }
    assert len(lines) == len(table.times)
    assert lines[("vxm.00", 6 if make is looped else 203)] == ("vxm.copy" if make is looped else "vxm.add")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nop 130\n", "nop 131\n"),
        ("activate f16 0", "activate i8 0"),
        ("repeat 19 1 1", "repeat 19 1 2"),
        ("repeat 19 1 1", "repeat 18 1 1"),
        ("mul i:E4", "mul o:E4"),
        ("load 0 @16", "load 0 @0"),
        ("scatter E20", "scatter W20"),
        ("#0x3f800000", "#0x3f800001"),
        ("gather 0+8", "gather 0+7"),
        (".queue vxm.01", ".queue vxm.02"),
        ("cycles 485", "cycles 484"),
    ],
)
def test_a_changed_listing_is_not_the_table(old: str, new: str) -> None:
    schedule = good().schedule()
    text = listing(schedule, "decode")
    assert old in text
    found = parse(text.replace(old, new, 1), 2)
    assert list(differences(schedule, columns(schedule, "decode"), found))


@pytest.mark.parametrize(
    "text",
    [
        "read 0 > E0",
        ".queue mem.q.1",
        ".queue mem.e.00\nhop",
        ".queue mem.e.00\nread x > E0",
        ".queue mem.e.00\nread 1",
        "repeat 3 1",
        ".queue vxm.00\nread 0 > E0\nrepeat 99999999999 1",
    ],
)
def test_malformed_listings_are_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse(text, 2)


OPERANDS = [(0, -(1 << 31), 0), (0, (1 << 32) - 1, 3), (3, 5, -2), (1, 1, 28), (2, 0, 4)]
"""(kind, direction or immediate, stream); what an immediate or an accumulator does not need is kept too."""


def test_random_programs_read_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        a, t = Asm(), 0
        b = a.value("x", 0, 1, 64, "input")[0]
        for _ in range(60):
            t += int(rng.choice([1, 1, 2, 5]))
            a.add(t, "mem.e.00", "mem.read", [int(rng.integers(2)), 0], reads=(b, int(rng.integers(4))))
        for n, operand in enumerate(OPERANDS):
            a.add(n, "vxm.00", "vxm.max", [*operand, isa.OUTER, 0, 8, -1, n])
            a.add(n, "vxm.02", "vxm.cast", [*operand, E, 4, n, (n + 1) % 5])
        schedule = a.schedule()
        table = columns(schedule, "decode")
        assert table.legal.all()
        found = parse(listing(schedule, "decode"), 2)
        assert list(differences(schedule, table, found)) == []


def test_faulty_steps_cannot_be_listed() -> None:
    a = good()
    a.steps[0]["args"] = [0, 99]
    with pytest.raises(ScheduleError):
        listing(a.schedule(), "decode")


def test_artifacts_are_deterministic_and_complete() -> None:
    first, second = (artifacts(good().schedule()) for _ in range(2))
    assert first == second
    assert {"decode.s", "memory_map.csv", "memory_map.txt"} <= {a.name for a in first}


def test_memory_map_names_rows_and_banks() -> None:
    a = good()
    a.top["mem.w.00"] = isa.BANK_ROWS - 3
    a.buffer("wide#0", "mem.w.00", 10)
    files = {f.name: f.data.decode() for f in artifacts(a.schedule())}
    rows = list(csv.DictReader(io.StringIO(files["memory_map.csv"])))
    wide = [r for r in rows if r["value"] == "wide#0"]
    assert [(r["bank"], r["first_row"], r["last_row"], r["bytes"]) for r in wide] == [
        ("0", "4093", "4095", "960"),
        ("1", "4096", "4102", "2240"),
    ]
    table = next(r for r in rows if r["value"] == "table#0")
    assert (table["port"], table["kind"], table["memory"], table["first_row"], table["last_row"]) == (
        "table", "weight", "mem.e.24", "0", "7",
    )  # fmt: skip
    line = next(s for s in files["memory_map.txt"].split("\n") if s.startswith("mem.e.24"))
    assert line.split() == ["mem.e.24", "28", "0", "0", "0", "0", "0", str(isa.ROWS - 28)]


def big(repeat: int) -> Schedule:
    """`good` over and over in one block: about 730 steps per repetition."""
    schedule = good().schedule()
    program = schedule.programs["decode"]
    block = program.blocks[0]
    longer = Block("all", block.steps, 0, repeat, 500)
    last = (repeat - 1) * 500 + program.cycles
    programs = {"decode": replace(program, blocks=(longer,), cycles=last)}
    return replace(schedule, programs=programs)


def test_checks_of_300k_steps() -> None:
    schedule = big(410)
    found = {check.name: check.run(schedule) for check in CHECKS}
    # what one repetition stores, the next one overwrites
    assert {name for name, v in found.items() if v} <= {"MemHazards"}
    assert len(columns(schedule, "decode").times) > 290_000


def test_compression_counts() -> None:
    schedule = good().schedule()
    parts = compressed(schedule, "decode")
    lines = parts.lines(columns(schedule, "decode"))
    assert lines[isa.UNITS.index("mxm.e.1.load")] == 4
    assert int(lines.sum()) == sum(
        not s.startswith(".") for s in listing(schedule, "decode").strip().split("\n")
    )
    assert InstructionMemory().run(schedule) == []
