"""What the commands of several files share: options, and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def print_json(record: Any) -> None:
    """A record as JSON on standard output."""
    print(json.dumps(record, indent=1, allow_nan=False))


def print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Records as a table, or as JSON."""
    if as_json:
        print_json(rows)
        return
    from mapper.report.terminal import console, rows_table

    console().print(rows_table(rows))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error while something long runs, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
