"""The command line that all peers share: times decode steps, or writes logits and how far they are off."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.reference import cached_logits, relative_error
from benchmarks.shapes import FORMATS, SHAPES, Shape
from benchmarks.weights import Matrix, probe_tokens

WARM_UP = 3
"""Steps that are run before the timed ones."""
WINDOW = 8


@dataclass(frozen=True)
class Job:
    """What is asked of a peer. `room`: positions that its cache must hold."""

    shape: Shape
    weights: str
    context: int
    tokens: int
    threads: int
    variant: str = ""

    @property
    def room(self) -> int:
        """Positions that the cache must hold, a multiple of 32."""
        return -(-(self.context + self.tokens + WARM_UP + 1) // 32) * 32


class Decoder(Protocol):
    """A loaded peer; its cache is empty."""

    def fill(self, context: int) -> None:
        """Bring the cache to `context` positions, by a prefill or with random keys and values."""

    def step(self, token: int) -> Any:
        """Decode one token: its logits [vocab]."""


@dataclass(frozen=True)
class Peer:
    """`open` loads it; `stored` gives the weights that it computes with, dequantised, where it can."""

    name: str
    formats: tuple[str, ...]
    open: Callable[[Job], Decoder]
    describe: Callable[[Job], dict[str, Any]]
    stored: Callable[[Job], Matrix] | None = None
    variants: tuple[str, ...] = field(default=("",))
    advance: Callable[[Decoder, int], int] | None = None
    """The peer's own greedy step (token -> next token), where it has one; else argmax of `step`."""


def main(peer: Peer) -> None:
    """Command line of a peer."""
    parser = argparse.ArgumentParser(description=f"Decode with {peer.name}.")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--weights", choices=FORMATS, required=True)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", choices=peer.variants, default=peer.variants[0])
    parser.add_argument("--logits", type=Path, metavar="FILE.npz", help="write the probe's logits instead")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.weights not in peer.formats:
        parser.error(f"{peer.name} has no {given.weights} here; it has {', '.join(peer.formats)}")
    shape = SHAPES[given.shape]
    job = Job(shape, given.weights, given.context, given.tokens, given.threads, given.variant)
    found = quality(peer, job, given.logits) if given.logits else timed(peer, job)
    record = {"peer": peer.name, "shape": shape.name, "weights": job.weights, **found, **peer.describe(job)}
    if job.variant:
        record["variant"] = job.variant
    print(json.dumps(record) if given.json else "\n".join(f"{k}: {v}" for k, v in record.items()))


def timed(peer: Peer, job: Job) -> dict[str, Any]:
    """Tokens per second: the inverse of the median time of a greedy step at about the context."""
    decoder = peer.open(job)
    decoder.fill(job.context)
    advance = peer.advance or (lambda d, t: int(np.argmax(d.step(t))))
    token, times = 1, list[float]()
    for _ in range(WARM_UP + job.tokens):
        began = time.perf_counter()
        token = advance(decoder, token)
        times.append(time.perf_counter() - began)
    asked = {"context": job.context, "tokens": job.tokens, "threads": job.threads}
    return {**speeds(times[WARM_UP:]), **asked}


def speeds(times: list[float]) -> dict[str, float]:
    """Tokens per second by the median step, and by the fastest WINDOW steps in a row, the least disturbed."""
    window = min(WINDOW, len(times))
    fastest = min(sum(times[i : i + window]) for i in range(len(times) - window + 1))
    return {"tokens_per_s": 1 / statistics.median(times), "fastest_tokens_per_s": window / fastest}


def quality(peer: Peer, job: Job, file: Path) -> dict[str, Any]:
    """Logits [positions, vocab] of the probe sequence, step by step, and their relative L2 errors."""
    sequence = probe_tokens(job.shape)
    short = Job(job.shape, job.weights, 0, len(sequence), job.threads, job.variant)
    decoder = peer.open(short)
    logits = np.stack([np.array(decoder.step(token), np.float32) for token in sequence])
    np.savez(file, logits=logits)
    found: dict[str, Any] = {"error_original": relative_error(logits, cached_logits(job.shape, "original"))}
    if peer.stored is not None and job.weights not in ("f32",):
        name = f"{peer.name}-{job.weights}{job.variant and '-'}{job.variant}"
        expected = cached_logits(job.shape, name, peer.stored(short))
        found["error_dequantised"] = relative_error(logits, expected)
    return found
