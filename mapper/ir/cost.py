"""Work per op, symbolic in the graph's dimensions: FLOPs, activation bytes, weight bytes.

A multiply-add is 2 FLOPs, any other scalar function 1. Bytes are what the op must touch once, each operand
and result in its stored format: no caches, no re-reads; so sums over fused ops are upper figures, those of a
single op lower ones. Views move nothing; table look-ups read the rows they use; a cache append writes the new
rows only; attention over a cache reads the rows that its window lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mapper.ir.dims import ONE, ZERO, Dim
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.structure import RepeatOp
from mapper.ir.types import BITS, TensorType


class Kind(Protocol):
    """What is asked of a weight: its shape, and the bytes it takes as it is stored."""

    @property
    def shape(self) -> Sequence[Dim]:
        """Dimensions."""

    @property
    def elements(self) -> Dim:
        """Number of elements."""

    @property
    def bytes(self) -> Dim:
        """Bytes of all its stored parts."""


@dataclass(frozen=True)
class PackedKind:
    """A weight of low-bit integers."""

    type: TensorType
    bytes: Dim

    @property
    def shape(self) -> Sequence[Dim]:
        """Dimensions of the weight."""
        return self.type.shape

    @property
    def elements(self) -> Dim:
        """Elements of the weight."""
        return self.type.elements


Lookup = Callable[[str], Kind]

_VIEWS = ("reshape", "squeeze", "unsqueeze", "shape_of", "constant", "load", "repeat")
_COPIES = ("transpose", "expand", "concat", "split", "slice", "gather", "gather_elements", "gather_nd", "pad",
           "tile", "fill", "cast", "trilu", "one_hot", "kv_append", "kv_update", "cache_append", "embed",
           "embed_at", "scatter_nd", "scatter_elements", "range", "nonzero")  # fmt: skip
_ACTIVATION = {"relu": 1, "identity": 0, "sigmoid": 4, "tanh": 1, "relu_squared": 2}
_MLPS = {"mlp": ("up", "down"), "gated_mlp": ("gate", "up", "down"), "packed_mlp": ("gate_up", "down")}
_PER_ELEMENT = {"softmax": 5, "topk": 1, "argmax": 1, "sample": 1, "cumsum": 1, "reduce": 1, "rsqrt": 2}


@dataclass(frozen=True)
class Cost:
    """One execution of one op: `flops`; activation bytes `read` and `written`; `weights` bytes read."""

    flops: Dim = ZERO
    read: Dim = ZERO
    written: Dim = ZERO
    weights: Dim = ZERO

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.read + other.read,
            self.written + other.written,
            self.weights + other.weights,
        )

    def __mul__(self, count: int) -> Cost:
        return Cost(self.flops * count, self.read * count, self.written * count, self.weights * count)

    @property
    def bytes(self) -> Dim:
        """All bytes touched."""
        return self.read + self.written + self.weights

    def evaluate(self, symbols: Mapping[str, int]) -> tuple[int, int]:
        """(flops, bytes) as numbers."""
        return self.flops.evaluate(symbols), self.bytes.evaluate(symbols)


def costs(graph: Graph) -> list[tuple[DataflowOp, int, Cost]]:
    """(op, how often it runs, cost of one run) of every op, those inside repeats included."""
    types: dict[str, Kind] = {
        n: PackedKind(w.type, Dim.of(w.bytes)) if w.packing else w.type for n, w in graph.weights.items()
    }
    found: list[tuple[DataflowOp, int, Cost]] = []
    for section in graph.sections():
        slots = {slot: types[symbols[0]] for slot, symbols in section.table.items()}
        lookup = {**types, **slots}.__getitem__
        found += [(op, section.count, cost(op, lookup)) for op in section.ops]
    return found


def total(graph: Graph) -> Cost:
    """The cost of one run of the whole graph."""
    result = Cost()
    for _, count, one in costs(graph):
        result = result + one * count
    return result


def cost(op: DataflowOp, weights: Lookup) -> Cost:
    """The cost of one op; `weights` gives the type of a weight symbol or slot."""
    if isinstance(op, RepeatOp) or op.mnemonic in _VIEWS:
        return Cost()
    read = sum((tensor_type(v).bytes for v in op.operands), start=ZERO)
    written = sum((tensor_type(v).bytes for v in op.results), start=ZERO)
    stored = sum((weights(s).bytes for s in op.weights().values()), start=ZERO)
    special = _SPECIAL.get(op.mnemonic)
    if special is not None:
        return special(op, weights, Cost(ZERO, read, written, stored))
    if op.mnemonic in _COPIES:
        return _copy(op, Cost(ZERO, read, written, stored))
    return Cost(_elements(op) * _PER_ELEMENT.get(op.mnemonic, 1), read, written, stored)


def _elements(op: DataflowOp) -> Dim:
    """Elements that an elementwise op or reduction works through."""
    first = tensor_type(op.operands[0]).elements if op.operands else ZERO
    made = tensor_type(op.results[0]).elements
    return first if op.mnemonic in ("reduce", "argmax", "sample", "topk") else made


def _copy(op: DataflowOp, base: Cost) -> Cost:
    if op.mnemonic in ("embed", "embed_at"):
        return Cost(ZERO, base.read, base.written, base.written)
    if op.mnemonic in ("gather", "gather_elements", "gather_nd"):
        return Cost(ZERO, base.written + tensor_type(op.operands[1]).bytes, base.written, ZERO)
    if op.mnemonic == "cache_append":
        new = tensor_type(op.operands[1]).bytes
        return Cost(ZERO, new, new, ZERO)
    if op.mnemonic == "slice":
        return Cost(ZERO, base.written, base.written, ZERO)
    return base


def _matrix(op: DataflowOp, weights: Lookup, name: str) -> Dim:
    """FLOPs per row of x through a matrix, with one addition per output where it has a bias."""
    symbol, bias = op.attr(name), op.attr("bias" if name == "weight" else f"{name}_bias")
    return weights(symbol).elements * 2 + (weights(bias).elements if bias is not None else ZERO)


def _rows(op: DataflowOp) -> Dim:
    rows = ONE
    for dim in tensor_type(op.operands[0]).shape[:-1]:
        rows = rows * dim
    return rows


def _linear(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    return Cost(_rows(op) * _matrix(op, weights, "weight"), base.read, base.written, base.weights)


def _mlp(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    names = _MLPS[op.mnemonic]
    width = weights(op.attr("down")).elements // tensor_type(op.results[0]).shape[-1]
    gates = _ACTIVATION.get(op.attr("act"), 5) + (op.mnemonic != "mlp")
    per_row = sum((_matrix(op, weights, n) for n in names), start=width * gates)
    return Cost(_rows(op) * per_row, base.read, base.written, base.weights)


def _moe(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    """Only chosen experts are read: at most all, at least those that one token chooses."""
    rows, chosen = _rows(op), tensor_type(op.operands[1]).shape[-1]
    names = [n for n in ("gate", "up", "down") if op.attr(n) is not None]
    experts = weights(op.attr("up")).shape[0]
    inner = weights(op.attr("down")).elements // experts // tensor_type(op.results[0]).shape[-1]
    one = sum((weights(op.attr(n)).elements // experts * 2 for n in names), start=inner * 6)
    used = Dim.min(experts, rows * chosen)
    read = sum((weights(s).bytes // experts for s in op.weights().values()), start=ZERO) * used
    return Cost(rows * chosen * one, base.read, base.written, read)


def _route(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    return Cost(tensor_type(op.operands[0]).elements * 6, base.read, base.written, base.weights)


def _matmul(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    inner = tensor_type(op.operands[0]).shape[-1]
    return Cost(tensor_type(op.results[0]).elements * inner * 2, base.read, base.written)


def _conv(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    kernel = tensor_type(op.operands[1])
    reach = kernel.elements // kernel.shape[0]
    return Cost(tensor_type(op.results[0]).elements * reach * 2, base.read, base.written)


def _norm(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    per_element = (3 if op.attr("kind") == "rms" else 5) + len(op.weights())
    return Cost(tensor_type(op.results[0]).elements * per_element, base.read, base.written, base.weights)


def _activation(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    per_element = _ACTIVATION.get(op.attr("kind"), 5)
    return Cost(tensor_type(op.results[0]).elements * per_element, base.read, base.written)


def _rope(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    x = tensor_type(op.operands[0])
    turned = x.elements // x.shape[-1] * op.attr("rotary_dim")
    rows = x.shape[2] * op.attr("rotary_dim") * (BITS["f32"] // 8)
    return Cost(turned * 3, base.read, base.written, rows if op.mnemonic == "rope_at" else ZERO)


def _scale(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    x = tensor_type(op.operands[0])
    return Cost(x.elements, base.read, base.written, x.shape[op.attr("axis")] * (BITS["f32"] // 8))


def seen_from(position: int, window: int, chunk: int) -> int:
    """The first position that a causal query at `position` sees (see `attention`)."""
    return max(0, position + 1 - window if window else 0, position - position % chunk if chunk else 0)


def _chunk(op: DataflowOp) -> int:
    return int(op.attr("chunk")) if op.mnemonic in ("attention", "cached_attention") else 0


def attended_pairs(op: DataflowOp) -> Dim:
    """(query, key) pairs per head and batch element that the mask lets through, at a full cache.

    Exact for static shapes; for symbolic ones a window, or a run, counts as min(it, all tokens) per query."""
    q, k = tensor_type(op.operands[0]), tensor_type(op.operands[1])
    tokens, keys, window, chunk = q.shape[2], k.shape[2], op.attr("window"), _chunk(op)
    causal = op.mnemonic in ("cached_attention", "cached_latent_attention") or op.attr("causal")
    if not causal:
        return tokens * keys
    if tokens.is_const and keys.is_const:
        s, t = tokens.value, keys.value
        return Dim.of(sum(p + 1 - seen_from(p, window, chunk) for p in range(t - s, t)))
    if window or chunk:
        return tokens * Dim.min(keys, min(n for n in (window, chunk) if n))
    return tokens * (keys - tokens) + tokens * (tokens + 1) // 2


def _attention(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    q, v = tensor_type(op.operands[0]), tensor_type(op.operands[2])
    per_pair = (q.shape[3] + v.shape[3]) * 2 + 5 + (2 if op.attr("softcap") else 0)
    flops = q.shape[0] * q.shape[1] * attended_pairs(op) * per_pair
    keys, window, chunk = tensor_type(op.operands[1]), op.attr("window"), _chunk(op)
    tokens, total = q.shape[2], keys.shape[2]
    rows = total
    if chunk and tokens.is_const and total.is_const:
        rows = total - seen_from(total.value - tokens.value, window, chunk)
    elif window or chunk:
        rows = Dim.min(total, tokens + min(n for n in (window, chunk) if n) - 1)
    unread = (keys.shape[2] - rows) * (
        keys.bytes // keys.shape[2] + tensor_type(op.operands[2]).bytes // v.shape[2]
    )
    return Cost(flops, base.read - unread, base.written)


def _latent_attention(op: DataflowOp, weights: Lookup, base: Cost) -> Cost:
    """In the absorbed form: queries and results pass through the weight, attention runs on latent rows."""
    q, latent, rope_key = (tensor_type(v) for v in op.operands[:3])
    per_pair = (latent.shape[3] * 2 + rope_key.shape[3]) * 2 + 5 + (2 if op.attr("softcap") else 0)
    pairs = q.shape[0] * q.shape[1] * attended_pairs(op) * per_pair
    through = q.shape[0] * q.shape[2] * weights(op.attr("weight")).elements * 2
    return Cost(pairs + through, base.read, base.written, base.weights)


_SPECIAL: dict[str, Callable[[DataflowOp, Lookup, Cost], Cost]] = {
    "linear": _linear,
    "lm_head": _linear,
    "mlp": _mlp,
    "gated_mlp": _mlp,
    "packed_mlp": _mlp,
    "moe": _moe,
    "route": _route,
    "matmul": _matmul,
    "conv": _conv,
    "norm": _norm,
    "activation": _activation,
    "rope": _rope,
    "rope_at": _rope,
    "scale_at": _scale,
    "attention": _attention,
    "cached_attention": _attention,
    "cached_latent_attention": _latent_attention,
    "latent_attention": _latent_attention,
}
