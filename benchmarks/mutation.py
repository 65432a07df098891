"""Kill rate of seeded mutants of a compiled schedule.

    python -m benchmarks.mutation examples/tiny-llama-op18.onnx --target lpu --count 220

Compiles the model, breaks the schedule in `count` seeded ways (the shared operators and the target's own),
and counts how many mutants a check rejects, the executor faults on, or the outputs betray. What survives is a
hole. All rows of the cache are decoded, unless --steps says otherwise: a table's row of a position that is
never reached may be anything.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mapper import driver
from mapper.backend import load
from mapper.runtime.mutation import MutationTest, decoder_case


class Phases(StrEnum):
    """Which programs are compiled."""

    decode = "decode"
    prefill = "prefill"
    both = "both"


def main(
    model: Annotated[Path, typer.Argument(help="an ONNX decoder")],
    target: Annotated[str, typer.Option(help="target")] = "lpu",
    count: Annotated[int, typer.Option(min=1, help="mutants")] = 220,
    seed: Annotated[int, typer.Option(help="seed of the mutants")] = 0,
    context: Annotated[int, typer.Option(min=2, help="rows of the cache")] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of prefill")] = 4,
    steps: Annotated[int, typer.Option(min=0, help="decode steps compared; 0: as many as fit")] = 0,
    chips: Annotated[int, typer.Option(min=1, help="chips that share the model")] = 1,
    parallel: Annotated[str, typer.Option(help="how they do, as tp=2,dp=2,ep=4")] = "",
    batch: Annotated[int, typer.Option(min=1, help="sequences")] = 1,
    phase: Annotated[Phases, typer.Option(help="programs to break")] = Phases.decode,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Mutation test of one schedule."""
    fit = context - (1 if phase == Phases.decode else prompt)
    if steps > fit or fit < 1:
        raise typer.BadParameter(f"{steps} steps behind the prompt need more than {context} rows of cache")
    backend = load(target)
    schedule = driver.compile(
        model, target, context=context, prompt=prompt, batch=batch, chips=chips, parallel=parallel,
        phase=phase.value,
    )  # fmt: skip
    test = MutationTest(
        schedule,
        decoder_case(backend.semantics(), steps or fit),
        backend.checks(),
        backend.mutations(),
        seed=seed,
    )
    report = test.run(count)
    if json_:
        kinds = {kind: report.kill_rate(kind) for kind in report.kinds()}
        print(
            json.dumps(
                {
                    "mutants": len(report.outcomes),
                    "kinds": kinds,
                    "kill_rate": report.kill_rate(),
                    "equivalent": report.equivalent_share,
                    "survivors": [f"{o.kind}: {o.description}" for o in report.survivors],
                }
            )
        )
        return
    print(report.table())
    for outcome in report.survivors:
        print(f"survived: {outcome.kind}: {outcome.description}")


if __name__ == "__main__":
    typer.run(main)
