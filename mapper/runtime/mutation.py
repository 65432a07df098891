"""The mutation test: break a schedule in many small ways, and see that a check or the output notices.

A mutant is killed by a check, by a fault of the executor, or by another output on one of several weight and
input sets. A survivor is a hole in the checks, or equivalent: then code apart from the executor says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mapper.errors import MapperError
from mapper.runtime.execute import Session
from mapper.runtime.inputs import Decoder
from mapper.runtime.interface import Semantics
from mapper.schedule import equivalence, mutate
from mapper.schedule.checks import Check, each_check, run_checks
from mapper.schedule.dtypes import dtype
from mapper.schedule.mutate import Flip, Mutation
from mapper.schedule.tables import Schedule
from mapper.schedule.values import evaluate, leaves

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Weights = Mapping[str, Array]
Execute = Callable[[Schedule, Weights, int], Outputs]
"""(schedule, weights by name, number of the set) -> everything that is compared: outputs and states by name.
It must depend on nothing else; any exception counts as a fault."""
Classify = Callable[[Schedule, Schedule, str], str | None]
"""(original, mutant, kind) -> class of an equivalent mutant, or None."""
Verdict = Literal["check", "fault", "output", "equivalent", "survived"]


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant. `why` names the check, fault or output, or an equivalent's class."""

    kind: str
    description: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class MutationReport:
    """Outcomes of all mutants. Rates are over the mutants that are not equivalent."""

    outcomes: tuple[Outcome, ...]

    def count(self, *verdicts: Verdict, kind: str | None = None) -> int:
        """Mutants with one of these verdicts (all without), of one kind or of all."""
        mine = [o for o in self.outcomes if kind in (None, o.kind)]
        return sum(not verdicts or o.verdict in verdicts for o in mine)

    def kill_rate(self, kind: str | None = None) -> float:
        """Killed mutants over those that are not equivalent; 1 where there are none."""
        killed = self.count("check", "fault", "output", kind=kind)
        alive = self.count("survived", kind=kind)
        return killed / (killed + alive) if killed + alive else 1.0

    @property
    def equivalent_share(self) -> float:
        """Equivalent mutants over all."""
        return self.count("equivalent") / max(1, len(self.outcomes))

    @property
    def survivors(self) -> list[Outcome]:
        """The holes."""
        return [o for o in self.outcomes if o.verdict == "survived"]

    def kinds(self) -> list[str]:
        """Kinds of mutants that there were."""
        return sorted({o.kind for o in self.outcomes})

    def table(self) -> str:
        """One line per kind: mutants, killed by check, fault and output, equivalent, survived, kill rate."""
        verdicts: tuple[Verdict, ...] = ("check", "fault", "output", "equivalent", "survived")
        lines = [f"{'kind':<18}{'mutants':>9}" + "".join(f"{v:>11}" for v in verdicts) + f"{'rate':>8}"]
        for kind in [*self.kinds(), None]:
            numbers = "".join(f"{self.count(v, kind=kind):>11}" for v in verdicts)
            name = kind or "all"
            lines.append(f"{name:<18}{self.count(kind=kind):>9}{numbers}{self.kill_rate(kind):>8.3f}")
        why = Counter(f"{o.verdict}: {o.why.split(':')[0]}" for o in self.outcomes if o.verdict != "output")
        lines += [f"  {n:>5} {name}" for name, n in why.most_common(16)]
        return "\n".join(lines)


@dataclass(frozen=True)
class MutationTest:
    """What a mutation test needs. `sets` weight and input sets (at least 3) are drawn from `seed`."""

    schedule: Schedule
    execute: Execute
    checks: Sequence[Check] = ()
    mutations: Sequence[Mutation] = ()
    classify: Classify = equivalence.classify
    sets: int = 3
    seed: int = 0
    weights: Callable[[Schedule, np.random.Generator], dict[str, Array]] | None = None
    _baseline: list[tuple[dict[str, Array], Outputs]] = field(default_factory=list, repr=False)

    def run(self, count: int) -> MutationReport:
        """Make and judge `count` mutants, the operators in turn. Operators that do not apply are left out.

        Raises ValueError where the unbroken schedule fails a check.
        """
        failing = {k: v[0].message for k, v in run_checks(self.schedule, self.checks).items() if v}
        if failing:
            raise ValueError(f"the schedule itself is illegal: {failing}")
        rng = np.random.default_rng(self.seed)
        operators: list[Mutation] = [*mutate.SHARED, *self.mutations, _FlipWeight()]
        outcomes: list[Outcome] = []
        while operators and len(outcomes) < count:
            for operator in list(operators):
                outcome = self._one(operator, rng)
                if outcome is None:
                    operators.remove(operator)
                elif len(outcomes) < count:
                    outcomes.append(outcome)
        return MutationReport(tuple(outcomes))

    def _one(self, operator: Mutation, rng: np.random.Generator) -> Outcome | None:
        if isinstance(operator, _FlipWeight):
            flip = mutate.flip_weight(self.schedule, rng)
            return None if flip is None else self._judge_flip(flip)
        made = operator.apply(self.schedule, rng)
        return None if made is None else self._judge(operator.name, *made)

    def _sets(self) -> list[tuple[dict[str, Array], Outputs]]:
        """Weight sets, and the outputs of the unbroken schedule on each."""
        if not self._baseline:
            for number in range(self.sets):
                rng = np.random.default_rng([self.seed, number])
                weights = (self.weights or random_weights)(self.schedule, rng)
                self._baseline.append((weights, self.execute(self.schedule, weights, number)))
        return self._baseline

    def _judge(self, kind: str, mutant: Schedule, description: str) -> Outcome:
        try:
            for name, found in each_check(mutant, self.checks):
                if found:
                    return Outcome(kind, description, "check", f"{name}: {found[0].message}")
        except MapperError as error:
            return Outcome(kind, description, "check", f"{type(error).__name__}: {error}")
        found_difference = self._differs(mutant, None)
        if found_difference is not None:
            return Outcome(kind, description, *found_difference)
        why = self.classify(self.schedule, mutant, kind)
        if why is None and kind == "flip_constant" and _same_ports(self.schedule, mutant, self._sets()[0][0]):
            why = "dead value"
        return Outcome(kind, description, "equivalent" if why else "survived", why or "")

    def _judge_flip(self, flip: Flip) -> Outcome:
        found = self._differs(self.schedule, flip)
        if found is not None:
            return Outcome("flip_weight", str(flip), *found)
        dead = all(_flip_is_dead(self.schedule, weights, flip) for weights, _ in self._sets())
        return Outcome(
            "flip_weight", str(flip), "equivalent" if dead else "survived", "dead value" if dead else ""
        )

    def _differs(self, mutant: Schedule, flip: Flip | None) -> tuple[Verdict, str] | None:
        for number, (weights, wanted) in enumerate(self._sets()):
            given = weights if flip is None else {**weights, flip.name: flip.apply(weights[flip.name])}
            try:
                got = self.execute(mutant, given, number)
            except Exception as error:
                # a mutant may break an executor in any way; what counts is that it does not pass unnoticed
                return "fault", f"{type(error).__name__}: {error}"
            for name, array in wanted.items():
                if (
                    name not in got
                    or array.shape != got[name].shape
                    or array.tobytes() != got[name].tobytes()
                ):
                    return "output", f"{name} on set {number}"
        return None


@dataclass(frozen=True)
class _FlipWeight:
    """Stands for mutate.flip_weight, which changes no schedule but a weight at load."""

    name: str = "flip_weight"

    def apply(self, schedule: Schedule, rng: np.random.Generator) -> None:
        return None


def decoder_case(semantics: Semantics, steps: int = 2) -> Execute:
    """An Execute for decoder schedules: random tokens through prefill (where there is one) and `steps` decode
    steps. Compares all logits and caches."""

    def execute(schedule: Schedule, weights: Weights, number: int) -> Outputs:
        session = Session(schedule, semantics, weights=weights.__getitem__)
        decoder = Decoder(session)
        vocabulary = next(p.shape[-1] for p in schedule.ports if p.name == "logits")
        rng = np.random.default_rng([7, number])
        batch, prompt = schedule.request.batch, decoder.prompt or 1
        more = steps if "decode" in schedule.programs else 0
        ids = rng.integers(0, vocabulary, (batch, prompt + more))
        out: dict[str, Array] = {"prompt": decoder.feed(ids[:, :prompt], 0)}
        for past in range(prompt, prompt + more):
            out[f"step.{past}"] = decoder.feed(ids[:, past : past + 1], past)
        return out | {
            f"{kind}.{layer}": a for (kind, layer), a in decoder.entries(0, decoder.context).items()
        }

    return execute


def random_weights(schedule: Schedule, rng: np.random.Generator) -> dict[str, Array]:
    """Random values for all weights: vectors near 1 (norms), matrices with columns of norm near 1."""
    out: dict[str, Array] = {}
    for name in sorted(schedule.weights):
        entry = schedule.weights[name]
        shape, kind = tuple(entry["shape"]), dtype(entry["dtype"])
        if kind.kind in "iu":
            out[name] = rng.integers(0, 100, shape).astype(kind)
        else:
            scale = 0.25 if len(shape) < 2 else max(shape[-2:]) ** -0.5
            out[name] = (rng.standard_normal(shape) * scale + (len(shape) < 2)).astype(kind)
    return out


def _flip_is_dead(schedule: Schedule, weights: Weights, flip: Flip) -> bool:
    """Whether no port's array changes when the bit is flipped (a bit lost in a cast, an element cut away)."""
    flipped = {**weights, flip.name: flip.apply(weights[flip.name])}
    for port in schedule.ports:
        if port.source is not None and ("weight", flip.name) in leaves(port.source):
            arrays = [
                evaluate(port.source, w.__getitem__, schedule.constants.__getitem__).astype(dtype(port.dtype))
                for w in (weights, flipped)
            ]
            if arrays[0].tobytes() != arrays[1].tobytes():
                return False
    return True


def _same_ports(original: Schedule, mutant: Schedule, weights: Weights) -> bool:
    """Whether changed constants change no port's array."""
    for port in original.ports:
        if port.source is not None and any(kind == "const" for kind, _ in leaves(port.source)):
            arrays = [
                evaluate(port.source, weights.__getitem__, s.constants.__getitem__).astype(dtype(port.dtype))
                for s in (original, mutant)
            ]
            if arrays[0].tobytes() != arrays[1].tobytes():
                return False
    return True
