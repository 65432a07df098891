"""Each check of the lpu target accepts hand-made legal programs and rejects a program that breaks its
rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mapper.schedule.checks import run_checks
from mapper.schedule.tables import Schedule
from mapper.schedule.validate import validate
from mapper_lpu import isa
from mapper_lpu.checks import CHECKS
from tests.lpu.check_programs import Asm, E, W, X, good, looped, pick

Edit = Callable[[Asm], Any]


def broken(schedule: Schedule, *names: str) -> set[str]:
    """Names of the lpu checks (all, or those named) that reject the schedule; violations say something."""
    validate(schedule)
    found = {check.name: check.run(schedule) for check in CHECKS if not names or check.name in names}
    assert all(v.message for violations in found.values() for v in violations)
    return {name for name, violations in found.items() if violations}


@pytest.mark.parametrize("make", [good, looped])
def test_legal_programs_pass_all_checks(make: Callable[[], Asm]) -> None:
    schedule = make().schedule()
    validate(schedule)
    assert {k: v for k, v in run_checks(schedule, CHECKS).items() if v} == {}


def step(opcode: str, unit: str = "", at: int | None = None, /, **new: Any) -> Edit:
    """Change columns of one step."""
    return lambda a: pick(a.steps, opcode, unit, at).update(new)


def args(opcode: str, values: dict[int, int], unit: str = "", at: int | None = None) -> Edit:
    """Change arguments of one step."""

    def edit(a: Asm) -> None:
        found = pick(a.steps, opcode, unit, at)
        found["args"] = [values.get(i, v) for i, v in enumerate(found["args"])]

    return edit


def drop(opcode: str, unit: str = "", at: int | None = None) -> Edit:
    """Leave one step out."""
    return lambda a: a.steps.remove(pick(a.steps, opcode, unit, at))


def shift(opcode: str, by: int, unit: str = "", at: int | None = None) -> Edit:
    """Move one step in time."""

    def edit(a: Asm) -> None:
        pick(a.steps, opcode, unit, at)["start"] += by

    return edit


def access(opcode: str, unit: str, which: str, at: int | None = None, **new: int) -> Edit:
    """Change the memory operand of one step."""
    return lambda a: pick(a.steps, opcode, unit, at)[which][0].update(new)


def rename(old: str, new: str) -> Edit:
    """Rename a buffer."""

    def edit(a: Asm) -> None:
        next(b for b in a.buffers if b["value"] == old)["value"] = new

    return edit


ADD, MUL, JOIN = ("vxm.add", "vxm.00", 203), ("vxm.mul", "vxm.01", 206), ("vxm.add", "vxm.00", 181)

QUEUE: list[tuple[str, Edit]] = [
    ("argument out of range", args("mem.read", {1: 32})),
    ("misaligned group", args("vxm.add", {7: 6}, *ADD[1:])),
    ("no such type", args("vxm.cast", {5: 7})),
    ("wrong unit", step("mxm.load", "mxm.e.0", unit=isa.UNITS.index("mxm.e.0.in"))),
    ("argument missing", step("mxm.load", args=[0])),
    ("two in a cycle", lambda a: a.add(200 - 2, "mem.e.00", "mem.read", [W, 1], 2, reads=(0, 0))),
    ("load during an install", lambda a: a.add(121, "mxm.e.0.load", "mxm.load", [0, 0], 1)),
    ("install of one cycle", step("mxm.install", duration=1)),
    ("map out of range", args("sxm.permute", {5: 1})),
    ("malformed map", lambda a: a.plan["permutes"][0].append(0)),
    ("odd index stream", args("mem.gather", {3: 1})),
]


@pytest.mark.parametrize("edit", [e for _, e in QUEUE], ids=[n for n, _ in QUEUE])
def test_queue_order_rejects(edit: Edit) -> None:
    a = good()
    edit(a)
    assert "QueueOrder" in broken(a.schedule(), "QueueOrder")


def _opcode(schedule_edit: Asm) -> None:
    pick(schedule_edit.steps, "mem.read")["duration"] = 3


CASES: list[tuple[str, str, Edit]] = [
    ("TimingDataIndependent", "a read of three cycles", _opcode),
    ("TimingDataIndependent", "an ALU that reads MEM", lambda a: pick(a.steps, "vxm.add")["reads"].append(
        {"buffer": 0, "offset": 0, "bytes": 320})),
    ("StreamExclusive", "two reads meet on a stream", args("mem.read", {1: 0}, "mem.e.01", 198)),
    ("StreamArrival", "read one cycle late", shift("mem.read", 1, "mem.e.00", 198)),
    ("StreamArrival", "write one cycle early", shift("mem.write", -1, "mem.e.04", 211)),
    ("StreamArrival", "activation one cycle late", shift("mxm.activate", 1, "mxm.e.0")),
    ("StreamArrival", "permute one cycle late", shift("sxm.permute", 1)),
    ("StreamArrival", "read from another stream", args("mem.read", {1: 7}, "mem.e.00", 198)),
    ("StreamArrival", "read flows the other way", args("mem.read", {0: E}, "mem.e.00", 198)),
    ("StreamArrival", "read dropped", drop("mem.read", "mem.e.03", 198)),
    ("StreamArrival", "byte of another row", access("mem.read", "mem.e.00", "reads", 198, offset=320)),
    ("StreamArrival", "gather of another table",
     access("mem.gather", "mem.e.24", "reads", offset=320, bytes=7 * 320)),
    ("StreamArrival", "weights of another row", access("mem.read", "mem.e.12", "reads", offset=320 * 3)),
    ("StreamArrival", "ops without an edge", step(*ADD, op=3)),
    ("StreamArrival", "operand of another width", args("vxm.cast", {5: isa.F16, 6: isa.F32}, "vxm.00", 31)),
    ("StreamArrival", "i32 taken as f32", step(*ADD, opcode=isa.OPCODES.index("vxm.iadd"))),
    ("VxmWiring", "i32 accumulated as f32", step(*MUL, opcode=isa.OPCODES.index("vxm.iadd"))),
    ("ValueNames", "planes swapped", lambda a: swap_planes(a)),
    ("ValueNames", "a byte not stored", drop("mem.write", "mem.e.05", 211)),
    ("ValueNames", "buffer without a plane", rename("z#2", "z")),
    ("VxmWiring", "large opcode on a small ALU", step(*MUL, opcode=isa.OPCODES.index("vxm.max"))),
    ("VxmWiring", "group not wired to the row", step(*ADD, unit=isa.UNITS.index("vxm.08"))),
    ("VxmWiring", "one group from both sides", args("vxm.mul", {2: 12}, *MUL[1:])),
    ("VxmWiring", "inner operand of a lower rank from the west", lambda a: west(a)),
    ("VxmWiring", "inner operand that comes from MEM", lambda a: inner(a)),
    ("VxmWiring", "accumulator too early", shift("vxm.mul", 2, "vxm.01", 206)),
    ("VxmWiring", "accumulator of an idle ALU",
     step("vxm.sub", "vxm.01", 209, unit=isa.UNITS.index("vxm.02"))),
    ("MxmWeights", "load dropped", drop("mxm.load", "mxm.e.0", 105)),
    ("MxmWeights", "install dropped", drop("mxm.install", "mxm.e.1")),
    ("MxmWeights", "group loaded twice", args("mxm.load", {0: 4}, "mxm.e.0", 105)),
    ("MxmWeights", "activation before the install is over", shift("mxm.install", 9, "mxm.e.0")),
    ("MxmWeights", "one plane alone", drop("mxm.activate", "mxm.e.1")),
    ("MxmWeights", "other streams", args("mxm.activate", {1: 2}, "mxm.e.1")),
    ("MxmWeights", "int8 with weights of two bytes", args("mxm.activate", {0: isa.I8}, "mxm.e.0")),
    ("MxmWeights", "emit one cycle late", shift("mxm.emit", 1, "mxm.e.0")),
    ("MxmWeights", "emit dropped", drop("mxm.emit", "mxm.e.1")),
    ("MxmWeights", "results not joined", step(*JOIN, opcode=isa.OPCODES.index("vxm.sub"))),
    ("MxmWeights", "planes hold other rows", lambda a: other_rows(a)),
    ("MxmWeights", "a load nobody installs", lambda a: a.add(140, "mxm.e.0.load", "mxm.load", [0, 0], 1)),
    ("MemPorts", "memory of another slice", access("mem.read", "mem.e.00", "reads", 198, buffer=1)),
    ("MemPorts", "not a whole row", access("mem.read", "mem.e.00", "reads", 198, bytes=16)),
    ("MemPorts", "not aligned", access("mem.read", "mem.e.00", "reads", 198, offset=16)),
    ("MemPorts", "a read that writes", lambda a: pick(a.steps, "mem.read").update(
        writes=pick(a.steps, "mem.read")["reads"])),
    ("MemPorts", "two accesses of a slice",
     lambda a: a.add(198, "mem.e.00", "mem.read", [E, 0], 2, reads=(0, 3))),
    ("MemHazards", "read before the write", lambda a: early(a)),
    ("MemHazards", "row never written", access("mem.write", "mem.e.04", "writes", 36, buffer=8)),
    ("MemHazards", "written by an op without an edge", lambda a: foreign(a)),
    ("MemHazards", "written for nobody", lambda a: a.store(a.value("dead", 4, 4, 1), 0, E, 8, 0, 184, 1)),
    ("NothingIdle", "a read for nobody",
     lambda a: a.add(300, "mem.e.00", "mem.read", [W, 0], 2, reads=(0, 0))),
    ("NothingIdle", "a result for nobody", lambda a: a.add(
        300, "vxm.00", "vxm.copy", [isa.IMMEDIATE, 0, 0, E, 0], 2)),
    ("ProgramEnds", "no time for the last tile", lambda a: setattr(a, "cycles", 420)),
    ("ListingMatches", "two in a cycle",
     lambda a: a.add(198, "mem.e.00", "mem.read", [E, 0], 2, reads=(0, 3))),
]  # fmt: skip


def swap_planes(a: Asm) -> None:
    """Bytes 0 and 1 of a result change places."""
    first, second = (pick(a.steps, "mem.write", f"mem.e.0{k}", 211) for k in (4, 5))
    first["args"], second["args"] = second["args"], first["args"]


def west(a: Asm) -> None:
    """The inner operand goes west, where only ALUs of higher rank send."""
    pick(a.steps, *ADD)["args"][6] = W
    pick(a.steps, *MUL)["args"][1] = W


def inner(a: Asm) -> None:
    """A row that MEM has read is taken as an inner operand, in the cycle in which it passes."""
    pick(a.steps, *ADD)["args"][0] = isa.INNER
    for unit in range(4):
        pick(a.steps, "mem.read", f"mem.e.{unit:02d}", 198)["start"] += 3


def other_rows(a: Asm) -> None:
    """Plane 1 gets its groups 3 and 4 the other way round."""
    first, second = (pick(a.steps, "mxm.load", "mxm.e.1", at) for at in (103, 104))
    first["args"], second["args"] = second["args"], first["args"]


def early(a: Asm) -> None:
    """The activation is read before it is written: everything of the second half 100 cycles earlier."""
    for s in a.steps:
        if (
            isa.OPCODES[s["opcode"]] == "mem.read"
            and s["op"] == 1
            and isa.UNITS[s["unit"]] in ("mem.e.04", "mem.e.05")
        ):
            s["start"] -= 100


def foreign(a: Asm) -> None:
    """The embedding's result is stored by an op that the linear layer does not depend on."""
    for s in a.steps:
        if isa.OPCODES[s["opcode"]] == "mem.write" and s["op"] == 0:
            s["op"] = 3


@pytest.mark.parametrize(
    ("name", "edit"), [(n, e) for n, _, e in CASES], ids=[f"{n}: {w}" for n, w, _ in CASES]
)
def test_check_rejects(name: str, edit: Edit) -> None:
    a = good()
    edit(a)
    assert name in broken(a.schedule(), name)


def test_every_check_rejects_something() -> None:
    rejects = {"QueueOrder", "InstructionMemory"} | {name for name, _, _ in CASES}
    assert rejects == {check.name for check in CHECKS}


def test_instruction_memory_counts_listed_instructions() -> None:
    a = good()
    limit = "[icu.instructions]\nvalue = {}\n"
    text = a.schedule().machine_toml
    # mem.e.12: nop, read, repeat
    a.machine = text.replace("[icu.instructions]\nvalue = 0", limit.format(100)).replace(
        "high = 0", "high = 9999"
    )
    assert "InstructionMemory" not in broken(a.schedule())
    a.machine = a.machine.replace(limit.format(100), limit.format(5))
    assert "InstructionMemory" in broken(a.schedule())


def test_unknown_opcode_and_unit_are_reported() -> None:
    from dataclasses import replace

    schedule = good().schedule()
    other = replace(schedule, opcodes=("mem.maybe", *schedule.opcodes[1:]))
    assert {"TimingDataIndependent", "QueueOrder"} <= broken(other)
    other = replace(schedule, units=("mem.x.00", *schedule.units[1:]))
    assert {"TimingDataIndependent", "QueueOrder"} <= broken(other)


def test_overlapping_repetitions_are_seen() -> None:
    """With a period below the latency of the loop a repetition reads what the one before has not yet
    written."""
    a = looped()
    period = 6
    a.blocks[1] = type(a.blocks[1])("fast", a.blocks[1].steps, 0, 4, period, a.blocks[1].bindings)
    found = broken(a.schedule())
    assert "MemHazards" in found


def test_messages_name_step_unit_and_cycle() -> None:
    a = good()
    shift("mem.read", 1, "mem.e.00", 198)(a)
    check = next(c for c in CHECKS if c.name == "StreamArrival")
    violation = check.run(a.schedule())[0]
    assert violation.unit == "vxm.00"
    assert violation.cycle == 200
    assert "vxm.add" in violation.message and "W0" in violation.message
    assert X == isa.SXM_POSITION + 4


def test_no_check_stumbles_over_nonsense() -> None:
    """Whatever numbers a validated schedule has, each check ends, and steps of nonsense are rejected."""
    rng = np.random.default_rng(0)
    numbers = [-(1 << 40), -1, 0, 1, 2, 3, 7, 19, 31, 32, 100, 1 << 40]
    for _ in range(25):
        a = good()
        for i in rng.choice(len(a.steps), 60, replace=False):
            found = a.steps[i]
            what = int(rng.integers(6))
            if what == 0:
                found["args"] = [int(v) for v in rng.choice(numbers, int(rng.integers(12)))]
            elif what == 1:
                found["opcode"] = int(rng.integers(len(isa.OPCODES)))
            elif what == 2:
                found["unit"] = int(rng.integers(len(isa.UNITS)))
            elif what == 3:
                found["start"] = int(rng.choice([-5, 0, 180, 1 << 45]))
            elif what == 4:
                found["duration"] = int(rng.integers(4))
            else:
                size = int(rng.choice([0, 16, 320]))
                whole = [{"buffer": int(rng.integers(len(a.buffers))), "offset": 0, "bytes": size}]
                found["reads"], found["writes"] = (whole * int(rng.integers(3)) for _ in range(2))
        a.cycles = 1 << 46
        assert "QueueOrder" in broken(a.schedule())
