"""The MXM: load, install, activate, emit, and the arithmetic of one plane and of an fp16 pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mapper.errors import ExecutionFault
from mapper_lpu import isa
from tests.lpu.assembler import Bench, E, Line, W

RANDOM = np.random.default_rng(5)
LATENCY, EDGE = 32, 16
FEED = [f"mem.e.{n:02d}" for n in range(16)]  # x = 1..4
SHOW = [f"mem.e.{n:02d}" for n in range(36, 44)]  # x = 10, 11


def load(bench: Bench, plane: int, rows: Any, first: int, row: int, base: int = 0) -> list[Line]:
    """Load 320 rows of 320 bytes: group g is taken in cycle first + g."""
    lines = []
    for g in range(20):
        for i in range(16):
            b = bench.put(FEED[i], row + g, rows[16 * g + i])
            cycle = first + g - (EDGE - (1 + i // 4)) - 1
            lines.append(Line(cycle, FEED[i], "mem.read", (E, base + i), (b, 0, 320)))
        lines.append(Line(first + g, f"mxm.e.{plane}.load", "mxm.load", (g, base)))
    return lines


def activate(
    bench: Bench, values: Any, cycle: int, stream: int, planes: tuple[int, ...], row: int
) -> list[Line]:
    """Bring the activation from slices 32.. (x = 9) to the MXM for `cycle`, and accept it on some planes."""
    lines = []
    for i, b in enumerate(bench.planes([f"mem.e.{32 + i}" for i in range(values.itemsize)], row, values)):
        at = (b, 0, 320)
        lines.append(Line(cycle - (EDGE - 9) - 1, f"mem.e.{32 + i}", "mem.read", (E, stream + i), at))
    kind = isa.I8 if values.itemsize == 1 else isa.F16
    return lines + [Line(cycle, f"mxm.e.{p}.in", "mxm.activate", (kind, stream)) for p in planes]


def emit(bench: Bench, plane: int, cycle: int, group: int, row: int, units: list[str]) -> list[Line]:
    """Emit and store in four slices."""
    lines = [Line(cycle, f"mxm.e.{plane}.out", "mxm.emit", (4 * group,))]
    for i, unit in enumerate(units):
        at = (bench.buffer(unit, row), 0, 320)
        hops = EDGE - (1 + int(unit[-2:]) // 4)
        lines.append(Line(cycle + hops, unit, "mem.write", (W, 4 * group + i), at))
    return lines


def signed() -> Any:
    """320 x 320 int8 weights."""
    return RANDOM.integers(-128, 128, (320, 320)).astype(np.int8)


def test_int8_is_exact_and_install_timing_decides_the_weights() -> None:
    bench = Bench(rows=100)
    old, new = signed(), signed()
    a = [RANDOM.integers(-128, 128, 320).astype(np.int8) for _ in range(2)]
    a[1][:] = -128
    lines = [
        *load(bench, 1, old.view(np.uint8), 20, 0),
        Line(40, "mxm.e.1.load", "mxm.install"),
        *load(bench, 1, new.view(np.uint8), 50, 40),
        Line(70, "mxm.e.1.load", "mxm.install"),
        *activate(bench, a[0], 71, 31, (1,), 0),  # one cycle before the new weights
        *activate(bench, a[1], 72, 31, (1,), 1),
        *emit(bench, 1, 71 + LATENCY, 2, 0, SHOW[:4]),
        *emit(bench, 1, 72 + LATENCY, 2, 1, SHOW[:4]),
    ]
    bench.run(lines)
    for i, weights in enumerate((old, new)):
        expected = weights.astype(np.int32) @ a[i].astype(np.int32)
        assert np.array_equal(bench.numbers(SHOW[:4], i, np.int32), expected)


def test_fp16_pair_joined_by_an_add() -> None:
    bench = Bench(rows=100)
    weights = RANDOM.standard_normal((320, 320)).astype(np.float16)
    weights[0, :8] = [6e-8, 65504, -65504, 6.1e-5, 0, -0.0, 1, 3e-6]
    a = RANDOM.standard_normal(320).astype(np.float16)
    parts = np.ascontiguousarray(weights).view(np.uint8).reshape(320, 320, 2)
    arrival = 72 + LATENCY + EDGE
    out = [f"mem.w.{n:02d}" for n in range(4)]
    lines = [
        *load(bench, 0, parts[:, :, 0], 20, 0),
        *load(bench, 1, parts[:, :, 1], 40, 20, base=16),
        Line(60, "mxm.e.0.load", "mxm.install"),
        Line(60, "mxm.e.1.load", "mxm.install"),
        *activate(bench, a, 72, 30, (0, 1), 60),
        Line(72 + LATENCY, "mxm.e.0.out", "mxm.emit", (0,)),
        Line(72 + LATENCY, "mxm.e.1.out", "mxm.emit", (4,)),
        Line(arrival + 3, "vxm.00", "vxm.add", (isa.OUTER, W, 0, isa.OUTER, W, 4, W, 0)),
    ]
    for i, unit in enumerate(out):
        lines.append(Line(arrival + 7, unit, "mem.write", (W, i), (bench.buffer(unit), 0, 320)))
    bench.run(lines)
    w, x = weights.astype(np.float64), a.astype(np.float64)
    high = (parts[:, :, 1].astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    joined = (high @ x).astype(np.float32) + ((w - high) @ x).astype(np.float32)
    got = bench.numbers(out, 0, np.float32)
    np.testing.assert_array_max_ulp(got, joined, 1)
    error = abs(got - w @ x) / (abs(w) @ abs(x))
    assert error.max() < 2**-23


def program(bench: Bench) -> list[Line]:
    """A correct int8 program: install at 40, activate at 50, emit at 82."""
    return [
        *load(bench, 0, signed().view(np.uint8), 20, 0),
        Line(40, "mxm.e.0.load", "mxm.install"),
        *activate(bench, RANDOM.integers(-128, 128, 320).astype(np.int8), 50, 3, (0,), 0),
        *emit(bench, 0, 82, 0, 0, SHOW[:4]),
    ]


def find(lines: list[Line], opcode: str) -> Line:
    """The last line with an opcode."""
    return next(x for x in reversed(lines) if x.opcode == opcode)


def test_faults() -> None:
    bench = Bench()
    bench.run(program(bench))
    changes = [
        ("mxm.install", 39, "queue is taken|never loaded"),
        ("mxm.activate", 51, "no valid vector"),
        ("mxm.activate", 41, "no weights"),
        ("mxm.emit", 83, "no activation was accepted"),
        ("mxm.emit", 81, "no activation was accepted"),
    ]
    for opcode, cycle, reason in changes:
        broken = Bench()
        lines = program(broken)
        find(lines, opcode).cycle = cycle
        with pytest.raises(ExecutionFault, match=reason):
            broken.run(lines)
    during = Bench()
    late = [Line(41, "mxm.e.0.load", "mxm.load", (0, 0))]
    with pytest.raises(ExecutionFault, match=r"cycle 41: mxm.e.0.load mxm.load: the queue is taken"):
        during.run(program(during) + late)


def test_an_fp16_activation_needs_both_planes() -> None:
    bench = Bench(rows=100)
    a = RANDOM.standard_normal(320).astype(np.float16)
    both = [*load(bench, 0, signed().view(np.uint8), 20, 0), *load(bench, 1, signed().view(np.uint8), 40, 20)]
    both += [Line(60, f"mxm.e.{p}.load", "mxm.install") for p in (0, 1)]
    with pytest.raises(ExecutionFault, match="other plane"):
        bench.run([*both, *activate(bench, a, 72, 30, (1,), 60)])
    with pytest.raises(ExecutionFault, match="no weights"):
        bench.run([*both[:-1], *activate(bench, a, 72, 30, (0, 1), 61)])
