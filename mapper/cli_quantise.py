"""`mapper quantise`: what weight formats cost, measured on a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mapper.perplexity import Cost


def quantise(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file with its weights.")],
    weights: Annotated[
        str, typer.Option("--weights", help="A weight format, several with commas between, or all.")
    ] = "all",
    text: Annotated[
        Path | None, typer.Option("--text", help="The text; default: heldout.txt beside the model.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Only so many tokens of the text, from its beginning.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens at a time; it moves by half.")] = 256,
    external_root: Annotated[
        Path | None,
        typer.Option("--external-root", metavar="DIR", help="Also accept weight files in DIR."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Measure what weight formats cost. Bytes, error of the weights, perplexity on a text, by running it."""
    from mapper import perplexity
    from mapper.errors import UsageError

    if tokens is not None and tokens < 1:
        raise UsageError(f"tokens must be at least 1, not {tokens}")
    chosen = perplexity.formats_of(weights)
    read = perplexity.text_of(model, text, tokens)
    with _bar(perplexity.steps(read, window, chosen) if window > 1 else 1) as advance:
        found = list(perplexity.costs(model, chosen, read, window, external_root, advance))
    if as_json:
        print(json.dumps(perplexity.record(model, read, window, found), indent=1, allow_nan=False))
        return
    from mapper.report.terminal import console, rows_table

    console().print(rows_table([_row(cost, found[0]) for cost in found]))
    print(f"{read.tokens:,} tokens of {read.name}, {window} at a time.")
    print("MB, bits and errors: of the weights of matrix products.")


def _row(cost: Cost, first: Cost) -> dict[str, Any]:
    return {
        "format": cost.format,
        "MB": f"{cost.bytes / 1e6:.3f}",
        "bits/weight": f"{cost.bits_per_weight:.3f}",
        "weight error": f"{100 * cost.weight_error:.3f} %",
        "worst": f"{100 * cost.worst_error:.3f} %",
        "of": cost.worst_weight,
        "perplexity": f"{cost.perplexity:.3f}",
        "change": f"{100 * (cost.perplexity / first.perplexity - 1):+.3f} %",
        "bits/char": f"{cost.bits_per_character:.4f}",
    }


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None] | None]:
    """A progress bar on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("running windows", total=total)
        yield lambda: progress.advance(task)
