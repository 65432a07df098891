"""One decode step of Llama-3.1-8B, bf16, context 2048: bound, ours, and what peer models say.

    python -m benchmarks.gpu_four_points [--json]

`bound` is bytes over bandwidth: weights but the embedding, and the cache, each read once. `compiled` is the
time of mapper's own schedule (`mapper_gpu.model.step_time`, constants of the machine file); `served` is the
same step under the calibrated constants of published serving software. The peers' figures are those that
the project was given (A100 and H100, batch 1 and 32), not run here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mapper.driver import load
from mapper.machine import read
from mapper.serving.phases import Deployment, Iteration
from mapper.zoo.families import config
from mapper.zoo.files import params
from mapper_gpu import serving
from mapper_gpu.model import step_time
from mapper_gpu.shape import Work, of_config

MODEL, CONTEXT = "llama-3.1-8b", 2048
POINTS = (("a100-80g-sxm", 1), ("a100-80g-sxm", 32), ("h100-sxm", 1), ("h100-sxm", 32))
PEERS = {
    "GenZ": (6.98, 10.81, 4.25, 6.58),
    "LLM-Viewer": (7.51, 11.97, 4.98, 7.95),
    "aiconfigurator": (11.55, 15.74, 6.62, 9.73),
}


def rows() -> list[dict[str, Any]]:
    """A row per point, times in milliseconds."""
    made, found = config(MODEL), []
    graph, shape = load(f"zoo:{MODEL}"), of_config(made)
    for i, (name, batch) in enumerate(POINTS):
        machine = read(Path(serving.__file__).parent / "machines" / f"{name}.toml")
        weights = 2 * (params(made) - made.vocab * made.hidden)
        moved = weights + batch * CONTEXT * made.cache_bytes()
        compiled = step_time(shape, machine, Work(batch, 1, CONTEXT - 1, CONTEXT)).seconds
        served = serving.phases(graph, machine, Deployment(stack="vllm")).seconds(
            Iteration(batch, CONTEXT - 1)
        )
        bound = moved / machine.value("memory.hbm.bandwidth")
        ours = {"bound": bound * 1e3, "compiled": compiled * 1e3, "served": served * 1e3}
        found.append({"machine": name, "batch": batch, **ours, **{p: v[i] for p, v in PEERS.items()}})
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    table = rows()
    if parser.parse_args().json:
        print(json.dumps(table, indent=2))
        return
    print("milliseconds per step; Llama-3.1-8B, bf16, context 2048")
    print(" ".join(f"{name:>14}" for name in table[0]))
    for row in table:
        print(" ".join(f"{v:14.2f}" if isinstance(v, float) else f"{v:>14}" for v in row.values()))


if __name__ == "__main__":
    main()
