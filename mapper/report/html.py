"""The HTML report: one self-contained page on some compiled schedules (Jinja2, inline SVG, no network)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapper.driver import Compiled
from mapper.files import write_whole
from mapper.report import numbers, plots


@dataclass(frozen=True)
class Entry:
    """A compiled schedule, and the record of its execution against the oracle where there was one."""

    compiled: Compiled
    verification: Mapping[str, Any] | None = None


def render(entries: Sequence[Entry], relative_to: Path = Path()) -> str:
    """The page as text. Links to traces are relative to folder `relative_to`. Same entries, same text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mapper.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"seconds": numbers.seconds, "count": numbers.count, "share": numbers.share}
    environment.filters["figure"] = _figure
    svg = {
        "times": lambda: Markup(plots.times([e.compiled.result for e in entries])),
        "influences": lambda found: Markup(plots.influences(found)),
        "loads": lambda found: Markup(plots.loads(found)),
    }
    template = environment.get_template("report.html.j2")
    return template.render(entries=entries, plot=svg, trace=lambda e: _trace(e, relative_to))


def write(entries: Sequence[Entry], path: Path) -> Path:
    """Write the page to `path`; returns it. Raises MapperError where it cannot be written."""
    write_whole(path, render(entries, path.parent))
    return path


def _trace(entry: Entry, folder: Path) -> str | None:
    directory = entry.compiled.result.schedule_dir
    if directory is None or not (Path(directory) / "trace.json").is_file():
        return None
    return Path(os.path.relpath(Path(directory) / "trace.json", folder)).as_posix()


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_figure(inner)}" for key, inner in value.items())
    return (
        f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
