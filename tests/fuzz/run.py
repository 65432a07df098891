"""Fuzzing of the frontend: `python -m tests.fuzz.run [--cases N] [--first N] [--workers N]`, or `--case N`.

Every case is a seeded mutant (see mutate.py), so that a finding is repeated by its number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.fuzz.case import Outcome, case_bytes, isolated, outcome
from tests.fuzz.seeds import corpus, small


@dataclass
class Summary:
    """What came of many cases."""

    kinds: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)
    wrong: list[tuple[int, Outcome]] = field(default_factory=list)
    cut: bool = False
    """Stopped before its last case."""

    def add(self, number: int, found: Outcome) -> None:
        """Counts a case."""
        self.kinds[found.kind] += 1
        self.slowest = max(self.slowest, (found.seconds, number))
        self.largest = max(self.largest, (found.memory, number))
        if found.wrong:
            self.wrong.append((number, found))

    def line(self) -> str:
        """All figures in a line."""
        bad = ("crash", "hang", "memory", "message", "traceback")
        fine = ", ".join(f"{k} {n}" for k, n in self.kinds.most_common() if k not in bad)
        odd = ", ".join(f"{k} {self.kinds[k]}" for k in bad)
        count = f"{self.kinds.total()} cases{' (interrupted)' if self.cut else ''}"
        return (
            f"{count}: {fine}; {odd}; slowest {self.slowest[0]:.2f} s (case "
            f"{self.slowest[1]}), most memory {self.largest[0] / 1e6:.0f} MB (case {self.largest[1]})"
        )


def batch(numbers: Sequence[int], seeds: Sequence[bytes]) -> list[tuple[int, Outcome]]:
    """Some cases, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        return [(n, isolated(seeds, n, Path(folder))) for n in numbers]


def fuzz(seeds: Sequence[bytes], numbers: Iterable[int], workers: int = 1) -> Summary:
    """Runs cases in `workers` processes."""
    summary = Summary()
    try:
        for number, found in _outcomes(seeds, list(numbers), workers):
            summary.add(number, found)
            if found.wrong:
                print(f"case {number}: {found.kind}\n{found.text}", file=sys.stderr, flush=True)
            if summary.kinds.total() % 1000 == 0:
                print(summary.line(), file=sys.stderr, flush=True)
    except KeyboardInterrupt:  # what was found until then is still worth knowing
        summary.cut = True
    return summary


def _outcomes(seeds: Sequence[bytes], numbers: list[int], workers: int) -> Iterator[tuple[int, Outcome]]:
    parts = [numbers[i : i + 100] for i in range(0, len(numbers), 100)]
    if workers == 1:
        for part in parts:
            yield from batch(part, seeds)
        return
    # An interrupt is the parent's: a worker's own would only add a traceback.
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("fork").Pool(workers, initializer=ignore) as pool:
        for found in pool.imap_unordered(partial(batch, seeds=seeds), parts):
            yield from found


def main() -> int:
    """The command line: 0 where nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="run one case in this process and show what comes of it")
    parser.add_argument("--keep", type=Path, help="with --case: write the file here")
    given = parser.parse_args()
    seeds = small() + corpus()
    if given.case is not None:
        data = case_bytes(seeds, given.case)
        if given.keep:
            given.keep.write_bytes(data)
        with tempfile.TemporaryDirectory() as folder:
            print(outcome(data, Path(folder) / "model.onnx"))
        return 0
    start = time.monotonic()
    summary = fuzz(seeds, range(given.first, given.first + given.cases), given.workers)
    print(f"{summary.line()}; {len(seeds)} seeds, {time.monotonic() - start:.0f} s")
    return 130 if summary.cut else int(bool(summary.wrong))


if __name__ == "__main__":
    sys.exit(main())
