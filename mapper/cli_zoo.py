"""The `zoo` commands: parsing and printing only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

zoo_app = typer.Typer(
    help="List public model configurations, and make their ONNX files. zoo:NAME is a model path everywhere."
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def _names(incomplete: str) -> list[str]:
    from mapper.zoo.config import names

    return [name for name in names() if name.startswith(incomplete)]


@zoo_app.command("list", epilog="Example: mapper zoo list --json")
def zoo_list(as_json: Json = False) -> None:
    """List the models. Parameters counted from their tensors beside the published number, and its source."""
    rows = [_row(name) for name in _names("")]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from mapper.report.terminal import console, rows_table

    hidden = ("params_source", "config_source", "note", "published")
    shown = [{k: _text(k, v) for k, v in row.items() if k not in hidden} for row in rows]
    console().print(rows_table(shown))
    for row in rows:
        if row["note"]:
            print(f"{row['model']}: {row['note']}")
    print("KV: bytes of key-value cache per token in bf16. Sources: --json.")


def _row(name: str) -> dict[str, Any]:
    from mapper.zoo.config import published, raw
    from mapper.zoo.families import config
    from mapper.zoo.files import params

    made, known = config(name), published(name)
    count = params(made)
    return {
        "model": name,
        "family": made.family,
        "params": count,
        "published": known.params,
        "off": round(count / known.params - 1, 6),
        "layers": len(made.layers),
        "hidden": made.hidden,
        "heads": made.heads,
        "kv_heads": made.kv_heads,
        "kv_bytes": made.cache_bytes(),
        "vocab": made.vocab,
        "context": made.context,
        "params_source": known.source,
        "config_source": raw(name)["source"],
        "note": "; ".join(n for n in (made.note, known.note) if n),
    }


def _text(key: str, value: Any) -> Any:
    if key == "off":
        return f"{100 * value:+.2f} %"
    return f"{value:,}" if isinstance(value, int) else value


@zoo_app.command(
    "make", epilog="Example: mapper zoo make qwen3-0.6b -o q.onnx --layers 2 --random-weights 1 --dtype f32"
)
def zoo_make(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of the zoo.", autocompletion=_names)],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of weights and activations: bf16, f16 or f32.")
    ] = "bf16",
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", help="The first N layers alone.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--random-weights", metavar="SEED", help="Write random weights, in FILE.onnx.data."),
    ] = None,
    toy: Annotated[
        bool, typer.Option("--tiny", help="The same structure at toy widths: runs anywhere.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Make a model's ONNX file. Opset 23, with a cache; a skeleton whose weights are absent, or random."""
    from mapper.zoo.families import config, shortened, tiny
    from mapper.zoo.files import write

    made = config(name)
    made = tiny(made) if toy else made
    made = made if layers is None else shortened(made, layers)
    with _bar(seed is not None) as advance:
        writer = write(made, out, dtype, seed, force, advance)
    record = {
        "model": name,
        "file": str(out),
        "layers": len(made.layers),
        "params": sum(w.elements for w in writer.weights.values()),
        "weights": str(out) + ".data" if seed is not None else None,
    }
    if as_json:
        print(json.dumps(record, indent=2))
        return
    there = f"random weights in {record['weights']}" if seed is not None else "weights absent"
    print(f"{out}: {name}, {record['layers']} layers, {record['params']:,} parameters, {dtype}, {there}")


class _bar:
    """A progress bar on standard error while weights are written."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None

    def __enter__(self) -> Any:
        if not self.shown:
            return None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task("writing weights", total=None)
        return lambda count: self.bar.advance(task, count)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
