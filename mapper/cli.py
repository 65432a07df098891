"""The command line: parsing and printing only. Everything heavy is imported inside the command that needs it.

Exit codes: 0 ok; 1 does not match, or a check fails; 2 bad input or usage; 70 a bug in mapper;
130 interrupted. An error is one line on standard error.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mapper import __version__
from mapper.cli_quantise import quantise
from mapper.cli_run import run
from mapper.cli_serving import add_commands
from mapper.cli_zoo import zoo_app
from mapper.errors import MapperError, MismatchError, UsageError
from mapper.exits import run_app
from mapper.report.spinner import working

if TYPE_CHECKING:
    from mapper.cost.estimate import Result

app = typer.Typer(
    name="mapper",
    rich_markup_mode=None,  # plain help: rich would double the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile a transformer from ONNX onto inference hardware, and run the schedule that comes out.",
    epilog="Example: mapper compile model.onnx --target lpu --out out/lpu && mapper verify out/lpu",
)
machines_app = typer.Typer(help="List, show and calibrate machine files.")
app.add_typer(machines_app, name="machines")
app.add_typer(zoo_app, name="zoo")
add_commands(app)
app.command(epilog="Example: mapper quantise examples/tiny-llama-op18.onnx --weights int4,int8")(quantise)


def _targets(incomplete: str) -> list[str]:
    from mapper.backend import discover

    return [name for name in discover() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file, or zoo:NAME.")]
Dir = Annotated[
    Path, typer.Argument(metavar="DIR", help="A schedule directory that `mapper compile --out` made.")
]
External = Annotated[
    Path | None,
    typer.Option(
        "--external-root",
        metavar="DIR",
        help="Also accept weight files in DIR, as behind the links of a model hub's cache.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mapper {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    "compile", epilog="Example: mapper compile examples/tiny-llama-op18.onnx --target lpu --out out/lpu"
)
def compile_(
    model: Model,
    target: Annotated[
        str, typer.Option(help="What to map onto; see `mapper targets`.", autocompletion=_targets)
    ],
    machine: Annotated[
        str | None, typer.Option(help="Machine name or TOML file; default: the target's own.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(help="Longest sequence, in tokens; the KV cache's length.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens that the prefill program takes.")] = 16,
    weights: Annotated[
        str | None, typer.Option(help="Weight format, as int4; default: the target's own.")
    ] = None,
    chips: Annotated[
        str, typer.Option(help="How many chips: a number, or auto. [default: 1, or what --parallel makes]")
    ] = "",
    parallel: Annotated[
        str,
        typer.Option(
            help="gpu: how chips share the model, as tp=4,pp=2 or tp=8,dp=2,ep=16; default: all by tensor."
        ),
    ] = "",
    phase: Annotated[
        Literal["decode", "prefill", "both"], typer.Option(help="Which programs to make.")
    ] = "both",
    out: Annotated[
        Path | None, typer.Option(help="Directory for the schedule; replaced where it holds one.")
    ] = None,
    external_root: External = None,
    as_json: Json = False,
) -> None:
    """Map a model onto a target. Prints times, bands, lower bounds and checks; --out saves the schedule."""
    from mapper.driver import build

    with working(f"compiling {model.name} for {target}"):
        done = build(
            model, target, machine=machine, batch=batch, context=context, prompt=prompt, weights=weights,
            chips=_chips(chips, parallel), parallel=parallel, phase=phase, out=out,
            external_root=external_root,
        )  # fmt: skip
    if as_json:
        _print_json(done.result.record())
    else:
        _print_results([done.result])
    done.report.raise_first()


@app.command(epilog="Example: mapper verify out/lpu --tokens 32")
def verify(
    schedule: Dir,
    model: Annotated[
        Path | None, typer.Option(help="The ONNX file, where it moved since the compilation.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="An .npz with the inputs, by their ONNX names.")] = None,
    tokens: Annotated[int, typer.Option(help="Greedy steps after the prompt.")] = 16,
    external_root: External = None,
    as_json: Json = False,
) -> None:
    """Execute a schedule against onnxruntime. Compares logits, cache and greedy tokens at each step."""
    from mapper import driver

    with working(f"executing {schedule}"):
        found = driver.verify(
            schedule, model=model, inputs=inputs, tokens=tokens, external_root=external_root
        )
    if as_json:
        _print_json(found.record())
    else:
        from mapper.report.terminal import console, fields

        console().print(fields(found.record(), f"{schedule} against {found.oracle}"))
    if not found.ok:
        raise MismatchError(found.reason)


@app.command(epilog="Example: mapper check out/lpu --json")
def check(schedule: Dir, as_json: Json = False) -> None:
    """Check that a schedule is legal. Runs the shared checks and the target's own on the files alone."""
    from mapper import driver

    with working(f"checking {schedule}"):
        report = driver.check(schedule)
    if as_json:
        found = [
            {
                "check": name,
                "message": v.message,
                "steps": list(v.steps),
                "unit": v.unit,
                "cycle": v.cycle,
                "limit": v.limit,
            }
            for name, violations in report.violations.items()
            for v in violations
        ]
        _print_json({"ok": report.ok, "checks": report.checks, "violations": found})
    else:
        from mapper.report.terminal import checks, console

        console().print(checks(report.checks))
        for name, violations in report.violations.items():
            for v in violations[:20]:
                print(f"  {name}: {v.message}")
    if not report.ok:
        report.raise_first()


@app.command(epilog="Example: mapper inspect examples/tiny-llama-op18.onnx")
def inspect(model: Model, external_root: External = None, as_json: Json = False) -> None:
    """Show what was recognised in a model. Layers, widths, heads, attention, masks, RoPE, norms, MLP, KV."""
    from mapper.driver import load
    from mapper.frontend.inspect import inspect as recognised

    with working(f"reading {model}"):
        record = recognised(load(model, external_root, identify=False))
    if as_json:
        _print_json(record)
    else:
        from mapper.report.terminal import console, fields, folded

        record |= {key: folded(record[key]) for key in ("inputs", "outputs")}
        short = ("layers", "masks", "kv_cache", "recognised_fraction")
        for name, phase in record.get("phases", {}).items():
            record["phases"][name] = {key: phase[key] for key in short}
        console().print(fields(record, str(model)))


app.command("run", epilog='Example: mapper run examples/tiny-llama-op18.onnx --prompt "It was" --tokens 48')(
    run
)


@app.command(epilog="Example: mapper opt examples/tiny-llama-op18.onnx -p 'serve{phase=decode}'")
def opt(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An ONNX file, or IR text (.mlir, or - for stdin).")
    ],
    passes: Annotated[str, typer.Option("-p", "--passes", help="Passes in order: a,b{option=1}.")] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the IR here instead of standard output.")
    ] = None,
    external_root: External = None,
) -> None:
    """Run passes over the IR and print it. The IR is verified after each pass."""
    from mapper.driver import optimise

    text = optimise(file, passes, external_root).print()
    if out is None:
        sys.stdout.write(text)
    else:
        from mapper.files import write_whole

        write_whole(out, text)


@app.command(epilog="Example: mapper explain out/lpu")
def explain(
    schedule: Dir, top: Annotated[int, typer.Option(help="Rows per table.")] = 10, as_json: Json = False
) -> None:
    """Explain a schedule's time. The bound, the busiest units, the constants that dominate the band."""
    from mapper.driver import describe

    with working(f"timing {schedule}"):
        result = describe(schedule).result
    if as_json:
        _print_json({phase: e.explanation(top) for phase, e in result.phases.items()})
        return
    from mapper.report.terminal import console, explanation

    for phase, e in result.phases.items():
        console().print(*explanation(phase, e, top), sep="\n")


@app.command(epilog="Example: mapper report out/lpu out/host --verify --out report.html")
def report(
    schedules: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Schedule directories.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    verified: Annotated[
        bool, typer.Option("--verify", help="Execute each schedule against onnxruntime too.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Greedy steps of --verify.")] = 16,
    external_root: External = None,
) -> None:
    """Write an HTML page on schedules. Times, bands, bounds, checks and verification, self-contained."""
    from mapper import driver
    from mapper.report.html import Entry, write

    entries = []
    for folder in schedules:
        with working(f"reading {folder}"):
            described = driver.describe(folder)
            found = (
                driver.verify(folder, tokens=tokens, external_root=external_root).record()
                if verified
                else None
            )
        entries.append(Entry(described, found))
    print(write(entries, out))


@app.command(epilog="Example: mapper targets --json")
def targets(as_json: Json = False) -> None:
    """List the installed targets."""
    from mapper import backend

    rows: list[dict[str, str | None]] = []
    for name in backend.discover():
        try:
            found = backend.load(name)
            rows.append({"target": name, "default_machine": found.default_machine, "summary": found.summary})
        except MapperError as error:
            rows.append({"target": name, "default_machine": None, "summary": f"broken: {error}"})
    _print_rows(rows, as_json)


@machines_app.command("list", epilog="Example: mapper machines list --target lpu")
def machines_list(
    target: Annotated[str | None, typer.Option(help="Only this target's.", autocompletion=_targets)] = None,
    as_json: Json = False,
) -> None:
    """List the machine files. Those that targets ship, and your own."""
    from mapper.catalog import machines

    _print_rows(
        [{"machine": m.name, "target": m.target, "summary": m.summary} for m in machines(target)], as_json
    )


@machines_app.command("show", epilog="Example: mapper machines show groq-lpu1")
def machines_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A machine's name, or a TOML file.")],
    as_json: Json = False,
) -> None:
    """Show a machine's constants. Each with its unit, kind, range and source."""
    from mapper.catalog import machine

    found = machine(name)
    if as_json:
        _print_json(found.model_dump(exclude={"text"}))
        return
    _print_rows(
        [{"constant": k, **c.model_dump(include={"value", "low", "high", "unit", "kind", "source"})}
         for k, c in found.constants.items()], False,
    )  # fmt: skip


@machines_app.command("calibrate", epilog="Example: mapper machines calibrate host")
def machines_calibrate(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The target to measure; only host can be.")],
    as_json: Json = False,
) -> None:
    """Measure this computer. Writes a machine file to your configuration folder."""
    from mapper.catalog import calibrate

    with working("measuring"):
        found, path = calibrate(target)
    if as_json:
        _print_json({"machine": found.name, "file": str(path), "constants": found.model_dump()["constants"]})
    else:
        print(f"machine {found.name} written to {path}")


def _chips(text: str, parallel: str) -> int | None:
    """The number of chips; None where the target says. Degrees of parallelism make a number themselves."""
    if text == "auto" or (parallel and not text):
        return None
    try:
        return int(text or 1)
    except ValueError:
        raise UsageError(f"--chips takes a number or auto, not {text!r}") from None


def _print_json(record: Any) -> None:
    print(json.dumps(record, indent=1, allow_nan=False))


def _print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    from mapper.report.terminal import console, rows_table

    console().print(rows_table(rows))


def _print_results(found: list[Result]) -> None:
    from mapper.report.terminal import console, results

    console().print(*results(found), sep="\n")


def main() -> None:
    """The command `mapper`. Exits with the codes that the module's text lists."""
    gc.set_threshold(200_000, 20, 50)  # a compiler allocates much and makes few cycles
    run_app(app)
