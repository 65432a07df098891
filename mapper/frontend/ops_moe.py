"""Lowerings of onnxruntime's fused mixtures of experts, each spelled as look-ups and products.

Semantics: the operators' own documentation (com.microsoft MoE and QMoE, version 1); what it leaves open
follows onnxruntime's CPU kernels as observed: gelu is the tanh form, routing weights are the softmax over all
experts, or over the chosen ones with normalize_routing_weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mapper.errors import ModelError
from mapper.frontend import build as b
from mapper.frontend.lower import MS, Call, lowers
from mapper.frontend.net import Value
from mapper.frontend.ops_nn import gelu_tanh, part, plus, silu
from mapper.frontend.packed import packed_weight
from mapper.ir.dims import ONE, Dim
from mapper.lowbit import Scheme


@dataclass(frozen=True)
class Stacks:
    """The experts' matrices [E, out, in] and biases [E, out]; `block`: activations are rounded in blocks."""

    first: Value
    second: Value
    third: Value | None
    biases: tuple[Value | None, Value | None, Value | None]
    block: int = 0


@dataclass(frozen=True)
class Chosen:
    """The experts' numbers [N * k] and shares [N, k], with the number of tokens and k."""

    index: Value
    share: Value
    tokens: Dim
    count: int


@lowers("MoE", domain=MS)
def _moe(c: Call) -> list[Value]:
    """Operands: x, router logits, fc1, its bias, fc2, its bias, fc3, its bias."""
    given = [c.x(i) if c.has(i) else None for i in range(8)]
    third = given[6]
    return [_mixture(c, Stacks(c.x(2), c.x(4), third, (given[3], given[5], given[7])), None)]


@lowers("QMoE", domain=MS)
def _quantised(c: Call) -> list[Value]:
    """Operands: x, router logits; weights, scales and bias of fc1, fc2, fc3; three zero points; shares."""
    if c.text("quant_type", "int") != "int":
        raise c.refuse(f"experts quantised as {c.text('quant_type', '')[:20]!r} are not supported")
    if any(c.has(i) for i in range(15, 21)):
        raise c.refuse("global scales and activation scales are not supported")
    block = c.integer("block_size") if c.integer("block_size") > 0 else 0
    matrices = [_stack(c, i, block) for i in range(3)]
    first, second = matrices[0], matrices[1]
    if first is None or second is None:
        raise ModelError(f"{c.net.origin}: lacks the weights of its experts")
    biases = tuple(c.x(i) if c.has(i) else None for i in (4, 7, 10))
    # 8-bit blocks have no kernel with float activations; with 4-bit ones accuracy level 4 asks for it
    rounds = block and (_bits(c, 0) == 8 or c.integer("accuracy_level") == 4)
    stacks = Stacks(first, second, matrices[2], (biases[0], biases[1], biases[2]), block if rounds else 0)
    return [_mixture(c, stacks, c.x(14) if c.has(14) else None)]


def _bits(c: Call, number: int) -> int:
    whole = c.integer("expert_weight_bits", 4)
    return c.integer(f"fc{number + 1}_expert_weight_bits", whole)


def _stack(c: Call, number: int, block: int) -> Value | None:
    """The matrices of one layer of the experts, [E, out, in], None where they are absent."""
    at = 2 + 3 * number
    if not c.has(at):
        return None
    bits, packed = _bits(c, number), c.x(at)
    if bits not in (2, 4, 8) or not c.has(at + 1) or packed.rank != 3:
        raise c.refuse(f"experts of {bits}-bit integers of rank {packed.rank} without scales or of that size")
    experts, rows, size = (d.value for d in packed.dims)
    zeros = c.x(11 + number) if c.has(11 + number) else None
    shape = (experts, rows, size * 8 // bits)
    found = packed_weight(Scheme(bits, block), shape, c.x(0).dtype, packed, c.x(at + 1), zeros)
    if found is None:
        raise c.refuse("experts that are computed are not supported")
    return found


def _routed(c: Call, weights: Value | None) -> Chosen:
    net, logits, count = c.net, c.x(1), c.integer("k", 1)
    if logits.rank != 2 or count < 1 or c.integer("use_sparse_mixer"):
        raise c.refuse("router scores that are not [tokens, experts], or a sparse mixer, are not supported")
    normalise = bool(c.integer("normalize_routing_weights"))
    scores = logits
    if weights is None and not normalise:
        scores = net.make("softmax", [logits], {"axis": 1})
    values, index = net.many("topk", [scores], {"k": count, "axis": 1, "largest": True})
    share = values
    if weights is not None:
        share = net.make("gather_elements", [weights, index], {"axis": 1})
        if normalise:
            share = b.binary(net, "div", share, b.reduce(net, "sum", share, [1], True))
    elif normalise:
        share = net.make("softmax", [values], {"axis": 1})
    flat = b.reshape(net, index, [logits.dims[0] * count])
    return Chosen(flat, share, logits.dims[0], count)


def _product(c: Call, x: Value, stack: Value, bias: Value | None, chosen: Chosen, block: int) -> Value:
    """x [N * k, in] times each row's own matrix: [N * k, out]."""
    net = c.net
    x = net.make("round_blocks", [x], {"block": block}) if block else x
    matrices = b.gather(net, stack, chosen.index, 0)
    column = b.reshape(net, x, [*x.dims, ONE])
    y = b.reshape(net, b.matmul(net, matrices, column), [x.dims[0], stack.dims[1]])
    return y if bias is None else b.binary(net, "add", y, b.gather(net, bias, chosen.index, 0))


def _mixture(c: Call, stacks: Stacks, weights: Value | None) -> Value:
    net, x = c.net, c.x(0)
    chosen = _routed(c, weights)
    width, rows = x.dims[-1], chosen.tokens * chosen.count
    each = b.reshape(net, x, [chosen.tokens, ONE, width])
    each = b.reshape(net, b.expand(net, each, [chosen.tokens, Dim.of(chosen.count), width]), [rows, width])
    hidden = _hidden(c, each, stacks, chosen)
    out = _product(c, hidden, stacks.second, stacks.biases[1], chosen, stacks.block)
    out = b.binary(net, "mul", out, b.reshape(net, chosen.share, [rows, ONE]))
    out = b.reshape(net, out, [chosen.tokens, Dim.of(chosen.count), out.dims[1]])
    return b.reshape(net, b.reduce(net, "sum", out, [1], False), [*x.dims[:-1], out.dims[2]])


def _hidden(c: Call, x: Value, stacks: Stacks, chosen: Chosen) -> Value:
    net, kind, fusion = c.net, c.text("activation_type", "relu"), c.integer("swiglu_fusion")
    first = _product(c, x, stacks.first, stacks.biases[0], chosen, stacks.block)
    if kind in ("swiglu", "geglu"):
        if c.integer("swiglu_limit_after_activation"):
            raise c.refuse("a clamp after the activation is not supported")
        return _gated(c, kind, _gate_and_up(c, x, first, stacks, chosen, fusion))
    plain = {
        "relu": lambda: b.unary(net, "relu", first),
        "gelu": lambda: gelu_tanh(net, first),
        "silu": lambda: silu(net, first),
        "identity": lambda: first,
    }
    if kind not in plain:
        raise c.refuse(f"the activation {kind[:20]!r} is not supported")
    if stacks.third is None:
        return plain[kind]()
    up = _product(c, x, stacks.third, stacks.biases[2], chosen, stacks.block)
    return b.binary(net, "mul", plain[kind](), up)


def _gate_and_up(
    c: Call, x: Value, first: Value, stacks: Stacks, chosen: Chosen, fusion: int
) -> tuple[Value, Value]:
    if fusion == 0 and stacks.third is not None:
        return first, _product(c, x, stacks.third, stacks.biases[2], chosen, stacks.block)
    width = first.dims[1].value
    if fusion == 1:
        return part(c.net, first, 0, width, 2), part(c.net, first, 1, width, 2)
    if fusion == 2:
        return part(c.net, first, 0, width // 2), part(c.net, first, width // 2, width)
    raise c.refuse(f"gate and up in layout {fusion} are not supported")


def _gated(c: Call, kind: str, parts: tuple[Value, Value]) -> Value:
    net, (gate, up) = c.net, parts
    if kind == "geglu":
        return b.binary(net, "mul", gelu_tanh(net, gate), up)
    limit = c.number("swiglu_limit", math.inf)
    if math.isfinite(limit):
        high, low = net.scalar(limit, gate), net.scalar(-limit, gate)
        gate = b.binary(net, "min", gate, high)
        up = b.binary(net, "min", b.binary(net, "max", up, low), high)
    act = silu(net, gate, c.number("activation_alpha", 1.0))
    return b.binary(net, "mul", act, plus(net, up, c.number("activation_beta", 0.0)))
