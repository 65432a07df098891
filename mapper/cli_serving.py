"""The commands `serve` and `published`: parsing and printing only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Machine = Annotated[str | None, typer.Option(help="Machine name or TOML file; default: the target's own.")]


def add_commands(app: typer.Typer) -> None:
    """Add `serve` and `published` to the command line."""
    app.command(
        "serve",
        epilog="Example: mapper serve zoo:llama-3.1-8b --target gpu --machine h100-sxm --concurrency 64",
    )(serve)
    app.command("published", epilog="Example: mapper published --target gpu --json")(published)


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file, or zoo:NAME.")],
    target: Annotated[str, typer.Option(help="What to serve on; see `mapper targets`.")],
    machine: Machine = None,
    chips: Annotated[int, typer.Option(help="Chips that share each matrix.")] = 1,
    experts: Annotated[int, typer.Option(help="Of these, how many hold whole experts.")] = 1,
    replicas: Annotated[int, typer.Option(help="Copies of attention among the chips.")] = 1,
    weights: Annotated[str | None, typer.Option(help="Format of weights; default: the widest.")] = None,
    expert_weights: Annotated[
        str | None, typer.Option("--expert-weights", help="Format of routed experts; default: --weights.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Format of the KV cache; default: bf16.")] = None,
    stack: Annotated[
        str | None,
        typer.Option(
            help="Serving software whose kernels and host are meant; default: mapper's own kernels."
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight; the next arrives as one leaves.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Or: arrivals per second, as a Poisson process.")] = None,
    prompt: Annotated[int, typer.Option("--in", min=1, help="Prompt tokens of a request.")] = 1024,
    output: Annotated[int, typer.Option("--out", min=1, help="Output tokens of a request.")] = 256,
    spread: Annotated[
        float, typer.Option(help="Lengths are uniform in (1 - SPREAD) .. 1 times the given.")
    ] = 0.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many requests; default: 8 per place.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    draft: Annotated[int, typer.Option(min=0, help="Speculative tokens per step.")] = 0,
    acceptance: Annotated[float, typer.Option(help="Chance that a drafted token is accepted.")] = 0.0,
    draft_step: Annotated[
        float, typer.Option("--draft-step", help="Seconds to draft one token for the batch.")
    ] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens of one iteration; default: the stack's.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option("--max-sequences", min=1, help="Sequences at a time; default: the stack's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve requests with in-flight batching. Modelled TTFT, time per output token, throughput."""
    from mapper.service import Service, run
    from mapper.serving.phases import Deployment
    from mapper.serving.speculative import Speculation
    from mapper.serving.workload import Workload

    if concurrency is None and rate is None:
        concurrency = 1
    count = requests or 8 * (concurrency or 32)
    done = run(
        Service(
            model, target, machine,
            Deployment(chips, weights, cache, experts, replicas, stack, expert_weights),
            Workload(count, prompt, output, concurrency, rate, spread, seed),
            Speculation(draft, acceptance, draft_step), max_tokens, max_sequences,
        )
    )  # fmt: skip
    if as_json:
        print(json.dumps(done, indent=2))
        return
    from mapper.report.serving import served

    served(done)


def published(
    target: Annotated[
        str | None, typer.Option(help="Only this target; default: whichever has the row's system.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE.csv", help="Published results; default: the shared file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare predictions with published results. Errors per framework and source, exclusions with
    reasons."""
    from mapper.published.evaluate import evaluate
    from mapper.published.rows import default_file, read
    from mapper.published.score import record, summary

    outcomes = list(evaluate(read(rows if rows is not None else default_file()), target))
    found: dict[str, Any] = summary(outcomes)
    if as_json:
        print(json.dumps({"rows": [record(o) for o in outcomes], "summary": found}, indent=2))
        return
    from mapper.report.serving import compared

    compared(outcomes, found)
