"""Text that streams to the terminal, with a line of figures below it that keeps up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live as Region
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from mapper.report.numbers import share, significant


class Counts(Protocol):
    """What is shown of a decoding."""

    tokens: int
    made: int

    def rates(self, read_rate: float | None) -> Mapping[str, float | None]:
        """tokens_per_s, gb_per_s, fraction_of_read_rate so far."""


class Live:
    """A context in which `show` writes text to standard output.

    On one terminal with standard output (`mixed`) the line that is being written is part of the live region,
    and goes out for good once it ends; else text goes out at once, and the region has figures alone.
    """

    def __init__(self, decoding: Counts, read_rate: float | None, mixed: bool) -> None:
        self._decoding, self._rate, self._mixed = decoding, read_rate, mixed
        self._line = ""
        figures = TextColumn("{task.completed}/{task.total} tokens{task.fields[figures]}")
        self._progress = Progress(SpinnerColumn(), BarColumn(24), figures)
        self._task = self._progress.add_task("", total=decoding.tokens, figures="")
        console = Console(stderr=not mixed, highlight=False, markup=False, soft_wrap=True)
        self._region = Region(console=console, transient=True, refresh_per_second=8)

    def __enter__(self) -> Live:
        self._region.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._region.stop()
        if self._mixed:
            sys.stdout.write(self._line)
            sys.stdout.flush()

    def show(self, text: str) -> None:
        """Write some more."""
        if self._mixed:
            *whole, self._line = (self._line + text).split("\n")
            for line in whole:
                self._region.console.print(Text(line))
        else:
            sys.stdout.write(text)
            sys.stdout.flush()
        self._progress.update(self._task, completed=self._decoding.made, figures=self._figures())
        self._region.update(Group(Text(self._tail()), self._progress) if self._mixed else self._progress)

    def _figures(self) -> str:
        found = self._decoding.rates(self._rate)
        parts = []
        if found["tokens_per_s"] is not None:
            parts.append(f"{significant(found['tokens_per_s'])} tokens/s")
        if found["gb_per_s"] is not None:
            parts.append(f"{significant(found['gb_per_s'])} GB/s")
        if found["fraction_of_read_rate"] is not None:
            parts.append(f"{share(found['fraction_of_read_rate'])} of the read rate")
        return "".join(f", {part}" for part in parts)

    def _tail(self) -> str:
        """As much of the end of the line as the terminal has room for."""
        width, height = self._region.console.size
        return self._line[-width * max(height - 4, 1) :]
