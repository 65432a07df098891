"""What a target with narrow arithmetic should give: the model in float64, within four times the error that an
independent forward pass makes in the same storage formats.

The forward passes are NumPy's, on the recognised graph (mapper.forward). In which formats a
target stores what is said by its schedule, in `plan["arithmetic"]`: `matmul` (operands of matrix products),
`accumulate` (everything else), `key_cache` and `value_cache` where the caches are narrower than `accumulate`.

Rounding also decides which experts a router takes where their scores nearly tie. Both passes take the same
ones, so that the error allowed is that of the formats alone; results that are off are compared with what
follows from the other choices that rounding can make (mapper.near_ties), and the choices are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mapper.forward import Choices, Formats, Forward, StoredForward
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate
from mapper.ir.types import Array
from mapper.near_ties import NearTie, choices, near_ties
from mapper.passes.unroll import Unroll
from mapper.runtime.caches import Entry
from mapper.runtime.inputs import Interface
from mapper.runtime.verify import Got, Wanted

SLACK = 4.0
"""A target may be this much less exact than NumPy in its formats: another order of sums, its own exp."""


MOST_CHOICES = 16
"""Choices of experts per step that a target may make otherwise than float64 does."""


@dataclass
class FormatJudge:
    """See mapper.runtime.verify.Judge. Keeps caches of its own, in float64 and in the target's formats.

    `graph` is the recognised graph, `interface` names its inputs and outputs, `start` are its first caches,
    `caches` the shapes of the schedule's states; `last` is what the last step was judged by.
    """

    graph: Graph
    interface: Interface
    formats: Formats
    start: Mapping[Entry, Array]
    caches: Mapping[Entry, Sequence[int]] = field(default_factory=dict)
    slack: float = SLACK
    last: Pass | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._forwards: dict[Graph, tuple[Forward, StoredForward]] = {}
        self._exact = dict(self.start)
        self._stored = {e: self._cached(e, a) for e, a in self.start.items()}

    @property
    def rule(self) -> str:
        """See Judge."""
        kind = self.formats.matmul
        return f"error against float64 at most {self.slack:g} x that of NumPy with {kind} products"

    def judge(
        self, ids: Array, past: int, logits: Array, entries: Mapping[Entry, Array], got: Got | None = None
    ) -> Wanted:
        """See Judge. The error allowed is `slack` times the largest of the forward pass, per array."""
        best = self._pass(ids, past, entries, {})
        while got is not None and len(best.dictated) < MOST_CHOICES:
            missed = _misses(got, best.wanted)
            nearer = None
            for ties in _candidates(best.ties, got, best.wanted):
                made = [
                    self._pass(ids, past, entries, {**best.dictated, (t.router, t.token): t.experts})
                    for t in ties
                ]
                nearer = min(made, key=lambda p: _misses(got, p.wanted), default=None)
                if nearer is not None and _misses(got, nearer.wanted) < missed:
                    break
                nearer = None
            if nearer is None:
                break
            best = nearer
        self.last, self._exact, self._stored = best, best.exact, best.stored
        places = {(t.router, t.token) for t in best.ties} | set(best.dictated)
        return replace(best.wanted, near_ties=len(places), other_choices=len(best.dictated))

    def _pass(self, ids: Array, past: int, entries: Mapping[Entry, Array], dictated: Choices) -> Pass:
        """Both forward passes with some choices of experts dictated to both, and all others those of the
        exact one."""
        names = list(dict.fromkeys([self.interface.logits, *self.interface.present.values()]))
        inputs = self._inputs(ids, past, self._exact)
        chosen = self.graph.chosen(inputs)
        if chosen not in self._forwards:
            graph = Unroll().apply(chosen)
            self._forwards[chosen] = Forward(graph), StoredForward(graph, formats=self.formats)
        exact, stored = self._forwards[chosen]
        made = exact.run(inputs, names, dictated)
        taken = choices(exact.routed)
        near = stored.run(self._inputs(ids, past, self._stored), names, taken)
        after = self._after(made, ids, past)
        kept = {e: self._cached(e, a) for e, a in self._after(near, ids, past).items()}
        wanted = {e: after[e][:, :, past:] for e in entries}
        allowed = {e: self._allowed(kept[e][:, :, past:], wanted[e], self._kept(e)) for e in entries}
        name = self.interface.logits
        result = Wanted(made[name], wanted, self._allowed(near[name], made[name]), allowed)
        return Pass(result, after, kept, taken, dictated, near_ties(exact.routed, stored.routed, self.slack))

    def _after(self, made: Mapping[str, Array], ids: Array, past: int) -> dict[Entry, Array]:
        found = self.interface.states(made, ids.shape[0], given=False)
        return {e: a[:, :, : past + ids.shape[1]] for e, a in found.items()}

    def _kept(self, entry: Entry) -> str | None:
        return self.formats.key_cache if entry[0] == "key" else self.formats.value_cache

    def _cached(self, entry: Entry, array: Array) -> Array:
        return self.formats.narrow(array, self._kept(entry))

    def _allowed(self, stored: Array, exact: Array, kept: str | None = None) -> float:
        """At least half a unit in the last place of the largest value counts as the error of storing it as
        `kept`: that the forward pass came upon values which that holds well must not narrow the bound."""
        error = float(np.abs(stored - exact).max(initial=0.0))
        if kept is not None:
            one = np.ones((), kept)
            unit = float(np.nextafter(one, one + one)) - 1
            error = max(error, float(np.abs(exact).max(initial=0.0)) * unit / 2)
        return self.slack * error

    def _inputs(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> dict[str, Array]:
        return self.interface.inputs(_declared(self.graph), self.caches, ids, past, caches)


@dataclass(frozen=True)
class Pass:
    """A step in float64: what it wants, the caches after it, in float64 and as stored; the choices of
    experts, those of them that were dictated, and others that rounding could make."""

    wanted: Wanted
    exact: dict[Entry, Array]
    stored: dict[Entry, Array]
    chosen: Choices
    dictated: Choices
    ties: list[NearTie]


def _excess(got: Got, wanted: Wanted, share: float) -> list[Array]:
    """By how much each row of logits [B, S], and of cached heads [B, H, S], is off by more than a share of
    what is allowed."""
    logits, entries = got
    pairs = [(logits, wanted.logits, wanted.logits_error)]
    pairs += [(entries[e], a, wanted.entry_error[e]) for e, a in wanted.entries.items()]
    return [
        (np.nan_to_num(np.abs(mine - right).max(-1), nan=np.inf) - share * allowed).clip(min=0)
        for mine, right, allowed in pairs
    ]


def _misses(got: Got, wanted: Wanted) -> tuple[int, float]:
    """(rows that are off by more than half of what is allowed, by how much in all): what other choices may
    explain."""
    found = _excess(got, wanted, 0.5)
    return sum(int((e > 0).sum()) for e in found), float(sum(e.sum() for e in found))


def _candidates(ties: Sequence[NearTie], got: Got, wanted: Wanted) -> Iterator[list[NearTie]]:
    """Near ties that may explain the first token of each sequence that is off by more than half of what is
    allowed: its own, as a choice shows in the token's own row; then, where it is off by more than is
    allowed, those of tokens before it."""
    for share, own in ((0.5, True), (1.0, False)):
        off = np.any([e.any(1) if e.ndim > 2 else e > 0 for e in _excess(got, wanted, share)], axis=0)
        tokens = off.shape[1]
        first = {b: int(np.argmax(row)) for b, row in enumerate(off) if row.any()}
        places = {b * tokens + s for b, at in first.items() for s in ([at] if own else range(at))}
        yield [t for t in ties if t.token in places]


@dataclass(frozen=True)
class GraphOracle:
    """See mapper.runtime.verify.Stepper: the graph's reference semantics in float64, where onnxruntime cannot
    run with the weights of a schedule for the reason `why`."""

    graph: Graph
    interface: Interface
    caches: Mapping[Entry, Sequence[int]]
    why: str
    sha256: str = ""

    @property
    def name(self) -> str:
        """What the oracle is, and why it is not onnxruntime."""
        return f"the graph's reference semantics in float64 ({self.why})"

    def step(self, ids: Array, past: int, caches: Mapping[Entry, Array]) -> tuple[Array, dict[Entry, Array]]:
        """(logits [B, S, V], caches after the step [B, Hkv, past + S, D])."""
        names = list(dict.fromkeys([self.interface.logits, *self.interface.present.values()]))
        inputs = self.interface.inputs(_declared(self.graph), self.caches, ids, past, caches)
        made = evaluate(self.graph, inputs, names, "f64")
        found = self.interface.states(made, ids.shape[0], given=False)
        return made[self.interface.logits], {e: a[:, :, : past + ids.shape[1]] for e, a in found.items()}


def _declared(graph: Graph) -> dict[str, tuple[Any, list[int | str]]]:
    return {n: (t.numpy, [d.value if d.is_const else str(d) for d in t.shape]) for n, t in graph.inputs}
