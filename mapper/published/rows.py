"""Published results as a CSV file gives them, one frozen row each; nothing is judged here."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mapper.errors import UsageError

COLUMNS = (
    "system", "chips", "model", "weights_precision", "activation_precision", "batch", "context_in",
    "context_out", "tokens_per_s_per_user", "tokens_per_s_total", "ttft_ms", "power_w", "speculative",
    "source", "year",
)  # fmt: skip
Metric = Literal["tokens_per_s_per_user", "tokens_per_s_total"]


@dataclass(frozen=True)
class Row:
    """One published result. None where the file says nothing. `line` is its line in the file, from 1.

    `batch`: sequences at a time, or "max": as many as the server takes. Lengths in tokens, `ttft` in seconds,
    rates in tokens per second.
    """

    line: int
    system: str
    chips: int | None
    model: str
    weights: str
    activations: str
    batch: int | Literal["max"] | None
    prompt: int | None
    output: int | None
    per_user: float | None
    total: float | None
    ttft: float | None
    speculative: str
    source: str
    year: int | None

    @property
    def metric(self) -> Metric | None:
        """Which rate `published` is; None where the row has none."""
        if self.per_user is not None:
            return "tokens_per_s_per_user"
        return "tokens_per_s_total" if self.total is not None else None

    @property
    def published(self) -> float | None:
        """Tokens per second per user where given, else the total."""
        return self.per_user if self.per_user is not None else self.total


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises UsageError naming the file, the line and the column."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return list(_rows(path, csv.DictReader(stream, restkey="", restval="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read published results {path}: {error}") from error


def _rows(path: Path, reader: csv.DictReader[str]) -> Iterator[Row]:
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UsageError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    for fields in reader:
        try:
            yield _row(reader.line_num, fields)
        except ValueError as error:
            raise UsageError(f"{path}, line {reader.line_num}: {error}") from error


def _row(line: int, f: Mapping[str, str]) -> Row:
    ttft = _number(f, "ttft_ms")
    return Row(
        line=line,
        system=f["system"].strip(),
        chips=_whole(f, "chips"),
        model=f["model"].strip(),
        weights=f["weights_precision"].strip(),
        activations=f["activation_precision"].strip(),
        batch="max" if f["batch"].strip() == "max" else _whole(f, "batch"),
        prompt=_whole(f, "context_in"),
        output=_whole(f, "context_out"),
        per_user=_number(f, "tokens_per_s_per_user"),
        total=_number(f, "tokens_per_s_total"),
        ttft=None if ttft is None else ttft / 1e3,
        speculative=f["speculative"].strip(),
        source=f["source"].strip(),
        year=_whole(f, "year"),
    )


def _number(fields: Mapping[str, str], column: str) -> float | None:
    text = fields[column].strip()
    try:
        number = float(text) if text else None
    except ValueError:
        raise ValueError(f"{column} {text[:40]!r} is not a number") from None
    if number is not None and not 0 <= number < float("inf"):
        raise ValueError(f"{column} {text[:40]!r} is not a finite number >= 0")
    return number


def _whole(fields: Mapping[str, str], column: str) -> int | None:
    number = _number(fields, column)
    if number is not None and number != int(number):
        raise ValueError(f"{column} {fields[column][:40]!r} is not a whole number")
    return None if number is None else int(number)


def default_file() -> Path:
    """The file beside the checkout, or that of $MAPPER_PUBLISHED. Raises UsageError where there is none."""
    root = Path(__file__).resolve().parents[2]
    path = Path(
        os.environ.get("MAPPER_PUBLISHED", root.parent / "shared" / "facts" / "published_results.csv")
    )
    if not path.is_file():
        raise UsageError(f"no published results at {path}; give a file with --rows")
    return path
