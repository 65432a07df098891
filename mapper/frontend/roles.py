"""What each input and output is, found by how the graph uses it: names are never read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mapper.frontend.caches import Cache, find_caches, origin
from mapper.frontend.net import Net, Node, Value, walk
from mapper.frontend.rewrite import topological
from mapper.frontend.symbols import lookups, strip_views, token_inputs
from mapper.ir.dims import Dim

_FEW_ROWS = 16  # a table with fewer rows holds segments, not positions


def find_roles(net: Net) -> dict[str, Any]:
    """{"inputs": {name: role}, "outputs": {name: role}, "kv_layout": ...} of a net, recognised or not."""
    nodes = topological(net)
    inputs = {v.source: "other" for v in net.inputs}
    outputs = {name: "other" for name, _ in net.outputs}
    tokens = token_inputs(net, nodes)
    for value in tokens:
        inputs[value.source] = "token_ids"
    caches = _caches(net, nodes)
    facts = _name_caches(caches, inputs, outputs) | _how_appended(net, caches)
    crossed = _crossed(net, nodes, tokens)
    _name_crossed(net, crossed, inputs, outputs)
    if not caches:
        outputs.update(_started(net, [n for n in nodes if n not in crossed]))
    for named in caches:
        if named.cache.beams is not None:
            inputs.update({v.source: "beam_index" for v in walk(named.cache.beams, _never) if v.source})
    inputs.update(net.caches.steering)
    for _, length, _, _ in net.caches.asked:
        told = [v for v in walk(length, _never) if v.source and v.rank <= 1]
        inputs.update({v.source: "total_length" for v in told if inputs[v.source] == "other"})
    total = Dim.symbol("sequence") + (Dim.symbol("past") if caches else 0)
    used = {id(v) for n in nodes for v in n.inputs}
    for value in net.inputs:
        if inputs[value.source] == "other" and value.dims and id(value) in used:
            inputs[value.source] = _steering(nodes, value, total, bool(caches))
    given = used | {id(v) for _, v in net.outputs}
    inputs.update(
        {v.source: "unused" for v in net.inputs if inputs[v.source] == "other" and id(v) not in given}
    )
    vocabulary = {table.dims[0] for table, ids in lookups(nodes) if strip_views(ids) in tokens}
    for name, value in net.outputs:
        if outputs[name] == "other" and value.rank >= 2 and value.dtype[0] in "fb" and value.const is None:
            outputs[name] = "logits" if value.dims[-1] in vocabulary else "hidden"
    roles: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
    return {**roles, **facts}


def _name_caches(caches: Sequence[Named], inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
    """Sets the roles of the caches' inputs and outputs; their layouts, and a table of where each one is."""
    if not caches:
        return {}
    layouts: dict[str, str] = {}
    for roles, prefix, place in ((inputs, "past", _input_name), (outputs, "present", _output_name)):
        held: dict[str, list[Named]] = {}
        for named in caches:
            held.setdefault(place(named), []).append(named)
        for name, group in held.items():
            roles[name] = f"{prefix}.{stack_name(group)}"
            if prefix == "past":
                layouts[name] = layout_of(group)
    ordered = [layouts[_input_name(n)] for n in sorted(caches, key=lambda n: n.kind)]
    return {"kv_layout": "/".join(dict.fromkeys(ordered)), **_table(caches, layouts)}


def _table(caches: Sequence[Named], layouts: Mapping[str, str]) -> dict[str, Any]:
    """Where every cache is, for graphs whose caches are not all inputs [B, H, past, D] of their own."""
    plain = all(n.cache.grows and not n.cache.rolls and not n.cache.slot for n in caches)
    if plain and set(layouts.values()) == {"BHLD"}:
        return {}
    table = {}
    for named in caches:
        cache = named.cache
        dims = cache.source.dims
        layout = layouts[_input_name(named)]
        rows = dims[cache.layout.index("L")] if "L" in cache.layout else ""
        table[f"{named.kind}.{named.layer}"] = {
            "input": _input_name(named),
            "output": cache.output,
            "slot": ",".join(map(str, cache.slot)),
            "layout": layout,
            "rows": str(rows),
            "heads": str(cache.node.outputs[0].dims[1]) if cache.node.outputs[0].rank == 4 else "",
        }
    return {"caches": table}


def _how_appended(net: Net, caches: Sequence[Named]) -> dict[str, str]:
    """The convention of the caches (see the frontend's README) and the ONNX operator that adds new rows."""
    if not caches:
        return {}
    operators = {net.caches.spelled.get(n.cache.node.origin, "") for n in caches} - {""}
    if any(n.cache.slot for n in caches):
        convention = "stacked"
    elif all(n.cache.grows for n in caches):
        convention = "rolling" if any(n.cache.rolls for n in caches) else "concat"
    elif operators == {"TensorScatter"}:
        convention = "tensor_scatter"
    else:
        plain = operators and operators <= {"ScatterND", "ScatterElements"}
        convention = "static" if plain else "shared_buffer"
    return {"kv_convention": convention, "kv_operator": "/".join(sorted(operators))}


def _crossed(net: Net, nodes: Sequence[Node], tokens: Sequence[Value]) -> list[Node]:
    """The attention layers whose keys do not depend on the tokens: cross attention."""
    known = {id(v) for v in tokens}
    for node in nodes:
        if any(id(v) in known for v in node.inputs):
            known.update(id(o) for o in node.outputs)
    return [n for n in nodes if n.op == "attention" and tokens and id(_operand(n, "k")) not in known]


def _operand(node: Node, slot: str) -> Value:
    index: int = node.attrs["slots"].index(slot)
    return node.inputs[index]


def _name_crossed(net: Net, layers: Sequence[Node], inputs: dict[str, str], outputs: dict[str, str]) -> None:
    """Sets the roles of keys and values of cross attention that are given, or made to be given next time."""
    names: dict[int, list[str]] = {}
    for name, value in net.outputs:
        names.setdefault(id(value), []).append(name)
    for i, node in enumerate(layers):
        if "mask" in node.attrs["slots"]:
            inputs.update({n: "encoder_mask" for n in _sources(_operand(node, "mask"), inputs, 2)})
        for kind in ("key", "value"):
            value = _operand(node, kind[0])
            found = origin(value, ("B", "H", "L", "D"))
            if found is not None and inputs[found.source.source] == "other":
                inputs[found.source.source] = f"past.cross_{kind}.{i}"
            else:
                inputs.update({n: "encoder_states" for n in _sources(value, inputs, 3)})
            made = names.get(id(value), []) + (names.get(id(found.source), []) if found else [])
            outputs.update((name, f"present.cross_{kind}.{i}") for name in made)


def _sources(value: Value, inputs: Mapping[str, str], rank: int) -> list[str]:
    """The inputs of a rank, without a role yet, that a value is computed from."""
    found = [v for v in walk(value, lambda v: v.node is None) if v.source and v.rank == rank]
    return [v.source for v in found if inputs[v.source] == "other"]


def _started(net: Net, nodes: Sequence[Node]) -> dict[str, str]:
    """Output name -> role of the keys and values of attention layers that begin a cache."""
    names = {id(v): name for name, v in net.outputs}
    attention = [n for n in nodes if n.op == "attention"]
    found: dict[str, str] = {}
    for kind in ("key", "value"):
        made = [names.get(id(_operand(n, kind[0]))) for n in attention]
        found.update((n, f"present.{kind}.{i}") for i, n in enumerate(n for n in made if n is not None))
    return found


def _never(value: Value) -> bool:
    return value.dtype[0] == "f"


def _input_name(named: Named) -> str:
    return named.cache.source.source


def _output_name(named: Named) -> str:
    return named.cache.output


@dataclass(frozen=True)
class Named:
    """A cache with what it is: "key" or "value", and its layer."""

    cache: Cache
    kind: str
    layer: int


def _caches(net: Net, nodes: Sequence[Node]) -> list[Named]:
    """Every cache with its name, in the order of the appends."""
    users: dict[int, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            users.setdefault(id(value), []).append(node)
    found = find_caches(net, nodes)
    if any("slots" in n.attrs for n in nodes):  # what recognition did not confirm may write anything anywhere
        found = [c for c in found if not c.node.op.startswith("scatter")]
    kinds = ["value" if _is_value(users, c.node.outputs[0]) else "key" for c in found]
    return _numbered(net, list(zip(found, kinds, strict=True)))


def _numbered(net: Net, found: list[tuple[Cache, str]]) -> list[Named]:
    """The caches with their layer. Latent caches, which feed keys and values alike, come in pairs per layer:
    the first input of a pair counts as the key."""
    if len(found) % 2 == 0 and not any(kind == "value" for _, kind in found):
        order = {id(v): i for i, v in enumerate(net.inputs)}
        caches = [c for c, _ in found]
        pairs = [
            sorted(caches[i : i + 2], key=lambda c: (order[id(c.source)], c.slot))
            for i in range(0, len(caches), 2)
        ]
        found = [(c, ("key", "value")[i]) for pair in pairs for i, c in enumerate(pair)]
    counts = {"key": 0, "value": 0}
    out = []
    for cache, kind in found:
        out.append(Named(cache, kind, counts[kind]))
        counts[kind] += 1
    return out


def stack_name(held: Sequence[Named]) -> str:
    """The role of an input that holds some caches: "key.3", "kv.3" for both of a layer, "key" or "kv" for
    those of several layers."""
    kinds, layers = {n.kind for n in held}, {n.layer for n in held}
    kind = kinds.pop() if len(kinds) == 1 else "kv"
    return f"{kind}.{layers.pop()}" if len(layers) == 1 else kind


def layout_of(held: Sequence[Named]) -> str:
    """The layout of an input that holds some caches, its stacking axes named N (layers) and 2 (key and
    value)."""
    letters, at = [], 0
    for letter in held[0].cache.layout:
        if letter == "#":
            index = at
            splits = {n.kind: n.cache.slot[index] for n in held}
            same = all(splits[n.kind] == n.cache.slot[index] for n in held)
            letter = "2" if same and len(set(splits.values())) == 2 else "N"
            at += 1
        letters.append(letter)
    return "".join(letters)


def _is_value(users: dict[int, list[Node]], cache: Value) -> bool:
    """Whether the cache is multiplied with the result of a softmax, rather than with queries."""
    stack, seen = [cache], {id(cache)}
    while stack:
        value = stack.pop()
        for node in users.get(id(value), []):
            if node.op == "attention":
                return node.inputs[node.attrs["slots"].index("v")] is value
            if node.op == "matmul":
                return node.inputs[1] is value and _from_softmax(node.inputs[0])
            if (
                node.op in ("reshape", "transpose", "expand", "cast", "mul", "slice")
                and id(node.outputs[0]) not in seen
            ):
                seen.add(id(node.outputs[0]))
                stack.append(node.outputs[0])
    return False


def _from_softmax(value: Value) -> bool:
    for _ in range(6):
        if value.op == "softmax":
            return True
        if value.op in ("cast", "reshape", "slice"):
            value = value.args[0]
        elif value.op == "select":
            value = next((v for v in value.args[1:] if v.const is None), value.args[1])
        else:
            return False
    return False


def _steering(nodes: Sequence[Node], value: Value, total: Dim, cached: bool) -> str:
    """The role of an input that is neither tokens nor cache: mask, positions, or other."""
    reached = _reached(nodes, value)
    placed = "rope" in reached or "trigonometry" in reached or "table" in reached
    integer = value.dtype in ("i64", "i32")
    if (
        value.dims[-1] == total
        and (cached or "mask" in reached)
        and (not placed or cached)
        and value.dtype != "i8"
    ):
        return "attention_mask" if "mask" in reached or value.rank == 2 else "other"
    if integer and placed and value.dims[-1] == Dim.symbol("sequence"):
        return "position_ids" if value.rank == 2 else "cache_position"
    if "mask" in reached and not integer and value.rank >= 2:
        return "attention_mask"
    if integer and value.rank == 1 and "mask" in reached:
        return "cache_position"
    return "other"


def _reached(nodes: Sequence[Node], start: Value) -> set[str]:
    """Where an input's influence arrives before it meets the hidden state."""
    known, found = {id(start)}, set()
    for node in nodes:
        if not any(id(v) in known for v in node.inputs):
            continue
        if "slots" in node.attrs:
            for slot, value in zip(node.attrs["slots"], node.inputs, strict=True):
                if id(value) in known:
                    label = {"mask": "mask", "cos": "rope", "sin": "rope"}.get(slot, "")
                    found.add(
                        "table" if slot == "ids" and node.inputs[1].dims[0].value > _FEW_ROWS else label
                    )
            continue
        if node.op == "softmax":
            found.add("mask")
            continue
        if (
            node.op == "gather"
            and node.inputs[0].weight is not None
            and node.inputs[0].dims[0].value > _FEW_ROWS
        ):
            found.add("table")
            continue
        if node.op in ("cos", "sin"):
            found.add("trigonometry")
        known.update(id(o) for o in node.outputs)
    return found
