"""Tables for the terminal (rich). They print what the records hold and compute nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mapper.errors import printable
from mapper.report.numbers import count, seconds, share, significant

if TYPE_CHECKING:
    from mapper.backend import Finding
    from mapper.cost.estimate import Estimate, Result

WIDTH_OFF_TERMINAL = 160


def console(errors: bool = False) -> Console:
    """Standard output, or that for errors; off a terminal, wide and without colour."""
    terminal = (sys.stderr if errors else sys.stdout).isatty()
    return Console(
        stderr=errors, width=None if terminal else WIDTH_OFF_TERMINAL, highlight=False, markup=False
    )


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the house style; columns named in `right` are right-aligned."""
    made = Table(
        title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
    )
    for name in columns:
        numeric = name in right
        made.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return made


def results(found: Sequence[Result]) -> list[RenderableType]:
    """What `mapper compile` says: a row per target and phase, then the checks and where the schedules are."""
    numeric = ("time", "band", "bound", "ratio", "tokens/s/user", "tokens/s", "steps")
    made = table("", "target", "machine", "phase", *numeric, "bottleneck", right=numeric)
    for result in found:
        for phase, e in result.phases.items():
            made.add_row(result.target, result.machine, phase, *_figures(e), bottleneck(e))
    lines: list[RenderableType] = [made]
    for result in found:
        lines.append(checks(result.checks, f"{result.target} checks"))
        if result.schedule_dir is not None:
            lines.append(f"{result.target} schedule: {result.schedule_dir}")
        lines += [f"{result.target} {note}" for note in result.notes]
    return lines


def _figures(e: Estimate) -> list[str]:
    record = e.record()
    return [
        seconds(e.time_s),
        f"{seconds(e.low_s)} .. {seconds(e.high_s)}",
        f"{seconds(e.bound.seconds)} ({e.bound.name})",
        f"{e.ratio:.2f}",
        count(record["tokens_per_s_per_user"]),
        count(record["tokens_per_s"]),
        f"{e.steps:,}",
    ]


def bottleneck(e: Estimate) -> str:
    """The busiest unit and its share of the time."""
    return f"{e.loads[0].unit}, busy {share(e.loads[0].share)}" if e.loads else "none"


def checks(found: Mapping[str, bool], title: str = "checks") -> Text:
    """One line: each check and whether it holds."""
    parts = [
        Text(name, "green") if ok else Text(f"{name} FAILS", "bold red") for name, ok in sorted(found.items())
    ]
    return Text(f"{title}: ") + Text(", ").join(parts)


def explanation(phase: str, e: Estimate, top: int = 10) -> list[RenderableType]:
    """What `mapper explain` says of one phase: bound, busiest units, dominating constants."""
    lines: list[RenderableType] = [
        f"{phase}: {seconds(e.time_s)} ({seconds(e.low_s)} .. {seconds(e.high_s)}), "
        f"{e.ratio:.2f} x the bound {e.bound.name} of {seconds(e.bound.seconds)}: {e.bound.why}"
    ]
    influences = table(
        "constants that move the time most", "constant", "at low", "at high", right=("at low", "at high")
    )
    for i in e.influences[:top]:
        influences.add_row(i.key, _change(i.at_low_s, e.time_s), _change(i.at_high_s, e.time_s))
    units = table("busiest units", "unit", "busy", "steps", right=("busy", "steps"))
    for load in e.loads[:top]:
        units.add_row(load.unit, share(load.share), f"{load.steps:,}")
    lines += [influences if e.influences else "no constant has a range: the band is a point", units]
    return [*lines, *(_finding(f, top) for f in e.findings)]


def _finding(found: Finding, top: int) -> Table:
    """A target's own table; columns of numbers on the right."""
    numeric = [
        name for i, name in enumerate(found.columns) if any(isinstance(r[i], float | int) for r in found.rows)
    ]
    made = table(found.title, *found.columns, right=numeric)
    for row in found.rows[:top]:
        made.add_row(*(_cell(v) for v in row))
    return made


def _change(delta: float, time: float) -> str:
    if not delta or not time:
        return "0"
    sign = "+" if delta > 0 else "-"
    return f"{sign}{seconds(abs(delta))} ({sign}{significant(100 * abs(delta) / time)} %)"


def fields(record: Mapping[str, Any], title: str = "") -> Table:
    """A record as a two-column table; nested records and lists are written out in one cell."""
    made = table(title, "field", "value")
    for key, value in record.items():
        made.add_row(printable(key.replace("_", " ")), _cell(value))
    return made


def folded(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose entries that differ by one number alone are one: `cache.{0..31}.key`, `{0,2..30}`."""
    groups: dict[Any, list[tuple[str, ...]]] = {}
    values: dict[Any, Any] = {}
    for name, value in record.items():
        parts = tuple(re.split(r"(\d+)", name))
        plain = re.sub(r"\d+", "#", str(value.get("role", ""))) if isinstance(value, Mapping) else ""
        rest = {**value, "role": plain} if isinstance(value, Mapping) else value
        key = (parts[0], parts[2:], repr(rest)) if len(parts) > 2 else (name,)
        groups.setdefault(key, []).append(parts)
        values.setdefault(key, value if len(parts) < 3 else rest)
    out: dict[str, Any] = {}
    for key, names in groups.items():
        first = names[0]
        numbered = (
            f"{first[0]}{{{_span([int(n[1]) for n in names])}}}{''.join(first[2:])}" if names[1:] else ""
        )
        name = numbered or "".join(first)
        out[name] = values[key] if numbered else record[name]
    return out


def _span(numbers: Sequence[int]) -> str:
    """Numbers as `0..3` or `0,2..6` where their steps are equal, else all of them."""
    first, second, last = numbers[0], numbers[1], numbers[-1]
    steady = all(b - a == second - first for a, b in pairwise(numbers))
    if steady and second == first + 1:
        return f"{first}..{last}"
    return f"{first},{second}..{last}" if steady and len(numbers) > 3 else ",".join(map(str, numbers))


def _cell(value: Any, depth: int = 0) -> str:
    """Records of records and lists of records take a line each; what is inside of them stays on it."""
    if isinstance(value, Mapping):
        nested = depth == 0 and any(isinstance(v, Mapping) for v in value.values())
        parts = [
            f"{printable(str(k))}{':' if nested else ''} {_cell(v, depth + 1)}" for k, v in value.items()
        ]
        return ("\n" if nested else ", ").join(parts) or "none"
    if isinstance(value, list | tuple):
        nested = depth == 0 and any(isinstance(v, Mapping) for v in value)
        joined = ("\n" if nested else ", ").join(_cell(v, depth + 1) for v in value)
        return (f"[{joined}]" if depth else joined) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return significant(value)
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Records of equal fields as a table, a row each."""
    made = table("", *(key.replace("_", " ") for key in (rows[0] if rows else ())))
    for row in rows:
        made.add_row(*(_cell(value) for value in row.values()))
    return made


def decoded(record: Mapping[str, Any]) -> Table:
    """Figures of a decoding on the host: rates, and measured beside predicted time."""
    made = table("", "figure", "value", "predicted")
    end = {"stop": ", the text ended", "interrupted": ", interrupted"}.get(record["finish"], "")
    made.add_row("tokens", f"{record['tokens']}{end}", "")
    made.add_row("weights", f"{record['weights']}, {count(record['weight_bytes'])}B a step", "")
    made.add_row("loading", seconds(record["load_s"]), "")
    if record["time_to_first_token_s"] is not None:
        made.add_row("time to first token", seconds(record["time_to_first_token_s"]), "")
    for phase in ("prefill", "decode"):
        p = record[phase]
        if p["measured_s"] is not None:
            band = f"{seconds(p['predicted_s'])} ({seconds(p['low_s'])} .. {seconds(p['high_s'])})"
            what = "prefill" if phase == "prefill" else "decode step, median"
            made.add_row(what, seconds(p["measured_s"]), f"{band} on machine {record['machine']}")
    if record["prefill_tokens_per_s"] is not None:
        made.add_row("prefill rate", f"{count(record['prefill_tokens_per_s'])} tokens/s", "")
    if record["tokens_per_s"] is not None:
        made.add_row("decode rate", f"{count(record['tokens_per_s'])} tokens/s", "")
        made.add_row("reads", f"{significant(record['gb_per_s'])} GB/s", "")
    if record["fraction_of_read_rate"] is not None:
        rate = f"{significant(record['read_rate'] / 1e9)} GB/s"
        made.add_row("of the read rate", share(record["fraction_of_read_rate"]), f"{rate} measured")
    return made
