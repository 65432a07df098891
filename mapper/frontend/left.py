"""What of the hidden path is recognised: what stays primitives, and what stands around the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.weights import decode

VIEWS = frozenset(
    {"reshape", "transpose", "slice", "concat", "split", "expand", "squeeze", "unsqueeze", "cast", "load"}
    | {"constant", "shape_of"}
)
RECOGNISED = frozenset(
    {"embed", "linear", "lm_head", "norm", "rope", "attention", "kv_append", "kv_update", "activation"}
    | {"mlp", "gated_mlp", "latent_attention", "packed_mlp", "moe", "route", "sample", "repeat"}
)
_SOURCES = frozenset({"embed", "embed_at", "linear", "conv"})
_BLOCKS = frozenset({"linear", "mlp", "gated_mlp", "packed_mlp", "moe", "norm"})
"""What makes the result of a block, before it is added to the hidden state."""
_TAIL = 8  # ops between the head and the logits


@dataclass
class Ends:
    """Facts of what stands before and after the layers, and the ops that they account for."""

    facts: dict[str, float] = field(default_factory=dict)
    ops: set[DataflowOp] = field(default_factory=set)


def hidden_ops(graph: Graph) -> Iterator[tuple[DataflowOp, int, set[SSAValue]]]:
    """(op, how often it is done, values on the hidden path so far) of every op on the hidden path."""
    data: set[SSAValue] = set()
    for section in graph.sections():
        data.update(c.argument for c in section.carried)
        data.update(s.argument for s in section.shared if s.value in data)
        data.update(s.argument for s in section.inputs if any(v in data for v in s.values))
        for op in section.ops:
            if op.mnemonic in _SOURCES or any(v in data for v in op.operands):
                data.update(op.results)
                yield op, section.count, data
        data.update(c.result for c in section.carried)
        data.update(r for o in section.outputs if o.yielded in data for r in o.results)


def cross_attentions(graph: Graph) -> set[DataflowOp]:
    """Attention ops whose queries come from the tokens and whose keys do not: they look at an encoder."""
    made: set[SSAValue] = {graph.input_values[n] for n in graph.inputs_with_role("token_ids")}
    found: set[DataflowOp] = set()
    if not made:
        return found
    for section in graph.sections():
        made.update(c.argument for c in section.carried if c.initial in made)
        made.update(s.argument for s in section.shared if s.value in made)
        made.update(s.argument for s in section.inputs if any(v in made for v in s.values))
        for op in section.ops:
            if op.mnemonic == "shape_of" or not any(v in made for v in op.operands):
                continue
            made.update(op.results)
            if op.mnemonic == "attention" and op.operands[0] in made and op.operands[1] not in made:
                found.add(op)
        made.update(c.result for c in section.carried if c.yielded in made)
        made.update(r for o in section.outputs if o.yielded in made for r in o.results)
    return found


def primitives_left(graph: Graph, accounted: set[DataflowOp]) -> Counter[str]:
    """Primitives on the hidden path that recognition left; views, residual additions and `accounted` ones are
    not counted."""
    found: Counter[str] = Counter()
    for op, count, data in hidden_ops(graph):
        if op.mnemonic in RECOGNISED or op.mnemonic in VIEWS or op in accounted:
            continue
        if op.mnemonic != "add" or not all(v in data for v in op.operands):
            found[op.mnemonic] += count
    return found


def ends(graph: Graph) -> Ends:
    """Scales and caps at the ends of the model, tables of positions that are added, patches of an image."""
    found = Ends()
    for name in graph.outputs_with_role("logits"):
        _tail(graph.output_values[name], found)
    for op, _, data in hidden_ops(graph):
        if op.mnemonic == "mul" and len(op.operands) == 2:
            _scaled(op, data, found)
        elif op.mnemonic in ("min", "max"):
            _clipped(op, found)
        elif op.mnemonic == "add":
            stored = [v for v in op.operands if v not in data and _is_stored(v)]
            if stored:  # of positions, or the bias of the patches
                found.ops.add(op)
        elif op.mnemonic == "conv" and not any(v in data for v in op.operands):
            found.facts["patch"] = float(tensor_type(op.operands[1]).shape[-1].value)
            found.ops.add(op)
    return found


def _scaled(op: DataflowOp, data: set[SSAValue], found: Ends) -> None:
    """Reads a scale of the embedding, of a norm per head, or of what a block adds to the hidden state."""
    stored = [_is_weight(v) for v in op.operands]
    scaled = op.operands[stored.index(False)] if any(stored) else _other(op)
    source, factor = _behind_views(scaled), _constant(op)
    if source is None or (factor is None and not any(stored)):
        return
    added = source.mnemonic in _BLOCKS and _is_added(op, data)
    if factor is not None and source.mnemonic == "embed":
        found.facts["embedding_scale"] = factor
    elif factor is not None and added:
        found.facts["residual_scale"] = float(f"{factor:.7g}")
    elif factor is not None or not (added or _is_bare_norm(source)):
        return
    found.ops.add(op)


def _clipped(op: DataflowOp, found: Ends) -> None:
    """Reads a symmetric clip of what a linear layer makes: min(max(x, -c), c), or the other way round."""
    inner, outer = _behind_views(_other(op)), _constant(op)
    if inner is None or outer is None or {inner.mnemonic, op.mnemonic} != {"min", "max"}:
        return
    source, bound = _behind_views(_other(inner)), _constant(inner)
    upper = outer if op.mnemonic == "min" else -outer
    if source is not None and source.mnemonic == "linear" and bound == -outer and upper > 0:
        found.facts["projection_clip"] = float(f"{upper:.7g}")
        found.ops |= {op, inner}


def _is_added(op: DataflowOp, data: set[SSAValue]) -> bool:
    """Whether the result is only added to the hidden state."""
    uses = [use.operation for use in op.results[0].uses]
    return len(uses) == 1 and (
        isinstance(uses[0], DataflowOp)
        and uses[0].mnemonic == "add"
        and all(v in data or v is op.results[0] for v in uses[0].operands)
    )


def _is_bare_norm(op: DataflowOp) -> bool:
    """Whether an op is a norm without a weight of its own."""
    return op.mnemonic == "norm" and op.attr("weight") is None


def _is_weight(value: SSAValue) -> bool:
    """Whether a value is a stored tensor as it is, behind views of the same elements."""
    source = _behind_views(value)
    return source is not None and source.mnemonic == "load"


def _tail(value: SSAValue, found: Ends) -> None:
    """Reads a scale or a soft cap between the head and the logits."""
    chain: list[DataflowOp] = []
    for _ in range(_TAIL):
        op = value.owner
        if not isinstance(op, DataflowOp) or op.mnemonic == "lm_head":
            break
        if op.mnemonic not in ("mul", "div", "tanh") and op.mnemonic not in VIEWS:
            return
        if op.mnemonic in ("mul", "div") and _constant(op) is None:
            return
        chain.append(op)
        value = _other(op) if op.mnemonic in ("mul", "div") else op.operands[0]
    owner = value.owner
    if not isinstance(owner, DataflowOp) or owner.mnemonic != "lm_head":
        return
    kinds = [op for op in chain if op.mnemonic not in VIEWS]
    caps = [i for i, op in enumerate(kinds) if op.mnemonic == "tanh"]
    if len(caps) > 1:
        return
    outer = _factor(kinds[: caps[0]] if caps else kinds)
    if caps:
        inner = _factor(kinds[caps[0] + 1 :])
        found.facts["logit_softcap"] = outer
        if abs(inner * outer - 1.0) > 1e-6:
            found.facts["logit_scale"] = inner * outer
    elif kinds:
        found.facts["logit_scale"] = outer
    found.ops.update(kinds)


def _factor(ops: list[DataflowOp]) -> float:
    product = 1.0
    for op in ops:
        number = _constant(op) or 1.0
        product *= number if op.mnemonic == "mul" else 1.0 / number
    return float(f"{product:.7g}")


def _constant(op: DataflowOp) -> float | None:
    """The number that an op combines its other operand with."""
    for value in op.operands[::-1]:
        owner = value.owner
        if isinstance(owner, DataflowOp) and owner.mnemonic == "constant":
            kind = tensor_type(value)
            numbers = decode(np.frombuffer(owner.attr("value"), np.uint8), kind.ints, kind.dtype)
            if numbers.size == 1:
                return float(numbers.reshape(-1)[0])
    return None


def _other(op: DataflowOp) -> SSAValue:
    first: Any = op.operands[0].owner
    plain = isinstance(first, DataflowOp) and first.mnemonic == "constant"
    return op.operands[1] if plain else op.operands[0]


def _behind_views(value: SSAValue) -> DataflowOp | None:
    owner = value.owner
    while isinstance(owner, DataflowOp) and owner.mnemonic in ("reshape", "cast", "transpose"):
        owner = owner.operands[0].owner
    return owner if isinstance(owner, DataflowOp) else None


def _is_stored(value: SSAValue) -> bool:
    """Whether a value is a stored tensor, or rows of one, behind views."""
    for _ in range(_TAIL):
        owner = value.owner
        if not isinstance(owner, DataflowOp):
            return False
        if owner.mnemonic == "load":
            return True
        if owner.mnemonic not in VIEWS | {"gather", "embed"} or not owner.operands:
            return owner.mnemonic == "embed"
        value = owner.operands[0]
    return False
