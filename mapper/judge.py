"""What a target with narrow arithmetic should give: the model in float64, within four times the error that an
independent forward pass makes in the same storage formats.

The forward pass is NumPy's, on the recognised graph; it shares nothing with any target. In which formats a
target stores what is said by its schedule, in `plan["arithmetic"]`: `matmul` (operands of matrix products),
`accumulate` (everything else), `key_cache` and `value_cache` where the caches are narrower than `accumulate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.reference import bind_symbols, evaluate, evaluate_op
from mapper.ir.reference_transformer import position_mask
from mapper.ir.transformer import AttentionOp
from mapper.ir.types import Array
from mapper.passes.unroll import Unroll
from mapper.runtime.caches import Entry
from mapper.runtime.inputs import Interface
from mapper.runtime.verify import Wanted

SLACK = 4.0
"""A target may be this much less exact than NumPy in its formats: another order of sums, its own exp."""

_GELU = math.sqrt(2 / math.pi)
ACTIVATIONS: dict[str, Callable[[Array], Any]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(_GELU * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Formats:
    """NumPy names of the types that a target keeps things in."""

    matmul: str
    accumulate: str = "float32"
    key_cache: str | None = None
    value_cache: str | None = None

    def narrow(self, array: Array, kind: str | None) -> Array:
        """The array as it is after being stored as `kind`, back in the accumulation type."""
        return array.astype(kind or self.accumulate).astype(self.accumulate)


@dataclass
class FormatJudge:
    """See mapper.runtime.verify.Judge. Keeps caches of its own, in float64 and in the target's formats.

    `graph` is the recognised graph, `interface` names its inputs and outputs, `start` are its first caches,
    `caches` the shapes of the schedule's states.
    """

    graph: Graph
    interface: Interface
    formats: Formats
    start: Mapping[Entry, Array]
    caches: Mapping[Entry, Sequence[int]] = field(default_factory=dict)
    slack: float = SLACK

    def __post_init__(self) -> None:
        self._forwards: dict[Graph, StoredForward] = {}
        self._exact = dict(self.start)
        self._stored = {e: self._cached(e, a) for e, a in self.start.items()}

    @property
    def rule(self) -> str:
        """See Judge."""
        kind = self.formats.matmul
        return f"error against float64 at most {self.slack:g} x that of NumPy with {kind} products"

    def forward(self, inputs: Mapping[str, Array]) -> StoredForward:
        """The forward pass in the target's formats, of the graph that the inputs ask for."""
        chosen = self.graph.chosen(inputs)
        if chosen not in self._forwards:
            self._forwards[chosen] = StoredForward(Unroll().apply(chosen), self.formats)
        return self._forwards[chosen]

    def judge(self, ids: Array, past: int, logits: Array, entries: Mapping[Entry, Array]) -> Wanted:
        """See Judge. The error allowed is `slack` times the largest of the forward pass, per array."""
        names = list(dict.fromkeys([self.interface.logits, *self.interface.present.values()]))
        exact = evaluate(self.graph, self._inputs(ids, past, self._exact), names, "f64")
        inputs = self._inputs(ids, past, self._stored)
        stored = self.forward(inputs).run(inputs, names)
        self._exact = self._after(exact, ids, past)
        self._stored = {e: self._cached(e, a) for e, a in self._after(stored, ids, past).items()}
        wanted = {e: self._exact[e][:, :, past:] for e in entries}
        allowed = {e: self._allowed(self._stored[e][:, :, past:], wanted[e], self._kept(e)) for e in entries}
        name = self.interface.logits
        return Wanted(exact[name], wanted, self._allowed(stored[name], exact[name]), allowed)

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


@dataclass
class StoredForward:
    """NumPy forward pass of an unrolled recognised graph in given storage formats."""

    graph: Graph
    formats: Formats
    _weights: dict[str, Array] = field(default_factory=dict)

    def run(self, inputs: Mapping[str, Array], outputs: list[str]) -> dict[str, Array]:
        """The outputs named."""
        known: dict[SSAValue, Array] = {
            v: np.asarray(inputs[n]) for n, v in self.graph.input_values.items() if n in inputs
        }
        symbols = bind_symbols(self.graph.inputs, inputs)
        with np.errstate(over="ignore"):
            for op in self.graph.top():
                results = self._step(op, [known[v] for v in op.operands], symbols)
                known.update(zip(op.results, results, strict=True))
        return {n: known[self.graph.output_values[n]] for n in outputs}

    def _step(self, op: DataflowOp, args: list[Array], symbols: Mapping[str, int]) -> list[Array]:
        match op.mnemonic:
            case "linear" | "lm_head":
                return [self._product(op, args[0], "weight", "bias", "transposed")]
            case "packed_mlp":
                both = self._product(op, args[0], "gate_up", "gate_up_bias", "gate_up_transposed")
                half = both.shape[-1] // 2
                halves = op.attr("packing") == "halves"
                gate, up = (
                    (both[..., :half], both[..., half:]) if halves else (both[..., ::2], both[..., 1::2])
                )
                inner = np.asarray(ACTIVATIONS[op.attr("act")](gate) * up)
                return [self._product(op, inner, "down", "down_bias", "down_transposed")]
            case "gated_mlp":
                gate = self._product(op, args[0], "gate", "gate_bias", "gate_transposed")
                up = self._product(op, args[0], "up", "up_bias", "up_transposed")
                inner = np.asarray(ACTIVATIONS[op.attr("act")](gate) * up)
                return [self._product(op, inner, "down", "down_bias", "down_transposed")]
            case "mlp":
                up = self._product(op, args[0], "up", "up_bias", "up_transposed")
                inner = np.asarray(ACTIVATIONS[op.attr("act")](up))
                return [self._product(op, inner, "down", "down_bias", "down_transposed")]
            case "attention" if isinstance(op, AttentionOp) and _plain(op):
                return [self._attention(op, *args[:3])]
        return evaluate_op(op, args, self._weight, symbols)

    def _weight(self, symbol: str) -> Array:
        return self.graph.weights[symbol].load()

    def _product(self, op: DataflowOp, x: Array, name: str, bias: str, flag: str) -> Array:
        symbol = op.attr(name)
        if symbol not in self._weights:
            self._weights[symbol] = self.formats.narrow(self._weight(symbol), self.formats.matmul)
        weight = self._weights[symbol]
        y = self.formats.narrow(x, self.formats.matmul) @ (weight.T if op.attr(flag) else weight)
        return np.asarray(y if op.attr(bias) is None else y + self._weight(op.attr(bias)))

    def _attention(self, op: DataflowOp, q: Array, k: Array, v: Array) -> Array:
        group = q.shape[1] // k.shape[1]
        keys = self.formats.narrow(k, self.formats.key_cache).repeat(group, axis=1)
        values = self.formats.narrow(v, self.formats.value_cache).repeat(group, axis=1)
        asked = self.formats.narrow(q, self.formats.matmul if self.formats.key_cache else None)
        scores = asked @ keys.swapaxes(2, 3) * np.float32(op.attr("scale"))
        queries = np.arange(k.shape[2] - q.shape[2], k.shape[2])
        seen, _ = position_mask(queries, k.shape[2], op.attr("causal"), op.attr("window"), None)
        scores = np.where(seen, scores, np.float32(-np.inf))
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(shares / shares.sum(-1, keepdims=True) @ values)


def _plain(op: AttentionOp) -> bool:
    return op.attr("slopes") is None and not op.attr("softcap") and op.sinks is None
