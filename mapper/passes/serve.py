"""The serving form: a recognised decoder as a static graph of one step, for `mapper compile`.

Assumes that no token is padding (attention_mask all ones) and that positions are past_length + 0 .. S-1.
What the original graph computes from masks and positions is evaluated numerically once, and becomes tables
and attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.ir import Operation, SSAValue

from mapper.errors import ModelError, UnsupportedModelError, UsageError
from mapper.ir.builder import GraphBuilder
from mapper.ir.dims import Dim
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.types import Array, TensorType
from mapper.ir.weights import WeightSymbol
from mapper.passes.cache_source import APPENDS, cache_names, source
from mapper.passes.cse import Cse
from mapper.passes.dce import Dce
from mapper.passes.factors import Factor, factor_of, factor_table
from mapper.passes.layers import has_repeat
from mapper.passes.probe import Probe, place, static_or_raise, step_shapes, table_of
from mapper.passes.repeat import Repeat
from mapper.passes.rewrite import Values, builder_like
from mapper.passes.shorten import extend, shorten
from mapper.passes.specialise import specialise_values
from mapper.passes.unflatten import Unflatten
from mapper.passes.unroll import Unroll

_KEPT = {
    "rope": ("x",), "attention": ("q", "k", "v", "sinks"), "kv_append": ("new",), "kv_update": ("new",),
    "latent_attention": ("q", "latent", "rope_key"),
}  # fmt: skip
"""Operands that the serving form of an op still reads."""
_HALVES = ("f16", "bf16")


@dataclass(frozen=True)
class Serve:
    """`serve{phase=decode,batch=1,prompt=16,context=128}`: one new token per step, or `prompt` tokens in
    prefill."""

    phase: str = "decode"
    batch: int = 1
    prompt: int = 16
    context: int = 128
    name = "serve"

    def apply(self, graph: Graph) -> Graph:
        """The serving form, identical layers in a repeat. Raises UnsupportedModelError, UsageError."""
        return serve(graph, self.phase, self.batch, self.prompt, self.context)


def serve(graph: Graph, phase: str = "decode", batch: int = 1, prompt: int = 16, context: int = 128) -> Graph:
    """The serving form of a recognised decoder graph.

    Inputs `input_ids` [batch, S] i64, `past_length` [] i64 and per layer `cache.key.<i>`, `cache.value.<i>`
    [batch, Hkv, context, Dh] f32; outputs `logits` [batch, S, V] and the caches after the step, under the
    same names. S is 1 in decode and `prompt` in prefill.
    """
    if phase not in ("decode", "prefill"):
        raise UsageError(f"phase {phase!r} is neither decode nor prefill")
    tokens = prompt if phase == "prefill" else 1
    if min(batch, prompt, context) < 1 or tokens > context:
        raise UsageError(f"batch {batch}, prompt {prompt}, context {context}: each >= 1, prompt <= context")
    graph = graph.phase(phase)
    short = shorten(graph)
    if short is not None:
        extended = extend(_serve(short, batch, tokens, context), graph)
        if extended is not None:
            extended.verify()
            return extended
    served = _serve(graph, batch, tokens, context)
    served.verify()
    return served


def _serve(graph: Graph, batch: int, tokens: int, context: int) -> Graph:
    """The serving form, every layer looked at."""
    flat = Unroll().apply(graph) if has_repeat(graph) else Cse().apply(graph)
    try:
        static, values = specialise_values(flat, step_shapes(flat, batch, tokens))
    except ModelError as error:
        raise UnsupportedModelError(
            f"the graph does not take {tokens} tokens of batch {batch}: {error}"
        ) from error
    made = Dce().apply(_Server(flat, static, values, batch, tokens, context).run())
    static_or_raise(made)
    return Repeat().apply(Unflatten(batch, tokens).apply(made))


@dataclass
class _Server:
    """Rebuilds a static graph as its serving form, from the logits backwards. `specialised` maps the
    values of the dynamic graph `flat`, on which probes run, to those of `static`."""

    flat: Graph
    static: Graph
    specialised: Values
    batch: int
    tokens: int
    context: int
    values: Values = field(default_factory=dict)
    states: dict[str, SSAValue] = field(default_factory=dict)
    tables: dict[str, Array] = field(default_factory=dict)
    factors: dict[DataflowOp, Factor | None] = field(default_factory=dict)
    caches: dict[SSAValue, tuple[str, SSAValue]] = field(default_factory=dict)
    """What is appended, or begins a cache -> the cache's name and value."""

    def run(self) -> Graph:
        """The serving form, unrolled, with dead weights."""
        self.new: GraphBuilder = builder_like(self.static)
        self.probe = Probe(self.flat)
        self.origins = {
            new.owner: old.owner
            for old, new in self.specialised.items()
            if isinstance(new.owner, DataflowOp) and isinstance(old.owner, DataflowOp)
            if new.owner.name == old.owner.name
        }
        ids = self._only(self.static.inputs_with_role("token_ids"), "inputs of token ids")
        logits = self._only(self.static.outputs_with_role("logits"), "outputs of logits")
        kind = tensor_type(self.static.input_values[ids])
        self.values[self.static.input_values[ids]] = self.new.input("input_ids", kind, "token_ids")
        self.past_length = self.new.input("past_length", TensorType.of([], "i64"), "past_length")
        self._cache_inputs()
        root = self.static.output_values[logits]
        needed = self._needed(root)
        for op in self.static.top():
            if op in needed:
                self._place(op)
        outputs = {"logits": self._value(root, None)}
        outputs.update((name, self.states[name]) for name, _ in self.caches.values() if name in self.states)
        roles = {n: "logits" if n == "logits" else n.replace("cache.", "state.", 1) for n in outputs}
        return self.new.finish(outputs, roles, verify=False, kv_layout="BHLD")

    @staticmethod
    def _only(names: list[str], what: str) -> str:
        if len(names) != 1:
            raise UnsupportedModelError(f"the graph has {len(names)} {what}; a decoder has one")
        return names[0]

    def _cache_inputs(self) -> None:
        """Declares the caches, in layer order, in place of the past key/value inputs."""
        found = self._appended() if self.probe.cached else self._begun()
        if not found and not self.probe.cached:
            raise UnsupportedModelError("the graph has no key/value cache inputs; export it with a KV cache")
        for what, made in sorted(found, key=lambda p: (int(p[0].split(".")[1]), p[0])):
            kind = tensor_type(made)
            rows = (kind.shape[0], kind.shape[1], Dim.of(self.context), kind.shape[3])
            dtype = "f32" if kind.dtype in _HALVES else kind.dtype
            value = self.new.input(f"cache.{what}", TensorType.of(rows, dtype), f"state.{what}")
            self.caches[made] = (f"cache.{what}", value)

    def _appended(self) -> list[tuple[str, SSAValue]]:
        """(name, result) of every append to a cache."""
        names = cache_names(self.static.roles)
        inputs = {v: n for n, v in self.static.input_values.items()}
        found: list[tuple[str, SSAValue]] = []
        for op in self.static.top():
            place_ = source(op.operands[0], inputs) if op.mnemonic in APPENDS else None
            if place_ in names:
                self._fits(op)
                found.append((names[place_], op.results[0]))
        return found

    def _begun(self) -> list[tuple[str, SSAValue]]:
        """(name, value) of the keys and values with which a graph without caches begins some."""
        roles = self.static.roles["outputs"]
        made = [(n, roles[n].removeprefix("present.")) for n in roles if roles[n].startswith("present.")]
        return [(what, self.static.output_values[n]) for n, what in made if not what.startswith("cross_")]

    def _fits(self, op: DataflowOp) -> None:
        rows = tensor_type(op.operands[0]).shape[2]
        if op.mnemonic == "kv_update" and rows.is_const and rows.value < self.context:
            raise UsageError(f"context {self.context}: the model's caches have {rows} rows ({place(op)})")

    def _origin(self, op: DataflowOp) -> DataflowOp:
        """The op of the dynamic graph that a static one was specialised from."""
        origin = self.origins[op]
        assert isinstance(origin, DataflowOp)
        return origin

    def _is_position(self, op: DataflowOp) -> bool:
        return op.mnemonic == "embed" and self.probe.is_position_embedding(self._origin(op))

    def _factor(self, op: DataflowOp) -> Factor | None:
        """The factor by position that the op applies to its other operand, None where it applies none."""
        if op not in self.factors:
            origin = self.origins.get(op)
            made = factor_of(self.probe, origin) if isinstance(origin, DataflowOp) else None
            whole = made is not None and tensor_type(op.results[0]) == tensor_type(op.operands[made.x])
            self.factors[op] = made if whole else None
        return self.factors[op]

    def _needed(self, root: SSAValue) -> set[Operation]:
        """The ops that the logits depend on once masks and positions are gone."""
        found: set[Operation] = set()
        pending = [root]
        while pending:
            owner = pending.pop().owner
            if not isinstance(owner, DataflowOp) or owner in found:
                continue
            found.add(owner)
            if owner.mnemonic in _KEPT:
                pending += [v for v in map(owner.operand, _KEPT[owner.mnemonic]) if v is not None]
            elif (factor := self._factor(owner)) is not None:
                pending.append(owner.operands[factor.x])
            elif not self._is_position(owner):
                pending += owner.operands
        return found

    def _value(self, old: SSAValue, user: DataflowOp | None) -> SSAValue:
        """The new value of an old one. Raises where it is a mask, position or cache in a foreign place."""
        if old in self.values:
            return self.values[old]
        names = [n for n, v in self.static.input_values.items() if v is old]
        where = place(user) if user is not None else "the logits"
        what = f"input {names[0]!r}" if names else f"the result of {old.owner}"
        raise UnsupportedModelError(
            f"{where} reads {what} other than through attention, rope, a cache append or a position embedding"
        )

    def _place(self, op: DataflowOp) -> None:
        special = {"rope": self._rope, "attention": self._attention, "kv_append": self._append}
        special |= {"kv_update": self._append, "latent_attention": self._latent_attention}
        if self._is_position(op):
            self.values[op.results[0]] = self._positions(op)
        elif op.mnemonic in special:
            self.values[op.results[0]] = special[op.mnemonic](op)
        elif (factor := self._factor(op)) is not None:
            self.values[op.results[0]] = self._scale(op, factor)
        else:
            local = {v: self._value(v, op) for v in op.operands}
            self.values.update(zip(op.results, self.new.copy(op, local).results, strict=True))

    def _positions(self, op: DataflowOp) -> SSAValue:
        shape = tensor_type(op.results[0]).shape
        batch = self.batch if len(shape) == 3 and shape[0] == Dim.of(self.batch) else 1
        offset = self.probe.position_offset(self._origin(op))
        rows = self.new.scope.weight(op.attr("table")).ints[0]
        if self.context + offset > rows:
            raise UsageError(f"context {self.context}: the model has {rows - offset} positions ({place(op)})")
        attrs = {"table": op.attr("table"), "batch": batch, "seq": self.tokens, "offset": offset}
        made = self.new.add("embed_at", [self.past_length], attrs, node=op.node)
        if tensor_type(made).shape == shape:
            return made
        return self.new.add("reshape", [made], {"dims": shape}, node=op.node)

    def _rope(self, op: DataflowOp) -> SSAValue:
        table = self.probe.rope_table(self._origin(op), self.context)
        symbol = self._table("rope.table", table)
        attrs = {"table": symbol, "style": op.attr("style"), "rotary_dim": op.attr("rotary_dim")}
        return self.new.add(
            "rope_at", [self._value(op.operands[0], op), self.past_length], attrs, node=op.node
        )

    def _scale(self, op: DataflowOp, factor: Factor) -> SSAValue:
        """x times what the graph makes of the position, which may be 1 as far as the context goes."""
        table = factor_table(self.probe, self._origin(op), factor, self.context)
        x = self._value(op.operands[factor.x], op)
        if (table == 1).all():
            return x
        attrs = {"table": self._table("factor.table", table), "axis": factor.axis}
        return self.new.add("scale_at", [x, self.past_length], attrs, node=op.node)

    def _table(self, name: str, table: Array) -> str:
        """The symbol of a table by position, which equal ones share."""
        symbol = table_of(self.tables, table)
        if symbol is None:
            symbol = f"{name}.{len(self.tables)}"
            self.tables[symbol] = table
            self.new.weight(WeightSymbol.of(symbol, table, derived=True))
        return symbol

    def _append(self, op: DataflowOp) -> SSAValue:
        if op.results[0] not in self.caches:
            raise UnsupportedModelError(f"{place(op)}: its past is not an input of the graph")
        if op.mnemonic == "kv_update":
            self.probe.check_rows(self._origin(op))
        return self._state(op, op.results[0], self._value(op.operands[1], op))

    def _state(self, op: DataflowOp, made: SSAValue, new: SSAValue) -> SSAValue:
        """The cache with new rows; they are kept in f32 where the graph has them in half precision."""
        name, cache = self.caches[made]
        if name in self.states:
            raise UnsupportedModelError(f"{place(op)}: a second append to {name}")
        kind = tensor_type(cache).dtype
        if tensor_type(new).dtype != kind:
            new = self.new.add("cast", [new], {"dtype": kind}, node=op.node)
        self.states[name] = self.new.add("cache_append", [cache, new, self.past_length], node=op.node)
        return self.states[name]

    def _cached(self, op: DataflowOp, slot: str, value: SSAValue) -> SSAValue:
        """The cache that an attention operand is, behind casts; a cache begins with rows that nobody appends.
        Raises UnsupportedModelError."""
        while isinstance(value.owner, DataflowOp) and value.owner.mnemonic == "cast":
            value = value.owner.operands[0]
        if isinstance(value.owner, DataflowOp) and value.owner.mnemonic in APPENDS:
            return self._value(value, op)
        if value not in self.caches:
            raise UnsupportedModelError(f"{place(op)}: {slot} does not come from a cache append")
        return self._state(op, value, self._value(value, op))

    def _attention(self, op: DataflowOp) -> SSAValue:
        self.probe.check_attention(self._origin(op))
        q, k, v = op.operands[:3]
        keys, values = self._cached(op, "k", k), self._cached(op, "v", v)
        sinks = op.operand("sinks")
        extra = None if sinks is None else self._value(sinks, op)
        operands = [self._value(q, op), keys, values, self.past_length, extra]
        attrs = {n: op.attr(n) for n in ("scale", "window", "softcap", "slopes")}
        if op.attr("chunk") < self.context:  # else all positions are in the first run
            attrs["chunk"] = op.attr("chunk")
        return self.new.add("cached_attention", operands, attrs, node=op.node)

    def _latent_attention(self, op: DataflowOp) -> SSAValue:
        self.probe.check_attention(self._origin(op))
        q, latent, rope_key = op.operands[:3]
        caches = self._cached(op, "latent", latent), self._cached(op, "rope_key", rope_key)
        attrs = {n: op.attr(n) for n in ("weight", "nope_dim", "scale", "transposed", "window", "softcap")}
        operands = [self._value(q, op), *caches, self.past_length]
        return self.new.add("cached_latent_attention", operands, attrs, node=op.node)
