"""Decode speed of mapper on this computer, against the rate at which it reads memory; and beside peers.

    python -m benchmarks.decode --shape 125m|1.1b --weights f32|bf16|int8|int4 --context 128 [--json]
    python -m benchmarks.decode --shape 1.1b --weights int4 --context 2048 --peers [--quality] [--json]

A step takes a token and ends with the next one (greedy); tokens per second is the inverse of the median step.
What a step must read is counted: all weights of products in their stored format, and keys and values.
benchmarks/peers/README.md says how to make the environment of the peers, whose interpreter --peers-python
or MAPPER_PEERS_PYTHON names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from benchmarks.bandwidth import probe
from benchmarks.shapes import FORMATS, SHAPES


def alone(given: argparse.Namespace) -> dict[str, Any]:
    """mapper's decode in this process, the read rate from another one before and after."""
    from benchmarks import ours

    if given.quality:
        return {"peer": "mapper", **ours.quality(given.shape, given.weights, given.threads)}
    rate = 0.0 if given.no_probe else probe(given.threads)
    found = ours.timed(given.shape, given.weights, given.context, given.tokens, given.threads)
    bytes_per_s = found["tokens_per_s"] * found["bytes_per_token"]
    record = {"peer": "mapper", "gb_per_s": bytes_per_s / 1e9}
    if not given.no_probe:
        rate = max(rate, probe(given.threads))
        record |= {"fraction_of_read_rate": bytes_per_s / rate, "read_gb_per_s": rate / 1e9}
    asked = {name: getattr(given, name) for name in ("shape", "weights", "context", "tokens", "threads")}
    return {**found, **record, **asked}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--weights", choices=FORMATS, required=True)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="side by side with the peers, in turns")
    parser.add_argument("--only", nargs="*", metavar="PEER", help="with --peers: these peers alone")
    parser.add_argument("--peers-python", default=os.environ.get("MAPPER_PEERS_PYTHON") or sys.executable)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each that must count")
    parser.add_argument(
        "--quality", action="store_true", help="errors of logits (without --peers: only them)"
    )
    parser.add_argument("--no-probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if min(given.context, given.tokens, given.threads, given.rounds) < 1:
        parser.error("--context, --tokens, --threads and --rounds must be at least 1")
    if given.context + given.tokens + 8 > SHAPES[given.shape].context:
        parser.error(f"the models hold {SHAPES[given.shape].context} positions")
    if given.peers:
        from benchmarks.versus import show, versus

        found = versus(given)
        print(json.dumps(found)) if given.json else show(found)
        return
    record = alone(given)
    print(json.dumps(record) if given.json else "\n".join(f"{k}: {v}" for k, v in record.items()))


if __name__ == "__main__":
    main()
