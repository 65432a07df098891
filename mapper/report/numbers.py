"""Numbers for people: times, rates and counts with three significant digits and decimal units."""

from __future__ import annotations

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def significant(x: float) -> str:
    """Three significant digits, never in exponent form between 0.001 and a million."""
    if x == 0:
        return "0"
    if abs(x) >= 100:
        return f"{x:,.0f}" if abs(x) < 1e6 else f"{x:.3g}"
    return f"{x:.3g}"


def seconds(x: float) -> str:
    """A time given in seconds, in s, ms, us or ns."""
    for size, unit in _TIMES:
        if abs(x) >= size:
            return f"{significant(x / size)} {unit}"
    return "0 s" if x == 0 else f"{significant(x / 1e-9)} ns"


def count(x: float) -> str:
    """A count or a rate with a decimal prefix: 3.48 M."""
    for size, prefix in _COUNTS:
        if abs(x) >= size:
            return f"{significant(x / size)} {prefix}"
    return significant(x)


def share(x: float) -> str:
    """A share as a percentage."""
    return f"{100 * x:.1f} %"
