"""What one forward pass of a model consists of, read from its graph: matrices, attentions, experts, norms.

Each item carries how often it occurs. This is what serving times are made of: the same items whatever the
mixture of prompts and decoding sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mapper.errors import LoweringError
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.sections import Section

Split = Literal["column", "row", "none"]
Role = Literal["attention", "mlp", "router", "head"]


@dataclass(frozen=True)
class Matrix:
    """Weights [k, n]. `split` over a tensor-parallel group: columns or rows are shared out, or each chip
    holds all. Rows end in an all-reduce."""

    k: int
    n: int
    split: Split
    role: Role


@dataclass(frozen=True)
class Attention:
    """`heads` queries of width `dim` on `kv_heads` keys (`dim`) and values (`value_dim`); a query sees at
    most `window` tokens (0: all). `rank` > 0: latent attention, which caches rank + `rope` elements per
    token."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    window: int = 0
    rank: int = 0
    rope: int = 0

    @property
    def row(self) -> int:
        """Elements cached per token, over all chips."""
        return self.rank + self.rope if self.rank else self.kv_heads * (self.dim + self.value_dim)


@dataclass(frozen=True)
class Experts:
    """`count` experts, `chosen` per token: up [k, n] (gate and up together) and down [inner, k]."""

    count: int
    chosen: int
    k: int
    n: int
    inner: int


@dataclass(frozen=True)
class Norm:
    """A normalisation over `width` elements per token, with the residual addition before it."""

    width: int


Item = Matrix | Attention | Experts | Norm


@dataclass(frozen=True)
class Work:
    """All items of a forward pass with their number; `hidden` is the width of the residual stream,
    `vocabulary` that of the logits; `embedding` elements are looked up, not multiplied."""

    items: tuple[tuple[Item, int], ...]
    hidden: int
    vocabulary: int
    embedding: int

    def of(self, kind: type) -> Iterator[tuple[Item, int]]:
        """The items of one kind with their number."""
        return ((item, count) for item, count in self.items if isinstance(item, kind))


def work(graph: Graph) -> Work:
    """The work of one forward pass of `graph`. Raises LoweringError for a model that is no decoder."""
    found: Counter[Item] = Counter()
    for section in graph.sections():
        for item in _items(graph, section):
            found[item] += section.count
    heads = [item for item in found if isinstance(item, Matrix) and item.role == "head"]
    if not heads or not any(isinstance(item, Attention) for item in found):
        raise LoweringError(
            f"{graph.name or 'the model'} is no decoder: no attention or no head was recognised"
        )
    tables = [graph.weight(op, "table") for op in graph.ops() if op.mnemonic == "embed"]
    embedding = sum(t.elements for t in tables if t is not None)
    return Work(tuple(found.items()), heads[0].k, heads[0].n, embedding)


def _items(graph: Graph, section: Section) -> Iterator[Item]:
    ops = section.ops
    places = [i for i, op in enumerate(ops) if op.mnemonic in _ATTENTION]
    routes = {int(op.attr("top_k")): op for op in ops if op.mnemonic == "route"}
    experts = {_shape(graph, op, "up")[0] for op in ops if op.mnemonic == "moe"}
    latent = any(op.mnemonic == "latent_attention" for op in ops)
    inward: Counter[int] = Counter()
    out_of_attention = False
    for i, op in enumerate(ops):
        if op.mnemonic in ("linear", "lm_head"):
            k, n = _matrix(graph, op)
            if op.mnemonic == "lm_head":
                yield Matrix(k, n, "column", "head")
            elif n in experts:
                yield Matrix(k, n, "none", "router")
            elif out_of_attention:
                out_of_attention = False
                yield Matrix(k, n, "row", "attention")
            elif latent and any(i < p for p in places) and not _fed_by_small_norm(op, k, ops):
                yield Matrix(k, n, "none", "attention")
            else:
                inward[k] += n
        elif op.mnemonic in _ATTENTION:
            yield from (Matrix(k, n, "column", "attention") for k, n in inward.items())
            inward.clear()
            yield _attention(graph, op)
            out_of_attention = True
        elif op.mnemonic in _MLP:
            yield from _mlp(graph, op)
        elif op.mnemonic == "moe":
            yield _experts(graph, op, max(routes, default=1))
        elif op.mnemonic == "norm":
            yield Norm(tensor_type(op.results[0]).shape[-1].value)
    yield from (Matrix(k, n, "column", "attention") for k, n in inward.items())


_ATTENTION = ("attention", "latent_attention")
_MLP = {"mlp": ("up",), "gated_mlp": ("gate", "up"), "packed_mlp": ("gate_up",)}


def _fed_by_small_norm(op: DataflowOp, k: int, ops: Sequence[DataflowOp]) -> bool:
    """Whether a projection of latent attention starts from a compressed row, not from the residual stream."""
    widest = max((tensor_type(o.results[0]).shape[-1].value for o in ops if o.mnemonic == "norm"), default=0)
    return k < widest


def _shape(graph: Graph, op: DataflowOp, attribute: str) -> tuple[int, ...]:
    weight = graph.weight(op, attribute)
    if weight is None:
        raise LoweringError(f"{op.mnemonic} has no weight {attribute}")
    return tuple(weight.shape)


def _matrix(graph: Graph, op: DataflowOp, name: str = "weight", flag: str = "transposed") -> tuple[int, int]:
    shape = _shape(graph, op, name)
    return (shape[1], shape[0]) if op.attr(flag) else (shape[0], shape[1])


def _mlp(graph: Graph, op: DataflowOp) -> Iterator[Item]:
    width = 0
    for name in _MLP[op.mnemonic]:
        k, n = _matrix(graph, op, name, f"{name}_transposed")
        width += n
    yield Matrix(k, width, "column", "mlp")
    yield Matrix(*_matrix(graph, op, "down", "down_transposed"), "row", "mlp")


def _experts(graph: Graph, op: DataflowOp, chosen: int) -> Experts:
    count, *up = _shape(graph, op, "up")
    k, n = reversed(up) if op.attr("up_transposed") else up
    down = _shape(graph, op, "down")[1:]
    inner = down[1] if op.attr("down_transposed") else down[0]
    return Experts(count, chosen, k, 2 * n if op.attr("gate") is not None else n, inner)


def _attention(graph: Graph, op: DataflowOp) -> Attention:
    q = tensor_type(op.operands[0]).shape
    out = tensor_type(op.results[0]).shape
    heads, dim, value = q[1].value, q[-1].value, out[-1].value
    window = int(op.attr("window") or 0)
    if op.mnemonic == "latent_attention":
        rank = tensor_type(op.operands[1]).shape[-1].value
        rope = tensor_type(op.operands[2]).shape[-1].value
        return Attention(heads, 1, dim, value, window, rank, rope)
    chunk = int(op.attr("chunk") or 0)
    reach = min(w for w in (window, chunk) if w) if window or chunk else 0
    return Attention(heads, tensor_type(op.operands[1]).shape[1].value, dim, value, reach)
