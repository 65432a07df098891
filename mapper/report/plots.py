"""Plots as inline SVG, for the HTML report. Colours are the page's CSS variables: light and dark work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mapper.cost.bands import Influence
from mapper.cost.estimate import Result, UnitLoad
from mapper.report.numbers import seconds, share

WIDTH, LEFT, RIGHT, ROW, TOP = 860, 190, 150, 30, 34


def times(found: Sequence[Result]) -> str:
    """One row per target and phase on a logarithmic time axis: the band, the estimate and its lower bound."""
    rows = [(f"{r.target} {phase}", e) for r in found for phase, e in r.phases.items()]
    ends = [v for _, e in rows for v in (e.low_s, e.high_s, e.bound.seconds, e.time_s) if v > 0]
    if not ends:
        return ""
    first, last = math.floor(math.log10(min(ends))), math.ceil(math.log10(max(ends)))
    decades = max(last - first, 1)

    def x(value: float) -> float:
        place = (math.log10(value) - first) / decades if value > 0 else 0.0
        return LEFT + place * (WIDTH - LEFT - RIGHT)

    parts = []
    for d in range(first, first + decades + 1):
        parts.append(_line(x(10.0**d), TOP - 8, x(10.0**d), TOP + ROW * len(rows), "var(--line)"))
        parts.append(_text(x(10.0**d), TOP - 14, seconds(10.0**d), "middle", "dim"))
    for i, (label, e) in enumerate(rows):
        y = TOP + ROW * i + ROW / 2
        low, high, bound = x(e.low_s), x(e.high_s), x(e.bound.seconds)
        parts += [
            _text(LEFT - 12, y + 4, label, "end"),
            _bar(low, y - 6, max(high - low, 1), 12, "var(--band)"),
            _line(bound, y - 11, bound, y + 11, "var(--bound)", 2.5),
            f'<circle cx="{x(e.time_s):.1f}" cy="{y:.1f}" r="5" fill="var(--accent)"/>',
            _text(WIDTH - RIGHT + 12, y + 4, f"{seconds(e.time_s)}, {e.ratio:.2f} x bound", "start", "dim"),
        ]
    return _svg(TOP + ROW * len(rows) + 6, parts, "Estimated time per phase with its band and lower bound")


def influences(found: Sequence[Influence], top: int = 8) -> str:
    """A tornado: what each constant at its low and its high end adds to or takes from the time."""
    shown = found[:top]
    if not shown:
        return ""
    reach = max(i.span_s for i in shown)
    middle = (LEFT + 60 + WIDTH - RIGHT) / 2
    scale = (WIDTH - RIGHT - middle) / reach
    parts = [_line(middle, 8, middle, 12 + 26 * len(shown), "var(--line)")]
    for i, influence in enumerate(shown):
        y = 12 + 26 * i
        parts.append(_text(LEFT + 50, y + 15, influence.key, "end"))
        for delta, colour in ((influence.at_low_s, "var(--accent)"), (influence.at_high_s, "var(--bound)")):
            left = middle + min(delta, 0) * scale
            parts.append(_bar(left, y + 4, abs(delta) * scale, 14, colour))
        parts.append(_text(WIDTH - RIGHT + 12, y + 15, f"up to {seconds(influence.span_s)}", "start", "dim"))
    return _svg(20 + 26 * len(shown), parts, "Constants that move the time most")


def loads(found: Sequence[UnitLoad], top: int = 12) -> str:
    """Bars: how busy the busiest units are."""
    shown = found[:top]
    parts = []
    for i, load in enumerate(shown):
        y = 4 + 24 * i
        full = WIDTH - LEFT - RIGHT
        parts += [
            _text(LEFT - 12, y + 14, load.unit, "end"),
            _bar(LEFT, y + 3, full, 14, "var(--soft)"),
            _bar(LEFT, y + 3, full * min(load.share, 1), 14, "var(--accent)"),
            _text(WIDTH - RIGHT + 12, y + 14, f"{share(load.share)}, {load.steps:,} steps", "start", "dim"),
        ]
    return _svg(8 + 24 * len(shown), parts, "Busiest units") if shown else ""


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    name = escape(title)
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}"><title>{name}</title>'
    return head + "".join(parts) + "</svg>"


def _bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} rx="2" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    css = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}</text>'
