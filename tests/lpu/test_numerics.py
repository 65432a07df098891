"""Arithmetic of the chip against NumPy, exhaustively where that is possible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mapper_lpu import isa
from mapper_lpu.chip import codes, numerics

RANDOM = np.random.default_rng(3)
HALVES = np.arange(65536, dtype=np.uint16)


def padded(values: Any, dtype: Any = np.uint32) -> Any:
    """Rows of 320 lanes."""
    rows = np.zeros(-(-len(values) // 320) * 320, dtype)
    rows[: len(values)] = values
    return rows.reshape(-1, 320)


def cast(values: Any, kind: int, to: int) -> Any:
    """cast_lanes of any number of bit patterns."""
    rows = padded(values)
    out = np.zeros_like(rows)
    for source, target in zip(rows, out, strict=True):
        numerics.cast_lanes(source, target, kind, to)
    return out.reshape(-1)[: len(values)]


def test_every_fp16_number_widens_exactly() -> None:
    got = cast(HALVES, isa.F16, isa.F32).view(np.float32)
    expected = HALVES.view(np.float16).astype(np.float32)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(expected))


def test_every_fp16_number_and_its_midpoints_narrow_to_nearest_even() -> None:
    exact = HALVES.view(np.float16).astype(np.float32).view(np.uint32)
    random = RANDOM.integers(0, 2**32, 200_000).astype(np.uint32)
    bits = np.concatenate([exact, exact + 0x0FFF, exact + 0x1000, exact + 0x1001, random])
    # subnormal fp16: the midpoints and their neighbours in float32
    middle = ((np.arange(1024) + 0.5) * 2.0**-24).astype(np.float32).view(np.uint32)
    bits = np.concatenate([bits, middle - 1, middle, middle + 1]).astype(np.uint32)
    got = cast(bits, isa.F32, isa.F16)
    assert got.max() < 65536
    with np.errstate(over="ignore", invalid="ignore"):
        expected = bits.view(np.float32).astype(np.float16)
    half = got.astype(np.uint16).view(np.float16)
    assert np.array_equal(half, expected, equal_nan=True)
    assert np.array_equal(np.signbit(half), np.signbit(expected))


@pytest.mark.parametrize(("to", "name"), [(isa.I8, "int8"), (isa.I16, "int16"), (isa.I32, "int32")])
def test_casts_to_integers_saturate(to: int, name: str) -> None:
    values = np.concatenate([RANDOM.standard_normal(500) * 10.0**e for e in range(-1, 12)]).astype(np.float32)
    values = np.concatenate([values, np.array([0.5, 1.5, -0.5, -2.5, np.inf, -np.inf, np.nan], np.float32)])
    limits = np.iinfo(name)
    expected = np.clip(
        np.nan_to_num(np.rint(values.astype(np.float64)), posinf=1e30, neginf=-1e30), limits.min, limits.max
    )
    got = cast(values.view(np.uint32), isa.F32, to).astype(np.uint32).view(np.int32)
    assert np.array_equal(got, expected.astype(np.int64))


def test_int32_to_float_rounds_once() -> None:
    whole = RANDOM.integers(-(2**31), 2**31, 3200).astype(np.int32)
    assert np.array_equal(
        cast(whole.view(np.uint32), isa.I32, isa.F32).view(np.float32), whole.astype(np.float32)
    )
    with np.errstate(over="ignore"):
        expected = whole.astype(np.float16).view(np.uint16)
    assert np.array_equal(cast(whole.view(np.uint32), isa.I32, isa.F16), expected)


def test_special_values() -> None:
    for value, expected in ((0.0, math.inf), (-0.0, -math.inf), (4.0, 0.5), (math.inf, 0.0)):
        assert numerics.inverse_root(np.float32(value)) == expected
    assert math.isnan(numerics.inverse_root(np.float32(-1)))
    assert numerics.power_of_two(np.float32(-200)) == 0 and numerics.power_of_two(np.float32(200)) == math.inf
    assert numerics.power_of_two(np.float32(-149)) == np.float32(2.0**-149)


def test_an_fp16_pair_is_split_exactly() -> None:
    """Every finite fp16 number is among the weights."""
    finite = np.where(np.isfinite(HALVES.view(np.float16)), HALVES, 0).astype(np.uint16)
    bits = np.resize(finite, 320 * 320).reshape(320, 320)
    low, high = (bits & 255).astype(np.uint8), (bits >> 8).astype(np.uint8)
    lower, upper = np.zeros((2, 320, 320), np.float32)
    numerics.split_halves(low, high, lower, upper)
    whole = bits.view(np.float16).astype(np.float64)
    zeroed = (bits & 0xFF00).view(np.float16).astype(np.float64)
    assert np.array_equal(upper, zeroed)
    assert np.array_equal(lower, whole - zeroed)


def test_dot_products_are_summed_in_float64() -> None:
    weights = RANDOM.standard_normal((320, 320)).astype(np.float16).astype(np.float32)
    vector = RANDOM.standard_normal(320).astype(np.float16).astype(np.float64)
    result = np.zeros(320)
    numerics.dot_rows(weights, vector, np.zeros(numerics.PARTIALS), result)
    exact = [math.fsum(row * vector) for row in weights.astype(np.float64)]
    np.testing.assert_allclose(result, exact, rtol=0, atol=1e-12)


def test_the_compiled_loop_and_the_isa_agree_on_numbers() -> None:
    assert set(codes.OPERATIONS) == set(isa.OPCODES)
    assert [codes.I8, codes.I16, codes.I32, codes.F16, codes.F32] == [
        isa.I8,
        isa.I16,
        isa.I32,
        isa.F16,
        isa.F32,
    ]
    kinds = [codes.IMMEDIATE, codes.OUTER, codes.INNER, codes.ACC]
    assert kinds == [isa.IMMEDIATE, isa.OUTER, isa.INNER, isa.ACC]
    for name, number in (("vxm.add", codes.ADD), ("vxm.cast", codes.CAST), ("mxm.load", codes.LOAD)):
        assert codes.OPERATIONS[name] == number
    assert codes.OPERATIONS["sxm.permute"] == codes.PERMUTE
    assert (codes.LANES, codes.STREAMS, codes.ALUS) == (isa.LANES, isa.STREAMS, isa.ALUS)
