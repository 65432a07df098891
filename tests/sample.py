"""A small schedule made by hand, for tests of what prints and times schedules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from mapper.bounds import Bound
from mapper.cost.bands import bands
from mapper.cost.estimate import Estimate, Result, loads, step_count
from mapper.machine import Machine, parse
from mapper.schedule.tables import (
    BUFFER_SCHEMA,
    OP_SCHEMA,
    Block,
    ModelRef,
    Phase,
    Program,
    Request,
    Schedule,
    StepTable,
    step_table,
)

MACHINE = """
name = "toy"
target = "toy"
summary = "two units"
[constants.clock]
value = 1e6
unit = "Hz"
kind = "published"
source = "made up for tests"
[constants.latency]
value = 10
unit = "cycles"
kind = "assumed"
source = "made up for tests"
low = 7
high = 14
[constants.issue]
value = 2
unit = "cycles"
kind = "assumed"
source = "made up for tests"
low = 2
high = 5
[constants.idle]
value = 1
unit = "cycles"
kind = "assumed"
source = "moves nothing"
low = 0
high = 2
"""


def steps(start: list[int], duration: list[int], unit: list[int]) -> StepTable:
    """Steps without operands, opcode 0, all of op 0."""
    n = len(start)
    none = np.zeros(n + 1, np.int64)
    empty = np.zeros(0, np.int64)
    no_slices = (none, empty, empty, empty)
    zeros = [0] * n
    return step_table(
        start, duration, unit, zeros, (none, empty), no_slices, no_slices, zeros, [8] * n, zeros
    )


def schedule(target: str = "toy") -> Schedule:
    """Unit a[0]: 4 steps of 5 cycles in two repetitions; unit b: one of 10 cycles. 40 cycles at 1 MHz."""
    body = Block("layer", steps([0, 5], [5, 5], [0, 0]), start=0, repeat=2, period=15)
    tail = Block("head", steps([0], [10], [1]), start=30)
    program = Program("decode", (body, tail), 40, 1)
    op = {
        "program": "decode", "id": 0, "kind": "linear", "name": "layers.0/mlp <down>", "repetition": 0,
        "repeat": 1, "operands": [-1], "shape": [1, 8], "flops": 16, "weight_bytes": 32,
    }  # fmt: skip
    ops = pa.Table.from_pylist([op], schema=OP_SCHEMA)
    return Schedule(
        target=target,
        machine="toy",
        machine_toml=MACHINE,
        chips=1,
        request=Request(phases=("decode",), batch=2),
        model=ModelRef("toy.onnx", "00", {}, 1234567, 2),
        clock_hz=1e6,
        units=("a[0]", "b", "unused"),
        memories=(("sram", 64),),
        opcodes=("run",),
        programs={"decode": program},
        buffers=BUFFER_SCHEMA.empty_table(),
        ops=ops,
        ports=(),
        provenance={"bounds": {"decode": [{"name": "units", "seconds": 2e-5, "why": "unit a: 20 cycles"}]}},
    )


class Timed:
    """A backend's retime alone: 3 latencies and 5 issues, in microseconds."""

    def retime(self, schedule: Schedule, machine: Machine) -> Mapping[Phase, float]:
        return {"decode": (3 * machine.value("latency") + 5 * machine.value("issue")) * 1e-6}


def result() -> Result:
    """What the driver would say of `schedule()`."""
    made = schedule()
    band = bands(Timed(), made, parse(MACHINE))["decode"]
    program = made.programs["decode"]
    estimate = Estimate(
        band.time_s,
        band.low_s,
        band.high_s,
        Bound("units", 2e-5, "unit a: 20 cycles"),
        2,
        1,
        step_count(program),
        band.influences,
        loads(made, program),
    )
    return Result("toy", "toy", 1, 1234567, 2, {"decode": estimate}, {"Good": True, "Bad": False}, None)
