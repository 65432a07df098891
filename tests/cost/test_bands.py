"""Bands: one constant at a time, in quadrature. Expectations worked out by hand for tests/sample.py."""

from __future__ import annotations

import math

import pytest

from mapper.cost.bands import bands
from mapper.machine import parse
from tests.sample import MACHINE, Timed, result, schedule


def test_deviations_are_summed_in_quadrature_apart_for_each_direction() -> None:
    band = bands(Timed(), schedule(), parse(MACHINE))["decode"]
    # nominal 3*10 + 5*2 = 40 us; latency 7..14 moves it by -9..+12, issue 2..5 by 0..+15, idle by nothing
    assert band.time_s == pytest.approx(40e-6)
    assert band.low_s == pytest.approx(31e-6)
    assert band.high_s == pytest.approx((40 + math.hypot(12, 15)) * 1e-6)
    assert [i.key for i in band.influences] == ["issue", "latency"]
    assert band.influences[1].at_low_s == pytest.approx(-9e-6)
    assert band.influences[1].at_high_s == pytest.approx(12e-6)


def test_a_point_machine_has_a_point_band() -> None:
    machine = parse("\n".join(line for line in MACHINE.splitlines() if not line.startswith(("low", "high"))))
    band = bands(Timed(), schedule(), machine)["decode"]
    assert (band.low_s, band.high_s, band.influences) == (band.time_s, band.time_s, ())


def test_record_has_exactly_the_stable_keys() -> None:
    record = result().record()
    assert list(record) == ["target", "machine", "chips", "model", "phases", "checks", "schedule_dir"]
    assert record["model"] == {"params": 1234567, "layers": 2}
    assert record["checks"] == {"Good": True, "Bad": False}
    decode = record["phases"]["decode"]
    assert list(decode) == (
        [
            "time_s",
            "low_s",
            "high_s",
            "bound_s",
            "bound_name",
            "ratio",
            "tokens_per_s_per_user",
            "tokens_per_s",
            "steps",
        ]
    )
    assert decode["ratio"] == pytest.approx(2.0)
    assert decode["tokens_per_s_per_user"] == pytest.approx(25_000)
    assert decode["tokens_per_s"] == pytest.approx(50_000)  # batch 2
    assert decode["steps"] == 5


def test_loads_count_repetitions_and_leave_out_idle_units() -> None:
    found = result().phases["decode"].loads
    assert [(u.unit, u.share, u.steps) for u in found] == [("a[0]", 0.5, 4), ("b", 0.25, 1)]
