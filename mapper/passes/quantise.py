"""Weights of matrix products in another format: cast, or quantised to low-bit integers or floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from xdsl.ir import Operation, SSAValue

from mapper.errors import UsageError
from mapper.ir.builder import BlockBuilder, GraphBuilder
from mapper.ir.experts import RouteOp
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.structure import RepeatOp
from mapper.ir.switch import Switch
from mapper.ir.types import TensorType, is_float
from mapper.ir.weights import Derivation, Packing, WeightSymbol
from mapper.lowbit import FORMATS, Scheme, format_name
from mapper.passes.rewrite import Values, rewrite_graph, rewrite_op, rewrite_repeat

PRODUCTS: Mapping[str, Mapping[str, str]] = {
    "linear": {"weight": "transposed"},
    "lm_head": {"weight": "transposed"},
    "latent_attention": {"weight": "transposed"},
    "cached_latent_attention": {"weight": "transposed"},
    "mlp": {"up": "up_transposed", "down": "down_transposed"},
    "packed_mlp": {"gate_up": "gate_up_transposed", "down": "down_transposed"},
    "gated_mlp": {"gate": "gate_transposed", "up": "up_transposed", "down": "down_transposed"},
    "moe": {"gate": "gate_transposed", "up": "up_transposed", "down": "down_transposed"},
}
"""Op -> attribute of each matrix that it multiplies by -> the flag that says whether that is [N, K]."""
Table = Mapping[str, tuple[str, ...]]
"""Slot of a repeat -> symbol of each iteration."""


@dataclass(frozen=True)
class Quantise:
    """`quantise{format=int4}`: the weights of matrix products in a format of `mapper.lowbit.FORMATS`.

    A quantised weight is held by output rows, [N, K] with its blocks along K; where a product has it as
    [K, N], the product is turned. Embeddings, norms, biases and tables stay, and so does a weight that the
    model stores packed, and, unless the format is a mere cast, the product that chooses experts: it is small,
    and an error there changes which experts run. What is both embedding and product gets a second, quantised
    symbol. No weight is read: a new symbol says what it is made from, and is made when it is loaded. Raises
    UsageError for an unknown format.
    """

    format: str = "int4"
    name = "quantise"

    def apply(self, graph: Graph) -> Graph:
        """The graph with its products' weights in the format, layers folded as they are."""
        try:
            chosen = format_name(self.format)
        except ValueError as error:
            raise UsageError(str(error)) from error
        made = rewrite_graph(graph, _Rewriting(graph, chosen).place)
        if graph.switch is None:
            return made
        switch, known = graph.switch, dict[str, Graph]()

        def other(name: str) -> Graph:
            if name not in known:
                known[name] = self.apply(replace(switch.graph(name), switch=None))
            return known[name]

        return replace(made, switch=Switch(switch.choose, other, switch.phases))


@dataclass
class _Rewriting:
    """`made` holds the new symbols: (old name, whether it is turned) -> symbol, None where it stays."""

    graph: Graph
    format: str
    made: dict[tuple[str, bool], WeightSymbol | None] = field(default_factory=dict)

    def place(self, new: BlockBuilder, op: DataflowOp, values: Values) -> None:
        """See rewrite_graph."""
        assert isinstance(new, GraphBuilder)
        if isinstance(op, RepeatOp):
            results: Sequence[SSAValue] = self._repeat(new, op, values)
            values.update(zip(op.results, results, strict=True))
        else:
            rewrite_op(new, op, values, lambda at, one, known: self._product(new, at, one, known, {}))

    def _repeat(self, new: GraphBuilder, op: RepeatOp, values: Values) -> Sequence[SSAValue]:
        """The repeat with its products' slots leading to new symbols; slots that nothing names any more are
        left out."""
        old: Table = op.attr("table")
        table = dict(old)
        kept: set[str] = set()
        for inner in op.ops():
            changed = self._changes(new, inner, table)
            kept |= {slot for attribute, slot in inner.weights().items() if attribute not in changed}
        table = {slot: row for slot, row in table.items() if slot in kept or slot not in old}

        def visit(body: BlockBuilder, inner: DataflowOp, local: Values) -> Sequence[SSAValue] | None:
            return self._product(new, body, inner, local, old)

        return rewrite_repeat(new, op, values, visit, table=table)

    def _product(
        self, new: GraphBuilder, at: BlockBuilder, op: DataflowOp, values: Values, table: Table
    ) -> Sequence[SSAValue] | None:
        changed = self._changes(new, op, dict(table))
        if not changed:
            return None
        rows = isinstance(FORMATS[self.format], Scheme)
        flags = {PRODUCTS[op.mnemonic][a]: True for a in changed} if rows else {}
        return at.copy(op, values, {**changed, **flags}).results

    def _changes(
        self, new: GraphBuilder, op: DataflowOp, table: dict[str, tuple[str, ...]]
    ) -> dict[str, str]:
        """Attribute -> new symbol or slot; new slots are added to the table."""
        found: dict[str, str] = {}
        if isinstance(FORMATS[self.format], Scheme) and _is_router(op):
            return found
        for attribute, flag in PRODUCTS.get(op.mnemonic, {}).items():
            name = op.attr(attribute)
            if name is None:
                continue
            turned = not op.attr(flag) and isinstance(FORMATS[self.format], Scheme)
            made = [self._symbol(new, one, turned) for one in table.get(name, (name,))]
            symbols = [symbol.name for symbol in made if symbol is not None]
            if len(symbols) < len(made):
                continue
            found[attribute] = symbols[0]
            if name in table:
                found[attribute] = self._name(name, turned)
                table[found[attribute]] = tuple(symbols)
        return found

    def _name(self, name: str, turned: bool) -> str:
        return f"{name}:{'t:' if turned else ''}{self.format}"

    def _symbol(self, new: GraphBuilder, name: str, turned: bool) -> WeightSymbol | None:
        """The new symbol of a weight, its last two axes exchanged where `turned`; None where it stays."""
        if (name, turned) not in self.made:
            made = self._make(self.graph.weights[name], turned)
            self.made[name, turned] = made
            if made is not None:
                new.weight(made)
        return self.made[name, turned]

    def _make(self, old: WeightSymbol, turned: bool) -> WeightSymbol | None:
        how = FORMATS[self.format]
        stays = old.packing is not None or not is_float(old.dtype) or len(old.shape) < 2
        if stays or not old.elements or old.dtype == how:
            return None
        name = self._name(old.name, turned)
        if isinstance(how, str):
            return _symbol(name, old.shape, how, Derivation(old))
        return _quantised(name, old, how, turned)


_CARRIED = ("cast", "reshape", "squeeze", "unsqueeze", "add", "mul", "div", "round_blocks")
"""Ops between a router's product and the choice that change its logits' form or scale alone."""


def _is_router(op: DataflowOp) -> bool:
    """Whether a product makes nothing but logits by which experts are chosen."""
    if op.mnemonic != "linear":
        return False
    users: list[Operation] = [op]
    routes = 0
    while users:
        for use in users.pop().results[0].uses:
            user = use.operation
            if isinstance(user, RouteOp):
                routes += 1
            elif isinstance(user, DataflowOp) and user.mnemonic in _CARRIED:
                users.append(user)
            else:
                return False
    return routes > 0


def _symbol(name: str, shape: tuple[int, ...], dtype: str, derivation: Derivation) -> WeightSymbol:
    size = TensorType.of(shape, dtype).bytes.value
    return WeightSymbol(name, shape, dtype, bytes=size, derivation=derivation)


def _quantised(name: str, old: WeightSymbol, scheme: Scheme, turned: bool) -> WeightSymbol:
    """A packed symbol [..., N, K] whose parts are made from `old`. It is computed in f32, exactly: an
    integer of 8 bits times a scale of 11 bits has at most 19."""
    shape = (*old.shape[:-2], old.shape[-1], old.shape[-2]) if turned else old.shape
    parts = {
        part: _symbol(f"{name}.{part}", dims, dtype, Derivation(old, scheme, part, turned))
        for part, (dims, dtype) in scheme.parts(shape).items()
    }
    size = sum(p.bytes for p in parts.values())
    return WeightSymbol(name, shape, "f32", bytes=size, packing=Packing(scheme, **parts))
