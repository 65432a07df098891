"""NumPy forward passes of a recognised graph: in float64, and in the formats that a target stores things in.

They share nothing with any target. The choices of routers can be dictated, and are recorded with the scores
that they were made by: two passes are comparable only where they took the same experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from mapper.ir.graph import Graph
from mapper.ir.infer import operands_by_name
from mapper.ir.op import DataflowOp
from mapper.ir.reference import Step, bind_symbols, evaluate_op
from mapper.ir.reference_compute import round_blocks
from mapper.ir.reference_experts import best_of, choice_of, shares_of
from mapper.ir.reference_transformer import ACTIVATION_MEANINGS, position_mask
from mapper.ir.types import Array


@dataclass(frozen=True)
class Formats:
    """NumPy names of the types that a target keeps things in: operands of products with weights, everything
    else, keys, values, and tables that rows are looked up in (None: as everything else)."""

    matmul: str
    accumulate: str = "float32"
    key_cache: str | None = None
    value_cache: str | None = None
    table: str | None = None

    def narrow(self, array: Array, kind: str | None) -> Array:
        """The array as it is after being stored as `kind`, back in the accumulation type."""
        return array.astype(kind or self.accumulate).astype(self.accumulate)


@dataclass(frozen=True)
class Routed:
    """What a router did: the scores [tokens, experts] that it chose by, and its choice [tokens, chosen]."""

    op: DataflowOp
    scores: Array
    index: Array


Choices = Mapping[tuple[int, int], Sequence[int]]
"""(Router in the order of ops, token) -> the experts that it takes."""


@dataclass
class Forward:
    """The float64 pass over an unrolled graph; `routed` says afterwards what its routers did."""

    graph: Graph
    routed: list[Routed] = field(default_factory=list)
    precision: str | None = "f64"
    _dictated: Choices = field(default_factory=dict)

    def run(
        self, inputs: Mapping[str, Array], outputs: list[str], dictated: Choices | None = None
    ) -> dict[str, Array]:
        """The outputs named. Routers choose as they are told where `dictated` says so, else by their
        scores."""
        self.routed, self._dictated = [], dictated or {}
        known: dict[SSAValue, Array] = {}
        for name, value in self.graph.input_values.items():
            if name in inputs:
                array = np.asarray(inputs[name])
                wide = self.precision is not None and array.dtype.kind not in "iub"
                known[value] = array.astype(np.float64) if wide else array
        symbols = bind_symbols(self.graph.inputs, inputs)
        with np.errstate(over="ignore"):
            for op in self.graph.top():
                results = self._step(op, [known[v] for v in op.operands], symbols)
                known.update(zip(op.results, results, strict=True))
        return {n: known[self.graph.output_values[n]] for n in outputs}

    def _step(self, op: DataflowOp, args: list[Array], symbols: Mapping[str, int]) -> list[Array]:
        if op.mnemonic == "route":
            return self._route(op, args, symbols)
        return evaluate_op(op, args, self._weight, symbols, self.precision)

    def _weight(self, symbol: str) -> Array:
        return self.graph.weights[symbol].load()

    def _route(self, op: DataflowOp, args: list[Array], symbols: Mapping[str, int]) -> list[Array]:
        step = Step(op, _named(op, args), self._weight, symbols, self.precision)
        with np.errstate(all="ignore"):
            scores, choice = choice_of(step)
            index = best_of(op, choice)
            flat = index.reshape(-1, index.shape[-1])
            for (router, token), experts in self._dictated.items():
                if router == len(self.routed):
                    flat[token] = experts
            index = flat.reshape(index.shape)
            share = shares_of(step, scores, index)
        self.routed.append(Routed(op, choice.reshape(-1, choice.shape[-1]), flat))
        return [index, share]


@dataclass
class StoredForward(Forward):
    """The pass in given storage formats: operands of every product with a weight, and what is cached, are
    rounded; the rest is computed in the accumulation type."""

    formats: Formats = field(default_factory=lambda: Formats("float32"))
    precision: str | None = None
    _weights: dict[str, Array] = field(default_factory=dict)

    def _step(self, op: DataflowOp, args: list[Array], symbols: Mapping[str, int]) -> list[Array]:
        match op.mnemonic:
            case "linear" | "lm_head":
                return [self._product(op, args[0], "weight", "bias", "transposed")]
            case "packed_mlp":
                both = self._part(op, args[0], "gate_up")
                return [self._part(op, self._gated(op, *_halves(op, both)), "down")]
            case "gated_mlp":
                gate, up = (self._part(op, args[0], n) for n in ("gate", "up"))
                return [self._part(op, self._gated(op, gate, up), "down")]
            case "mlp":
                up = self._part(op, args[0], "up")
                return [self._part(op, np.asarray(ACTIVATION_MEANINGS[op.attr("act")](up)), "down")]
            case "embed" | "embed_at":
                return [self.formats.narrow(r, self.formats.table) for r in super()._step(op, args, symbols)]
            case "moe":
                return [self._experts(op, *args)]
            case "attention":
                return [self._attention(op, _named(op, args))]
            case "latent_attention":
                return [self._latent(op, _named(op, args))]
        return super()._step(op, args, symbols)

    def _gated(self, op: DataflowOp, gate: Array, up: Array) -> Array:
        return np.asarray(ACTIVATION_MEANINGS[op.attr("act")](gate) * up)

    def _part(self, op: DataflowOp, x: Array, name: str, expert: int | None = None) -> Array:
        return self._product(op, x, name, f"{name}_bias", f"{name}_transposed", expert)

    def _narrow(self, symbol: str) -> Array:
        if symbol not in self._weights:
            self._weights[symbol] = self.formats.narrow(self._weight(symbol), self.formats.matmul)
        return self._weights[symbol]

    def _product(
        self, op: DataflowOp, x: Array, name: str, bias: str | None, flag: str, expert: int | None = None
    ) -> Array:
        """x times a weight, or one expert's of a stack, with its bias."""
        at = () if expert is None else (expert,)
        weight = self._narrow(op.attr(name))[at]
        if block := op.attrs().get("round_block"):
            x = round_blocks(x, block)
        y = self.formats.narrow(x, self.formats.matmul) @ (weight.T if op.attr(flag) else weight)
        vector = None if bias is None else op.attr(bias)
        return np.asarray(y if vector is None else y + self._weight(vector)[at])

    def _experts(self, op: DataflowOp, x: Array, index: Array, share: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        chosen, shares = (a.reshape(-1, a.shape[-1]) for a in (index, share))
        total: Any = None
        for j in range(chosen.shape[1]):
            weight = shares[:, j : j + 1]
            taken = rows * weight if op.attr("share_input") else rows
            made: Any = None
            for e in np.unique(chosen[:, j]).tolist():
                mine = chosen[:, j] == e
                down = self._part(op, self._hidden(op, taken[mine], e), "down", e)
                made = np.zeros((len(rows), down.shape[1]), down.dtype) if made is None else made
                made[mine] = down
            made = made if op.attr("share_input") else weight * made
            total = made if total is None else total + made
        return np.asarray(total).reshape(*x.shape[:-1], -1)

    def _hidden(self, op: DataflowOp, x: Array, expert: int) -> Array:
        up, limit = self._part(op, x, "up", expert), op.attr("limit")
        if op.attr("packing") != "none":
            gate, up = _halves(op, up)
        elif op.attr("gate") is None:
            return np.asarray(ACTIVATION_MEANINGS[op.attr("act")](up))
        else:
            gate = self._part(op, x, "gate", expert)
        if limit:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return self._gated(op, gate, up + up.dtype.type(op.attr("up_offset")))

    def _latent(self, op: DataflowOp, args: Mapping[str, Any]) -> Array:
        """In the absorbed form (DeepSeek-V2 technical report, section 2.1), in which cached rows are served:
        queries pass through the key half of the weight, what is attended to through its value half."""
        q, plain, formats = args["q"], op.attr("nope_dim"), self.formats
        weight = self._narrow(op.attr("weight"))
        weight = weight.T if op.attr("transposed") else weight
        halves = weight.reshape(len(weight), q.shape[1], -1).transpose(1, 0, 2)
        asked = formats.narrow(q[..., :plain], formats.matmul) @ halves[..., :plain].swapaxes(1, 2)
        rows = {
            "q": np.concatenate([asked, q[..., plain:]], -1),
            "k": np.concatenate([args["latent"], args["rope_key"]], -1),
            "v": args["latent"],
        }
        attended = self._attention(op, {**args, **rows})
        return np.asarray(formats.narrow(attended, formats.matmul) @ halves[..., plain:])

    def _attention(self, op: DataflowOp, args: Mapping[str, Any]) -> Array:
        formats, q = self.formats, args["q"]
        group = q.shape[1] // args["k"].shape[1]
        keys = formats.narrow(args["k"], formats.key_cache).repeat(group, axis=1)
        values = formats.narrow(args["v"], formats.value_cache).repeat(group, axis=1)
        asked = formats.narrow(q, formats.matmul if formats.key_cache else None)
        scores = asked @ keys.swapaxes(2, 3) * np.float32(op.attr("scale"))
        if cap := op.attr("softcap"):
            scores = np.tanh(scores / np.float32(cap)) * np.float32(cap)
        scores = _masked(op, scores, args.get("mask"))
        top, sinks = scores.max(-1, keepdims=True), args.get("sinks")
        extra: Any = 0
        if sinks is not None:
            sinks = sinks.reshape(1, -1, 1, 1)
            top = np.maximum(top, sinks)
            extra = np.exp(sinks - top)
        shares = np.exp(scores - top)
        return np.asarray(shares / (shares.sum(-1, keepdims=True) + extra) @ values)


def _masked(op: DataflowOp, scores: Array, mask: Array | None) -> Array:
    """Scores [B, H, S, T] with the op's mask, or the one that positions give."""
    least = np.float32(-np.inf)
    if mask is not None:
        return np.where(mask, scores, least) if mask.dtype == np.bool_ else np.asarray(scores + mask)
    known = op.attrs()
    length, asked = scores.shape[3], scores.shape[2]
    queries = np.arange(length - asked, length)
    rule = (op.attr("causal"), op.attr("window"), known.get("slopes"), known.get("chunk", 0))
    seen, bias = position_mask(queries, length, *rule)
    scores = scores if bias is None else scores + bias.astype(scores.dtype)
    return np.where(seen, scores, least)


def _halves(op: DataflowOp, both: Array) -> tuple[Array, Array]:
    """Gate and up of a product that makes both."""
    half = both.shape[-1] // 2
    if op.attr("packing") == "halves":
        return both[..., :half], both[..., half:]
    return both[..., ::2], both[..., 1::2]


def _named(op: DataflowOp, args: list[Array]) -> dict[str, Any]:
    given = dict(zip(op.operands, args, strict=True))
    return {n: given[v] for n, v in operands_by_name(op).items() if isinstance(v, SSAValue)}
