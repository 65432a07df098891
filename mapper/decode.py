"""Decoding with the host target, timed step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mapper.errors import UsageError
from mapper.sampling import Sampling

if TYPE_CHECKING:
    from mapper.cost.estimate import Estimate
    from mapper.runtime.execute import Session
    from mapper.schedule.tables import Phase, Schedule
    from mapper.traffic import Traffic

_GREEDY = Sampling()


@dataclass
class Decoding:
    """An iterator over the decoded tokens; times each step as it goes. `ends` are tokens that end it and are
    not yielded. `finish` says why it ended: "length", "stop" at one of `ends`, or "interrupted"."""

    session: Session
    schedule: Schedule
    phases: Mapping[str, Estimate]
    traffic: Traffic
    ids: tuple[int, ...]
    tokens: int
    sampling: Sampling = _GREEDY
    ends: frozenset[int] = frozenset()
    load_s: float = 0.0
    prefill_s: float = 0.0
    first_s: float = 0.0
    made: int = 0
    steps_s: list[float] = field(default_factory=list)
    finish: str = "interrupted"

    def warm_up(self) -> None:
        """Run one decode step, so that kernels are compiled and weights in memory, and clear the cache; the
        prompt itself is run once."""
        self._run("decode", self.ids[:1], 0)
        self.session.reset()
        self.session.prepare("prefill", _inputs(self.ids, 0))

    def _run(self, phase: Phase, ids: Sequence[int], past: int) -> npt.NDArray[Any]:
        logits: npt.NDArray[Any] = self.session.run(phase, _inputs(ids, past))["logits"][0, -1]
        return logits

    def __iter__(self) -> Iterator[int]:
        choose = self.sampling.sampler()
        began = time.perf_counter()
        logits = self._run("prefill", self.ids, 0)
        self.prefill_s = time.perf_counter() - began
        for past in range(len(self.ids), len(self.ids) + self.tokens):
            token = choose(logits)
            self.first_s = self.first_s or time.perf_counter() - began
            if token in self.ends:
                self.finish = "stop"
                return
            self.made += 1
            self.finish = "length" if self.made == self.tokens else "interrupted"
            yield token
            if self.finish == "length":
                return
            step = time.perf_counter()
            logits = self._run("decode", [token], past)
            self.steps_s.append(time.perf_counter() - step)

    def rates(self, read_rate: float | None) -> dict[str, float | None]:
        """Of the decode steps so far: tokens/s, GB/s that they had to read, and that as a fraction of the
        read rate in bytes/s; None where there is nothing to divide. Choosing tokens is not counted."""
        spent, first = sum(self.steps_s), len(self.ids) + 1
        read = sum(self.traffic.bytes(first + i) for i in range(len(self.steps_s)))
        rate = read / spent if spent else None
        return {
            "tokens_per_s": len(self.steps_s) / spent if spent else None,
            "gb_per_s": rate / 1e9 if rate is not None else None,
            "fraction_of_read_rate": rate / read_rate if rate is not None and read_rate else None,
        }

    def record(self, read_rate: float | None = None) -> dict[str, Any]:
        """What was measured beside what was predicted, in seconds, bytes and bytes/s: median of the decode
        steps; prefill. `load_s` is from the model's file to ready, `time_to_first_token_s` from there.
        `weight_bytes` and `cache_bytes` are what the last step had to read."""
        measured = statistics.median(self.steps_s) if self.steps_s else None
        ran = self.prefill_s > 0
        return {
            "machine": self.schedule.machine,
            "weights": self.schedule.request.weights or "f32",
            "tokens": self.made,
            "finish": self.finish,
            **self.rates(read_rate),
            "read_rate": read_rate,
            "weight_bytes": self.traffic.weights,
            "cache_bytes": self.traffic.bytes(len(self.ids) + len(self.steps_s)) - self.traffic.weights,
            "prefill_tokens_per_s": len(self.ids) / self.prefill_s if ran else None,
            "time_to_first_token_s": self.first_s if self.first_s else None,
            "load_s": self.load_s,
            "sampling": asdict(self.sampling),
            "decode": {"measured_s": measured, **_predicted(self.phases["decode"])},
            "prefill": {"measured_s": self.prefill_s if ran else None, **_predicted(self.phases["prefill"])},
        }


def _inputs(ids: Sequence[int], past: int) -> dict[str, npt.NDArray[Any]]:
    return {"input_ids": np.array([ids]), "past_length": np.array(past)}


def _predicted(e: Estimate) -> dict[str, float]:
    return {"predicted_s": e.time_s, "low_s": e.low_s, "high_s": e.high_s}


def stream(
    model: Path,
    ids: Sequence[int],
    tokens: int,
    external_root: str | Path | None = None,
    weights: str | None = None,
    sampling: Sampling = _GREEDY,
    ends: frozenset[int] = frozenset(),
    threads: int | None = None,
) -> Decoding:
    """Compile `model` for the host, long enough for `ids` and `tokens` more, and get ready to decode.

    Raises MapperError like `mapper.compile`; UsageError for ids outside of the vocabulary.
    """
    from mapper import driver, execution, traffic

    began = time.perf_counter()
    graph = driver.load(model, external_root)
    done = driver.build(
        graph, execution.HOST, context=len(ids) + tokens, prompt=len(ids), weights=weights,
        external_root=external_root,
    )  # fmt: skip
    done.report.raise_first()
    vocabulary = next(p.shape[-1] for p in done.schedule.ports if p.name == "logits")
    if not all(0 <= i < vocabulary for i in ids):
        raise UsageError(f"token ids must be 0 to {vocabulary - 1}")
    session = execution.session(done.schedule, model, external_root, threads)
    moved = traffic.of(done.schedule, graph)
    decoding = Decoding(session, done.schedule, done.result.phases, moved, tuple(ids), tokens, sampling, ends)
    decoding.warm_up()
    decoding.load_s = time.perf_counter() - began
    return decoding
