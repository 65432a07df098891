"""The command `run`: parsing and printing only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mapper.errors import MapperError, UsageError
from mapper.report.spinner import working

if TYPE_CHECKING:
    from mapper.decode import Decoding

INTERRUPTED = 130


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")],
    prompt: Annotated[str | None, typer.Option(help="Text; needs a tokenizer.json beside the model.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of text, separated by commas.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to decode.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most probable token; above: draw.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this probable beside the first.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed gives the same text.")] = 0,
    weights: Annotated[str | None, typer.Option(help="Weight format; default: the target's widest.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads; default: one per core that this process may use.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Decode on behind a token that ends the text.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure the read rate once more; the best since the last boot counts."),
    ] = False,
    external_root: Annotated[
        Path | None,
        typer.Option(
            "--external-root",
            metavar="DIR",
            help="Also accept weight files in DIR, as behind the links of a model hub's cache.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Decode on this computer. Uses the host target's kernels; text streams to standard output, figures go to
    standard error: tokens/s, GB/s, and the fraction of the read rate that is."""
    from mapper.decode import stream
    from mapper.sampling import Sampling
    from mapper.tokens import Reader, Tokens, end_tokens

    if (prompt is None) == (ids is None):
        raise UsageError("give one of --prompt and --ids")
    if tokens < 1:
        raise UsageError(f"tokens must be at least 1, not {tokens}")
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    words = Tokens.beside(model) if ids is None else Tokens()
    start = words.encode(prompt) if prompt is not None else _ids(ids or "")
    with working(f"compiling {model.name} for host"):
        rate = _read_rate(probe)  # before weights take the caches and the bandwidth
        ends = frozenset[int]() if ignore_eos else end_tokens(model, words)
        decoding = stream(model, start, tokens, external_root, weights, sampling, ends, threads)
    reader, interrupted = Reader(words, list(start)), False
    with _showing(decoding, rate, as_json) as show:
        show(words.text(start))
        try:
            for token in decoding:
                show(reader.add(token))
        except KeyboardInterrupt:
            interrupted = True
    record = decoding.record(rate) | {
        "prompt_ids": list(start),
        "ids": reader.ids[len(start) :],
        "text": words.text(reader.ids),
    }
    if as_json:
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        from mapper.report.terminal import console, decoded

        print()
        sys.stdout.flush()
        console(errors=True).print(decoded(record))
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _read_rate(fresh: bool) -> float | None:
    """The measured read rate; None where it cannot be measured and was not asked for."""
    from mapper.read_rate import read_rate

    try:
        return read_rate("host", fresh)
    except MapperError:
        if fresh:
            raise
        return None


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--ids takes whole numbers separated by commas, not {text!r}") from None


@contextmanager
def _showing(decoding: Decoding, rate: float | None, silent: bool) -> Iterator[Any]:
    """What shows text as it comes; where standard error is a terminal, with live figures below it."""
    if silent:
        yield lambda text: None
    elif not sys.stderr.isatty():
        yield _write
    else:
        from mapper.report.live import Live

        with Live(decoding, rate, sys.stdout.isatty()) as live:
            yield live.show


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
