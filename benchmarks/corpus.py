"""Every graph of a corpus: whether it loads, whether it runs, how far its outputs are from the stored ones.

    python -m benchmarks.corpus --folder ../shared/corpus [--only llama] [--json]

A corpus is a folder of ONNX files with a `manifest.json`, and beside each file that is to compile an `.npz`
of inputs and of onnxruntime's outputs for them. Every run that is stored is executed by `mapper.run` on the
host target. The error is the largest difference over all runs and outputs at the positions that are compared,
relative to max(1, largest magnitude of the reference). Exits with 1 where a graph fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mapper.driver import run
from mapper.errors import MapperError, ModelError
from mapper.frontend.inspect import ATTENTIONS, inspect
from mapper.frontend.load import load
from mapper.ir.graph import Graph
from tests.frontend.corpus import FOLDER, difference, entries, runs

TOLERANCE, TOLERANCE_INT4 = 1e-4, 1e-3
COLUMNS = (
    "model",
    "loads",
    "runs",
    "max error",
    "recognised",
    "layers",
    "grouped",
    "distinct",
    "primitives left",
)


@dataclass
class Row:
    """What came of one graph. `error` is relative; `grouped` counts layers inside repeats; `reason` says why
    it was refused or failed."""

    model: str
    expect: str
    loads: bool = False
    runs: int = 0
    stored: int = 0
    error: float | None = None
    recognised: float | None = None
    layers: int | None = None
    grouped: int | None = None
    distinct: int | None = None
    left: dict[str, int] | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the graph runs within tolerance, or is refused as the manifest expects."""
        if self.expect != "compile":
            return not self.loads and bool(self.reason)
        limit = TOLERANCE_INT4 if "int4" in self.model else TOLERANCE
        return 0 < self.runs == self.stored and self.error is not None and self.error <= limit


def measured(entry: dict[str, Any], folder: Path) -> Row:
    """The row of one entry of the manifest."""
    row = Row(entry["file"], entry["expect"])
    path = folder / row.model
    try:
        graph = load(path)
        row.loads = True
        found = inspect(graph)
        row.recognised, row.layers = found["recognised_fraction"], found["layers"]
        row.distinct, row.left = found["distinct_layers"], found["primitives_left"]
        row.grouped = grouped_layers(graph)
        if row.expect == "compile":
            execute(graph, path, row)
    except MapperError as error:
        row.reason = f"{type(error).__name__}: {error}"
    return row


def grouped_layers(graph: Graph) -> int:
    """How many attention layers are iterations of a repeat."""
    repeats = [s for s in graph.sections() if s.count > 1]
    return sum(s.count * sum(op.mnemonic in ATTENTIONS for op in s.ops) for s in repeats)


def execute(graph: Graph, path: Path, row: Row) -> None:
    """Runs every stored run of a graph, and notes the largest difference from the stored outputs."""
    stored = runs(path)
    row.stored = len(stored)
    worst = 0.0
    for name, given in stored.items():
        made = run(graph, {n: given["in"][n] for n, _ in graph.inputs})
        for output, expected in given["ort"].items():
            if made[output].shape != expected.shape:
                raise ModelError(f"run {name}: output {output} has shape {made[output].shape}")
            mask = given.get("compare_mask", {}).get("")
            worst = max(worst, difference(made[output], expected, mask))
        row.runs += 1
    row.error = worst


def shown(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for r in rows:
        if r.loads and not r.reason:
            left = " ".join(f"{k}:{v}" for k, v in (r.left or {}).items())
            figures = (f"{r.runs}/{r.stored}", f"{r.error:.1e}" if r.error is not None else "-")
            counts = (f"{r.recognised:.3f}", str(r.layers), str(r.grouped), str(r.distinct))
            table.add_row(r.model, "yes", *figures, *counts, left)
        else:
            table.add_row(r.model, "yes" if r.loads else "refused", *[""] * 6, r.reason)
    return table


def summary(rows: list[Row]) -> dict[str, Any]:
    """Totals over the rows."""
    compiled = [r for r in rows if r.expect == "compile"]
    refused = [r for r in rows if r.expect != "compile"]
    return {
        "run": sum(r.ok for r in compiled),
        "to_run": len(compiled),
        "refused": sum(r.ok for r in refused),
        "to_refuse": len(refused),
        "max_error": max((r.error for r in compiled if r.error is not None), default=None),
        "fully_recognised": sum(r.recognised == 1.0 for r in compiled),
        "layers": sum(r.layers or 0 for r in compiled),
        "layers_grouped": sum(r.grouped or 0 for r in compiled),
        "failing": [r.model for r in rows if not r.ok],
    }


def lines(total: dict[str, Any]) -> Iterator[str]:
    """The summary as text."""
    yield (
        f"{total['run']}/{total['to_run']} run, max error {total['max_error'] or 0.0:.1e}; "
        f"{total['fully_recognised']} recognised completely; "
        f"{total['layers_grouped']} of {total['layers']} layers grouped; "
        f"{total['refused']}/{total['to_refuse']} refused as they should"
    )
    if total["failing"]:
        yield "failing: " + ", ".join(total["failing"])


def main(
    folder: Annotated[Path, typer.Option(envvar="MAPPER_CORPUS", help="the corpus")] = FOLDER,
    only: Annotated[str, typer.Option(help="only files whose name holds this")] = "",
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Loads and runs a corpus of ONNX graphs, and compares with the stored outputs."""
    found = [e for e in entries("compile", "refuse", "reject", folder=folder) if only in e["file"]]
    if not found:
        what = f"no graph named like {only!r} in it" if only else "no manifest.json in it, or no graph"
        raise typer.BadParameter(f"corpus {folder}: {what}; give --folder or MAPPER_CORPUS")
    errors = Console(stderr=True)
    rows = [measured(e, folder) for e in track(found, "corpus", console=errors, transient=True)]
    total = summary(rows)
    if json_:
        print(json.dumps({"rows": [asdict(r) | {"ok": r.ok} for r in rows], "summary": total}))
    else:
        console = Console(width=200, markup=False, highlight=False)
        console.print(shown([r for r in rows if r.expect == "compile"]))
        console.print(shown([r for r in rows if r.expect != "compile"]))
        console.print(*lines(total), sep="\n")
    if total["failing"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
