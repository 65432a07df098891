"""Execute a schedule step by step beside the oracle: prefill, then greedy decoding, everything compared.

The tokens come from the oracle, so that one differing token does not make all later ones differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError, UsageError
from mapper.runtime.caches import Entry
from mapper.runtime.compare import Difference, compare, compare_tokens
from mapper.runtime.deviation import Deviation
from mapper.runtime.execute import Session
from mapper.runtime.inputs import Decoder
from mapper.schedule.tables import Schedule

Array = npt.NDArray[Any]
RELATIVE = 1e-3
"""Allowed error of float32 targets, over the largest magnitude of the compared array."""
SEED = 2024
Got = tuple[Array, Mapping[Entry, Array]]
"""What a step gave: the logits [B, S, V] and new cache entries."""


@dataclass(frozen=True)
class Wanted:
    """What a step should give, and the absolute error allowed: the logits [B, S, V] and new cache entries.

    `near_ties` counts the choices of experts that rounding decides, `other_choices` those of them that were
    taken to be the schedule's, and are not those of exact arithmetic."""

    logits: Array
    entries: Mapping[Entry, Array]
    logits_error: float
    entry_error: Mapping[Entry, float]
    near_ties: int = 0
    other_choices: int = 0


class Stepper(Protocol):
    """An oracle: runs the model step by step."""

    @property
    def name(self) -> str:
        """What it is."""

    @property
    def sha256(self) -> str:
        """The digest of the model file it runs, "" where it runs none."""

    def step(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> tuple[Array, dict[Entry, Array]]:
        """(logits [B, S, V], caches [B, Hkv, past + S, D]) of tokens `ids` [B, S] after `past` positions."""


class Judge(Protocol):
    """Decides what is right. Called once per step, in order; keeps its own caches."""

    @property
    def rule(self) -> str:
        """The rule in words, for the report."""

    def judge(
        self, ids: Array, past: int, logits: Array, entries: Mapping[Entry, Array], got: Got | None = None
    ) -> Wanted:
        """What tokens `ids` [B, S] after `past` positions should give, where the oracle gives `logits` and
        `entries`. `got` is looked at only where rounding decides which experts are taken."""


@dataclass(frozen=True)
class OracleJudge:
    """The oracle's own results, within RELATIVE of their largest magnitude: for float32 targets."""

    relative: float = RELATIVE

    @property
    def rule(self) -> str:
        """See Judge."""
        return f"within {self.relative:g} of the largest magnitude of onnxruntime's result"

    def judge(
        self, ids: Array, past: int, logits: Array, entries: Mapping[Entry, Array], got: Got | None = None
    ) -> Wanted:
        """See Judge."""
        allowed = {e: self.relative * _largest(a) for e, a in entries.items()}
        return Wanted(logits, entries, self.relative * _largest(logits), allowed)


def _largest(array: Array) -> float:
    return float(np.abs(array).max()) if array.size else 0.0


@dataclass(frozen=True)
class Verification:
    """The outcome. Errors are the logits' against the oracle; relative ones over its largest magnitude.

    `tokens` counts the tokens of the greedy steps (the one that the prompt gives is compared too, but
    not counted where steps follow), `tokens_differing` those that differ (`tokens_excused` of them
    by the rule for near ties), `steps_executed` steps of the schedule's tables. `against_original`: how far
    the results are from the model with its own weights, where the schedule has them in another format.
    `near_ties` counts the choices of experts that the schedule's formats cannot tell apart from others,
    `other_choices` those that it made otherwise than float64 does: what follows from them is compared with
    float64 on the same experts.
    """

    oracle: str
    rule: str
    max_abs_err: float
    max_rel_err: float
    max_cache_err: float
    tokens: int
    tokens_differing: int
    tokens_excused: int
    steps_executed: int
    cycles: int
    runs: int
    failures: tuple[str, ...] = field(default=())
    against_original: Deviation | None = None
    near_ties: int = 0
    other_choices: int = 0

    @property
    def tokens_equal(self) -> bool:
        """Whether all greedy tokens are the oracle's."""
        return self.tokens_differing == 0

    @property
    def ok(self) -> bool:
        """Whether everything agrees as the rule says."""
        return not self.failures

    @property
    def reason(self) -> str:
        """The first thing that does not agree; "" where all does."""
        return self.failures[0] if self.failures else ""

    def record(self) -> dict[str, Any]:
        """The stable JSON of `mapper verify --json`."""
        return {
            "ok": self.ok,
            "max_abs_err": self.max_abs_err,
            "max_rel_err": self.max_rel_err,
            "max_cache_err": self.max_cache_err,
            "tokens_equal": self.tokens_equal,
            "tokens": self.tokens,
            "tokens_differing": self.tokens_differing,
            "tokens_excused": self.tokens_excused,
            "steps_executed": self.steps_executed,
            "cycles": self.cycles,
            "oracle": self.oracle,
            "rule": self.rule,
            "first_difference": self.reason or None,
            **(
                {"expert_near_ties": n, "expert_choices_differing": self.other_choices}
                if (n := self.near_ties)
                else {}
            ),
            **({"against_original": d.record()} if (d := self.against_original) is not None else {}),
        }


def seeded_prompt(schedule: Schedule) -> Array:
    """The fixed prompt of a schedule: [B, S] token ids; one token where there is no prefill program."""
    logits = next((p for p in schedule.ports if p.kind == "output" and p.name == "logits"), None)
    if logits is None:
        raise UsageError("the schedule has no output 'logits'")
    program = schedule.programs.get("prefill")
    tokens = 1 if program is None else program.sequence
    return np.random.default_rng(SEED).integers(0, logits.shape[-1], (schedule.request.batch, tokens))


def verify(
    session: Session,
    oracle: Stepper,
    judge: Judge,
    tokens: int,
    prompt: Array | None = None,
    start: Mapping[Entry, Array] | None = None,
    original: Stepper | None = None,
) -> Verification:
    """Feed `prompt` (or the seeded one) to the caches `start` (or empty ones), then `tokens` greedy steps;
    compare each step. With `original`, the deviation from that model's logits on the same tokens is measured.

    A schedule without decode program is compared on the prompt alone. Raises UsageError if prompt and tokens
    do not fit the context, ModelError if the oracle runs another model, ExecutionFault.
    """
    schedule = session.schedule
    if schedule.model.sha256 and oracle.sha256 and schedule.model.sha256 != oracle.sha256:
        raise ModelError(f"{schedule.model.path}: not the model that the schedule was made from")
    ids = seeded_prompt(schedule) if prompt is None else prompt
    decoder = Decoder(session)
    steps = tokens if "decode" in schedule.programs else 0
    caches: Mapping[Entry, Array] = start or {}
    past = next((c.shape[2] for c in caches.values()), 0)
    decoder.fill(caches)
    total = past + ids.shape[1] + steps
    if total > decoder.context:
        raise UsageError(f"prompt and tokens take {total} positions; the context is {decoder.context}")
    tally = _Tally()
    deviation = None if original is None else Deviation(original, caches)
    for number in range(steps + 1):
        logits, caches = oracle.step(ids, past, caches)
        new = {e: a[:, :, past:] for e, a in caches.items()}
        got = decoder.feed(ids, past)
        tally.add(
            ids,
            past,
            got,
            decoder.entries(past, past + ids.shape[1]),
            logits,
            new,
            judge,
            number > 0 or not steps,
        )
        if deviation is not None:
            deviation.add(ids, past, got)
        past += ids.shape[1]
        ids = logits[:, -1].argmax(-1)[:, None]
    return replace(tally.outcome(oracle.name, judge.rule, session), against_original=deviation)


@dataclass
class _Tally:
    """Collects the comparisons of all steps."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    cache: float = 0.0
    tokens: int = 0
    differing: int = 0
    excused: int = 0
    near_ties: int = 0
    other_choices: int = 0
    failures: list[str] = field(default_factory=list)

    def add(
        self, ids: Array, past: int, got: Array, entries: Mapping[Entry, Array],
        logits: Array, new: Mapping[Entry, Array], judge: Judge, counts: bool,
    ) -> None:  # fmt: skip
        """Compare one step: `got` and `entries` with what the judge wants, errors with the oracle too."""
        wanted = judge.judge(ids, past, logits, new, (got, entries))
        self.near_ties += wanted.near_ties
        self.other_choices += wanted.other_choices
        place = (
            f"position {past}: " if ids.shape[1] == 1 else f"positions {past}..{past + ids.shape[1] - 1}: "
        )
        for found in self._differences(got, entries, wanted):
            if not found.ok:
                self.failures.append(place + str(found))
        beside = compare("logits", got, logits, np.inf)
        self.max_abs, self.max_rel = max(self.max_abs, beside.max_abs), max(self.max_rel, beside.max_rel)
        for entry, array in new.items():
            self.cache = max(self.cache, compare("cache", entries[entry], array, np.inf).max_abs)
        count = compare_tokens(got[:, -1], logits[:, -1], wanted.logits_error)
        if wanted.other_choices:
            right = compare_tokens(got[:, -1], wanted.logits[:, -1], wanted.logits_error)
            count = replace(count, excused=count.excused + count.wrong - right.wrong, wrong=right.wrong)
        self.tokens += (count.equal + count.excused + count.wrong) * counts
        self.differing += count.excused + count.wrong
        self.excused += count.excused
        if count.wrong:
            self.failures.append(f"{place}{count.wrong} greedy token(s) differ from the oracle's")

    def _differences(
        self, got: Array, entries: Mapping[Entry, Array], wanted: Wanted
    ) -> Iterator[Difference]:
        yield compare("logits", got, wanted.logits, wanted.logits_error)
        for entry, array in wanted.entries.items():
            name = f"cache.{entry[0]}.{entry[1]}"
            yield compare(name, entries[entry], array, wanted.entry_error[entry])

    def outcome(self, oracle: str, rule: str, session: Session) -> Verification:
        """The verification."""
        return Verification(
            oracle, rule, self.max_abs, self.max_rel, self.cache, self.tokens, self.differing, self.excused,
            session.steps, session.cycles, session.runs, tuple(self.failures), None, self.near_ties,
            self.other_choices,
        )  # fmt: skip
