"""`inspect`: the recognised structure of a graph, as plain data that can be written as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mapper.frontend.angles import Angles, angles
from mapper.frontend.left import RECOGNISED, cross_attentions, ends, primitives_left
from mapper.ir.dims import ONE
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type


def inspect(graph: Graph) -> dict[str, Any]:
    """What was recognised, ready for JSON. An attribute that is NaN or infinite is its name, as text."""
    record: dict[str, Any] = _finite(_inspected(graph))
    return record


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a model's attributes may have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return repr(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _inspected(graph: Graph) -> dict[str, Any]:
    """Layers, widths, heads, masks, rotary embeddings, norms, MLPs, cache convention, parameters, vocabulary,
    and what stays primitives. Keys whose value the graph does not tell are None or empty. A file that holds a
    graph per phase is described by the one that decodes, and by both under "phases"."""
    record = structure(graph)
    if graph.switch is not None and graph.switch.phases:
        record["kv_cache"]["merged"] = True
        record["phases"] = {name: structure(graph.phase(name)) for name in graph.switch.phases}
    return record


def structure(graph: Graph) -> dict[str, Any]:
    """What `inspect` says of one graph."""
    ops = list(walk(graph))
    by_kind: dict[str, list[Counted]] = {}
    for item in ops:
        by_kind.setdefault(item[0].mnemonic, []).append(item)
    crossing = cross_attentions(graph)
    heard = [(op, n) for kind in ATTENTIONS for op, n in by_kind.get(kind, [])]
    attention = [({**_attention(op), "cross": op in crossing}, n) for op, n in heard]
    mlps = [(_mlp(graph, op), n) for kind in _MLPS for op, n in by_kind.get(kind, [])]
    around = ends(graph)
    left = primitives_left(graph, around.ops)
    return {
        "name": graph.name,
        "params": graph.params,
        "layers": graph.layers - sum(n for op, n in heard if op in crossing),
        "distinct_layers": sum(op not in crossing for op, _ in heard),
        "hidden": _hidden(graph, by_kind),
        "vocab": _vocabulary(graph, by_kind),
        **_common(attention, ("heads", "kv_heads", "head_dim", "value_dim")),
        "attention": _counted(attention, _ATTENTION),
        "masks": _counted(attention, ("mask", "window")),
        "rope": _rope(graph, by_kind),
        "norms": _counted(
            [(_norm(op), n) for op, n in by_kind.get("norm", [])], ("kind", "eps", "weight_offset")
        ),
        "mlp": [_stated(m) for m in _counted(mlps, ("op", "act", "inner", "experts", "chosen"))],
        "kv_cache": _cache(graph, by_kind),
        "tied_embeddings": _tied(graph, by_kind),
        "ends": around.facts,
        "inputs": {n: _described(graph.roles["inputs"].get(n, "other"), t) for n, t in graph.inputs},
        "outputs": {n: _described(graph.roles["outputs"].get(n, "other"), t) for n, t in graph.outputs},
        "weight_formats": _formats(graph),
        "primitives_left": dict(sorted(left.items())),
        "recognised_fraction": _fraction(ops, left),
    }


ATTENTIONS = ("attention", "latent_attention")
_ATTENTION = (
    "kind", "heads", "kv_heads", "head_dim", "latent_dim", "rope_dim", "scale", "softcap", "sinks", "cross",
)  # fmt: skip
_MLPS = ("gated_mlp", "packed_mlp", "mlp", "moe")


def _formats(graph: Graph) -> dict[str, int]:
    """Storage format -> number of weights; a packed weight counts once, its parts not."""
    parts = {p.name for w in graph.weights.values() if w.packing for p in w.packing.parts.values()}
    counts = Counter(w.format for n, w in graph.weights.items() if n not in parts)
    return dict(sorted(counts.items()))


Counted = tuple[DataflowOp, int]
Facts = dict[str, Any]


def walk(graph: Graph) -> Iterator[Counted]:
    """(op, how often it is done) of every op, those of a repeat once."""
    for section in graph.sections():
        for op in section.ops:
            yield op, section.count


def _fraction(ops: list[Counted], left: Counter[str]) -> float:
    recognised = sum(n for op, n in ops if op.mnemonic in RECOGNISED)
    total = recognised + sum(left.values())
    return round(recognised / total, 4) if total else 0.0


def _attention(op: DataflowOp) -> Facts:
    q, k, v = (tensor_type(value) for value in op.operands[:3])
    heads, kv_heads = q.shape[1], k.shape[1]
    kind = "MHA" if heads == kv_heads else "MQA" if kv_heads.is_const and kv_heads.value == 1 else "GQA"
    latent = op.mnemonic == "latent_attention"
    kind = "MLA" if latent or _expanded(op.operands[1]) else kind
    causal, window = op.attr("causal"), op.attr("window")
    slopes = None if latent else op.attr("slopes")
    mask = "causal" if causal else "given" if op.operand("mask") is not None else "none"
    chunk = 0 if latent else op.attr("chunk")
    mask = "sliding" if window else "chunked" if chunk else mask
    return {
        "kind": kind,
        "heads": _number(heads),
        "kv_heads": _number(heads if latent else kv_heads),
        "head_dim": _number(q.shape[3]),
        "value_dim": _number(tensor_type(op.results[0]).shape[3]),
        "latent_dim": _number(k.shape[3]) if latent else None,
        "rope_dim": _number(v.shape[3]) if latent else None,
        "scale": _round(op.attr("scale")),
        "softcap": _round(op.attr("softcap")),
        "sinks": not latent and op.operand("sinks") is not None,
        "mask": mask + ("+alibi" if slopes else ""),
        "window": window or chunk,
    }


def _expanded(keys: Any) -> bool:
    """Whether keys, before they are appended, are columns of each head beside some that all share: latent
    attention whose cache holds the heads' keys and values."""
    op = keys.owner
    if isinstance(op, DataflowOp) and op.mnemonic == "kv_append":
        op = op.operands[1].owner
    if not isinstance(op, DataflowOp) or op.mnemonic != "concat" or op.attr("axis") != 3:
        return False
    parts = [v.owner for v in op.operands]
    shared = [p for p in parts if isinstance(p, DataflowOp) and p.mnemonic == "expand"]
    return any(tensor_type(p.operands[0]).shape[1:2] == (ONE,) for p in shared)


def _round(number: float) -> float:
    return float(f"{number:.7g}")


def _number(dim: Any) -> int | str:
    return dim.value if dim.is_const else str(dim)


def _norm(op: DataflowOp) -> Facts:
    return {"kind": op.attr("kind"), "eps": _round(op.attr("eps")), "weight_offset": op.attr("weight_offset")}


def _mlp(graph: Graph, op: DataflowOp) -> Facts:
    down = graph.weight(op, "down")
    transposed = op.attr("down_transposed")
    inner = None if down is None else down.shape[-1 if transposed else -2]
    routed = op.mnemonic == "moe" and down is not None
    experts = down.shape[0] if routed and down is not None else None
    chosen = _number(tensor_type(op.operands[1]).shape[-1]) if routed else None
    return {"op": op.mnemonic, "act": op.attr("act"), "inner": inner, "experts": experts, "chosen": chosen}


def _counted(items: list[tuple[Facts, int]], keys: tuple[str, ...]) -> list[Facts]:
    """The distinct items by `keys`, each with how often it occurs, in order of first occurrence."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for item, times in items:
        counts[tuple(item[k] for k in keys)] += times
    return [dict(zip(keys, values, strict=True), layers=n) for values, n in counts.items()]


def _stated(item: Facts) -> Facts:
    """An MLP without what only experts have, where it has none."""
    return {k: v for k, v in item.items() if k not in ("experts", "chosen") or v is not None}


def _common(items: list[tuple[Facts, int]], keys: tuple[str, ...]) -> Facts:
    """Per key the value of all items, or the list of distinct ones, or None."""
    out: Facts = {}
    for key in keys:
        values = list(dict.fromkeys(item[key] for item, _ in items))
        out[key] = values[0] if len(values) == 1 else values or None
    return out


def _hidden(graph: Graph, by_kind: dict[str, list[Any]]) -> int | None:
    for op, _ in by_kind.get("embed", []):
        table = graph.weight(op, "table")
        if table is not None:
            return table.shape[1]
    widths = [tensor_type(op.operands[0]).shape[-1] for op, _ in by_kind.get("norm", [])]
    return widths[0].value if widths and widths[0].is_const else None


def _vocabulary(graph: Graph, by_kind: dict[str, list[Any]]) -> int | None:
    for op, _ in by_kind.get("lm_head", []):
        width = tensor_type(op.results[0]).shape[-1]
        return width.value if width.is_const else None
    tables = [graph.weight(op, "table") for op, _ in by_kind.get("embed", [])]
    return max((t.shape[0] for t in tables if t is not None), default=None)


def _tied(graph: Graph, by_kind: dict[str, list[Any]]) -> bool | None:
    tables = {op.attr("table") for op, _ in by_kind.get("embed", [])}
    heads = [op.attr("weight") for op, _ in by_kind.get("lm_head", [])]
    return heads[0] in tables if heads else None


def _cache(graph: Graph, by_kind: dict[str, list[Any]]) -> dict[str, Any]:
    past = graph.inputs_with_role("past")
    cross = graph.inputs_with_role("past.cross_key") + graph.inputs_with_role("past.cross_value")
    convention = graph.roles.get("kv_convention", "inputs" if past else "none")
    return {
        "convention": convention,
        "operator": graph.roles.get("kv_operator", ""),
        "layout": graph.roles.get("kv_layout", ""),
        "tensors": len(past) - len(cross),
        "cross_tensors": len(cross),
    }


def _described(role: str, kind: Any) -> dict[str, Any]:
    return {"role": role, "dtype": kind.dtype, "shape": [_number(d) for d in kind.shape]}


def _rope(graph: Graph, by_kind: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Distinct rotary embeddings: style, width, and what the angles tell where they can be evaluated."""
    found: list[tuple[Facts, int]] = []
    known: dict[Any, Angles] = {}
    outside = _outside(graph)
    for op, times in by_kind.get("rope", []):
        cos, sin = (outside.get(v, v) for v in (op.operand("cos"), op.operand("sin")))
        key = (cos, sin, op.attr("style"), op.attr("rotary_dim"))
        if key not in known:
            known[key] = angles(graph, *key)
        told = known[key]
        keys: Facts = {"style": op.attr("style"), "rotary_dim": op.attr("rotary_dim")}
        keys |= {"theta": told.theta, "factor": told.magnitude}
        keys |= {"scaling": told.scaling, "stretch": told.stretch}
        found.append((keys, times))
    return _counted(found, ("style", "rotary_dim", "theta", "factor", "scaling", "stretch"))


def _outside(graph: Graph) -> dict[Any, Any]:
    """Argument inside a repeat -> the value outside that it stands for (in the first iteration)."""
    found: dict[Any, Any] = {}
    for section in graph.sections():
        found.update((shared.argument, shared.value) for shared in section.shared)
        found.update((slot.argument, slot.values[0]) for slot in section.inputs)
    return found
