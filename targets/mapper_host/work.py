"""Operations and weight bytes of IR ops on the host: what any lowering must do, from shapes and formats
alone."""

from __future__ import annotations

import math

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.weights import WeightSymbol
from mapper_host.held import is_serving, row_bytes

_PRODUCTS = {
    "linear": ("weight",), "lm_head": ("weight",), "mlp": ("up", "down"), "gated_mlp": ("gate", "up", "down"),
    "packed_mlp": ("gate_up", "down"),
}  # fmt: skip
_MATRICES = ("gate", "up", "down")
_ELEMENT = 4
"""Bytes of an element of all other weights (float32)."""


def flops_of(graph: Graph, op: DataflowOp) -> int:
    """Multiply-adds (two operations each) of the matrix products of an op; 0 for what has none."""
    if op.mnemonic in _PRODUCTS:
        rows = math.prod(op.operand_shape(0)[:-1])
        return sum(2 * rows * _elements(graph, op, name) for name in _PRODUCTS[op.mnemonic])
    if op.mnemonic in ("cached_attention", "attention"):
        b, h, s, d = op.operand_shape(0)
        keys, dv = op.operand_shape(1)[2], op.operand_shape(2)[3]
        return 2 * b * h * s * keys * (d + dv)
    if op.mnemonic == "latent_attention":
        b, h, s, _ = op.operand_shape(0)
        keys, width, rope = *op.operand_shape(1)[2:], op.operand_shape(2)[3]
        return 2 * b * h * s * keys * (2 * width + rope) + 2 * b * s * _elements(graph, op, "weight")
    if op.mnemonic == "matmul":
        return 2 * math.prod(op.result_shape()) * op.operand_shape(0)[-1]
    if op.mnemonic == "conv":
        return 2 * math.prod(op.result_shape()) * math.prod(op.operand_shape(1)[1:])
    if op.mnemonic == "moe":
        chosen = math.prod(op.operand_shape(1))
        return 2 * chosen * sum(_one_expert(graph, op, n) for n in _MATRICES if op.attr(n) is not None)
    return 0


def weight_bytes_of(graph: Graph, op: DataflowOp) -> int:
    """Bytes of weights that an op must read at least, as they are held."""
    if op.mnemonic in ("embed", "embed_at"):
        return 0 if not op.result_shape() else _ELEMENT * op.result_shape()[-1]
    if op.mnemonic == "rope_at":
        width: int = op.attr("rotary_dim")
        return _ELEMENT * op.operand_shape(0)[2] * width
    if op.mnemonic == "scale_at":
        axis: int = op.attr("axis")
        return _ELEMENT * op.operand_shape(0)[axis]
    if op.mnemonic == "moe":
        # all tokens may choose the same experts
        used = op.operand_shape(1)[-1]
        return used * sum(_bytes(graph, op, n) // _symbol(graph, op, n).shape[0] for n in op.weights())
    if op.mnemonic in ("constant", "load"):
        return 0
    return sum(_bytes(graph, op, name) for name in op.weights())


def _bytes(graph: Graph, op: DataflowOp, name: str) -> int:
    """Bytes of a weight as it is held: see `held`."""
    symbol = _symbol(graph, op, name)
    if op.mnemonic == "moe" and name in _MATRICES and is_serving(graph) and not op.attr("round_block"):
        return int(symbol.shape[0]) * row_bytes(symbol, op.attr(f"{name}_transposed"))
    if not is_serving(graph) or name not in _PRODUCTS.get(
        op.mnemonic, ("weight",) if op.mnemonic == "latent_attention" else ()
    ):
        return _ELEMENT * math.prod(symbol.shape)
    return row_bytes(symbol, op.attr("transposed" if name == "weight" else f"{name}_transposed"))


def _one_expert(graph: Graph, op: DataflowOp, name: str) -> int:
    """Elements of one expert's part of a stack."""
    return math.prod(_shape(graph, op, name)[1:])


def _symbol(graph: Graph, op: DataflowOp, name: str) -> WeightSymbol:
    found = graph.weight(op, name)
    assert found is not None
    return found


def _shape(graph: Graph, op: DataflowOp, name: str) -> tuple[int, ...]:
    return tuple(_symbol(graph, op, name).shape)


def _elements(graph: Graph, op: DataflowOp, name: str) -> int:
    return math.prod(_shape(graph, op, name))


def graph_flops(graph: Graph) -> int:
    """Multiply-add operations of one run of a static graph."""
    return sum(s.count * sum(flops_of(graph, op) for op in s.ops) for s in graph.sections())


def graph_weight_bytes(graph: Graph) -> int:
    """Weight bytes that one run of a static graph reads at least; a weight that two ops share counts once."""
    seen: dict[str, int] = {}
    rows = 0
    for section in graph.sections():
        for op in section.ops:
            whole = sum(_bytes(graph, op, n) for n in op.weights())
            if op.mnemonic in ("constant", "load") or weight_bytes_of(graph, op) < whole:
                rows += section.count * weight_bytes_of(graph, op)
                continue
            for name in op.weights():
                slot = op.attr(name)
                for symbol in section.table.get(slot, (slot,)):
                    seen[symbol] = _bytes(graph, op, name)
    return rows + sum(seen.values())
