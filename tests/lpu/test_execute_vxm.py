"""The VXM: operand kinds, the pipeline, casts, the wiring rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mapper.errors import ExecutionFault
from mapper_lpu import isa
from tests.lpu.assembler import Bench, E, Line, W, bits

RANDOM = np.random.default_rng(11)
ENTRY, ALU = 3, 3
NEAR = [f"mem.e.{n:02d}" for n in range(44)]


def numbers(dtype: str = "float32") -> Any:
    """320 random numbers."""
    return (100 * RANDOM.standard_normal(320)).astype(dtype)


def stream_in(bench: Bench, values: Any, first: int, stream: int, arrival: int) -> list[Line]:
    """Reads of east slices first.. such that the value is at x = 0 on (W, stream..) in cycle `arrival`."""
    units = NEAR[first : first + values.itemsize]
    lines = []
    for i, b in enumerate(bench.planes(units, bench.rows - 1, values)):
        cycle = arrival - (1 + (first + i) // 4) - 1
        lines.append(Line(cycle, units[i], "mem.read", (W, stream + i), (b, 0, 320)))
    return lines


def stream_out(bench: Bench, first: int, count: int, stream: int, departure: int, row: int = 0) -> list[Line]:
    """Writes of what leaves x = 0 on (E, stream..) in cycle `departure` into east slices first.."""
    lines = []
    for i in range(count):
        unit = NEAR[first + i]
        cycle = departure + 1 + (first + i) // 4
        lines.append(Line(cycle, unit, "mem.write", (E, stream + i), (bench.buffer(unit, row), 0, 320)))
    return lines


def unary(
    alu: int, opcode: str, x: Any, out: tuple[int, int], cycle: int = 20, extra: tuple[int, ...] = ()
) -> Any:
    """Run one unary instruction on values that enter at stream 0."""
    bench = Bench(rows=4)
    code = extra[1] if extra else isa.I16 if opcode == "vxm.tanh" else isa.F32
    size = isa.TYPE_BYTES[code]
    lines = [
        *stream_in(bench, x, 8, 0, cycle - ENTRY),
        Line(cycle, f"vxm.{alu:02d}", opcode, (isa.OUTER, W, 0, *out, *extra)),
        *stream_out(bench, 16, size, out[1], cycle + ALU),
    ]
    bench.run(lines)
    kind = ["int8", "int16", "int32", "float16", "float32"][code]
    return bench.numbers(NEAR[16 : 16 + size], 0, kind)


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "max", "min"])
def test_binary_of_two_streams(opcode: str) -> None:
    a, b = numbers(), numbers()
    bench = Bench(rows=4)
    bench.run(
        [
            *stream_in(bench, a, 8, 0, 20),
            *stream_in(bench, b, 12, 8, 20),
            Line(20 + ENTRY, "vxm.00", f"vxm.{opcode}", (isa.OUTER, W, 0, isa.OUTER, W, 8, E, 28)),
            *stream_out(bench, 16, 4, 28, 20 + ENTRY + ALU),
        ]
    )
    names = {"sub": np.subtract, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    assert np.array_equal(bench.numbers(NEAR[16:20], 0, "float32"), names[opcode](a, b))


def test_functions_are_rounded_once() -> None:
    x = numbers() / np.float32(30)
    wide = x.astype(np.float64)
    assert np.array_equal(unary(2, "vxm.exp2", x, (E, 0)), np.exp2(wide).astype(np.float32))
    assert np.array_equal(unary(2, "vxm.rsqrt", abs(x), (E, 0)), (1 / np.sqrt(abs(wide))).astype(np.float32))
    assert np.array_equal(unary(1, "vxm.neg", x, (E, 0)), -x)
    assert np.array_equal(unary(3, "vxm.copy", x, (E, 0)), x)
    assert np.array_equal(unary(0, "vxm.relu", x, (E, 0)), np.maximum(x, 0))


def test_tanh_is_a_function_of_int16() -> None:
    x = RANDOM.integers(-32768, 32768, 320).astype(np.int16)
    x[:4] = [0, 32767, -32768, -32767]
    expected = np.rint(32767 * np.tanh(6 * x.astype(np.float64) / 32767)).astype(np.int16)
    assert np.array_equal(unary(2, "vxm.tanh", x, (E, 0)), expected)


def test_casts() -> None:
    x = np.concatenate(
        [numbers()[:300], np.array([2.5, -3.5, 1e30, -1e30, 65520, 65519, 3e-8, 127.5] * 3)[:20]]
    )
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        assert np.array_equal(unary(0, "vxm.cast", x, (E, 0), extra=(4, 3)), x.astype(np.float16))
    for code, name in ((0, "int8"), (1, "int16"), (2, "int32")):
        limits = np.iinfo(name)
        expected = np.clip(np.rint(x.astype(np.float64)), limits.min, limits.max).astype(name)
        assert np.array_equal(unary(0, "vxm.cast", x, (E, 4), extra=(4, code)), expected)
    half = numbers("float16")
    assert np.array_equal(unary(0, "vxm.cast", half, (E, 0), extra=(3, 4)), half.astype(np.float32))
    whole = RANDOM.integers(-(2**31), 2**31, 320).astype(np.int32)
    assert np.array_equal(unary(0, "vxm.cast", whole, (E, 0), extra=(2, 4)), whole.astype(np.float32))
    small = RANDOM.integers(-128, 128, 320).astype(np.int8)
    assert np.array_equal(unary(0, "vxm.cast", small, (E, 0), extra=(0, 4)), small.astype(np.float32))


def chain(bench: Bench, x: Any, shift: int = 0) -> list[Line]:
    """y = (x * 3 + 1) with the product passed on inside, from rank 0 to rank 1, eastward on group 2."""
    return [
        *stream_in(bench, x, 8, 0, 20),
        Line(23, "vxm.00", "vxm.mul", (isa.OUTER, W, 0, isa.IMMEDIATE, bits(3), 0, E, 8)),
        Line(26 + shift, "vxm.01", "vxm.add", (isa.INNER, E, 8, isa.IMMEDIATE, bits(1), 0, E, 16)),
        *stream_out(bench, 16, 4, 16, 29 + shift),
    ]


def test_inner_operands_are_taken_in_the_cycle_of_their_production() -> None:
    x = numbers()
    bench = Bench()
    bench.run(chain(bench, x))
    assert np.array_equal(bench.numbers(NEAR[16:20], 0, "float32"), x * np.float32(3) + np.float32(1))
    for shift in (-1, 1):
        late = Bench()
        with pytest.raises(ExecutionFault, match=rf"cycle {26 + shift}: vxm.01 vxm.add: no valid vector"):
            late.run(chain(late, x, shift))


def test_an_inner_operand_must_come_from_an_alu_upstream() -> None:
    bench = Bench()
    lines = [
        *stream_in(bench, numbers(), 8, 0, 20),
        Line(23, "vxm.02", "vxm.neg", (isa.OUTER, W, 0, E, 8)),
        Line(26, "vxm.01", "vxm.neg", (isa.INNER, E, 8, E, 16)),
    ]
    with pytest.raises(ExecutionFault, match="against the direction"):
        bench.run(lines)
    passing = [
        *stream_in(bench, numbers(), 8, 0, 20),
        Line(20, "vxm.01", "vxm.neg", (isa.INNER, W, 0, E, 16)),
    ]
    with pytest.raises(ExecutionFault, match="not produced by an ALU"):
        bench.run(passing)


def test_the_output_register_accumulates() -> None:
    """Three interleaved sums: an instruction sees the result of three cycles before, not a younger one."""
    bench = Bench()
    x = [numbers() for _ in range(9)]
    lines: list[Line] = []
    for i, values in enumerate(x):
        for j, b in enumerate(bench.planes(NEAR[8:12], i, values)):
            lines.append(Line(20 + i - 4, NEAR[8 + j], "mem.read", (W, j), (b, 0, 320)))
        last = i >= 6
        out = (E, 8) if last else (-1, 0)
        args = (isa.OUTER, W, 0, *out) if i < 3 else (isa.OUTER, W, 0, isa.ACC, 0, 0, *out)
        lines.append(Line(23 + i, "vxm.00", "vxm.copy" if i < 3 else "vxm.add", args))
        if last:
            lines += stream_out(bench, 16, 4, 8, 26 + i, row=i)
    bench.run(lines)
    for i in range(6, 9):
        expected = x[i] + (x[i - 3] + x[i - 6])
        assert np.array_equal(bench.numbers(NEAR[16:20], i, "float32"), expected)


def test_an_old_result_stays_in_the_output_register() -> None:
    bench = Bench()
    lines = [
        Line(5, "vxm.00", "vxm.copy", (isa.IMMEDIATE, bits(7), 0, -1, 0)),
        Line(48, "vxm.00", "vxm.copy", (isa.IMMEDIATE, bits(9), 0, -1, 0)),
        Line(50, "vxm.00", "vxm.copy", (isa.ACC, 0, 0, E, 0)),
        Line(51, "vxm.00", "vxm.copy", (isa.ACC, 0, 0, E, 0)),
        *stream_out(bench, 16, 4, 0, 53, row=0),
        *stream_out(bench, 16, 4, 0, 54, row=1),
    ]
    bench.run(lines)
    assert bench.numbers(NEAR[16:20], 0, "float32")[0] == 7
    assert bench.numbers(NEAR[16:20], 1, "float32")[0] == 9
    with pytest.raises(ExecutionFault, match="holds no result"):
        bench.run([Line(4, "vxm.00", "vxm.copy", (isa.ACC, 0, 0, E, 0)), lines[0]])


def test_integer_add_wraps() -> None:
    bench = Bench()
    x = RANDOM.integers(-(2**31), 2**31, 320).astype(np.int32)
    lines = [
        *stream_in(bench, x, 8, 0, 20),
        Line(23, "vxm.00", "vxm.iadd", (isa.OUTER, W, 0, isa.IMMEDIATE, 2**30, 0, E, 8)),
        *stream_out(bench, 16, 4, 8, 26),
    ]
    bench.run(lines)
    assert np.array_equal(bench.numbers(NEAR[16:20], 0, "int32"), x + np.int32(2**30))


def test_a_late_or_missing_byte_of_an_operand_is_a_fault() -> None:
    for missing in range(4):
        bench = Bench()
        lines = stream_in(bench, numbers(), 8, 0, 20)
        lines[missing].cycle += 1
        with pytest.raises(ExecutionFault, match=r"cycle 23: vxm.00 vxm.neg: no valid vector"):
            bench.run([*lines, Line(23, "vxm.00", "vxm.neg", (isa.OUTER, W, 0, E, 8))])


@pytest.mark.parametrize(
    ("alu", "opcode", "args", "reason"),
    [
        (1, "vxm.exp2", (isa.IMMEDIATE, 0, 0, E, 0), "large ALU"),
        (0, "vxm.neg", (isa.OUTER, W, 16, E, 0), "do not reach"),  # row 0 sees groups 0..3
        (15, "vxm.neg", (isa.OUTER, W, 8, E, 0), "do not reach"),  # row 3: 6, 7, 0, 1
        (0, "vxm.add", (isa.OUTER, W, 4, isa.OUTER, E, 4, E, 0), "both directions"),
        (0, "vxm.neg", (isa.OUTER, W, 2, E, 0), "aligned"),
        (0, "vxm.cast", (isa.IMMEDIATE, 0, 0, E, 0, 4, 5), "type does not exist"),
    ],
)
def test_the_wiring_rule(alu: int, opcode: str, args: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ExecutionFault, match=reason):
        Bench().run([Line(0, f"vxm.{alu:02d}", opcode, args)])
