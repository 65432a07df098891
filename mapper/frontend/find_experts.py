"""Recognises routed experts: products with stored matrices that were looked up by a router's choice.

Anchored on look-ups of stacks [E, ., .] at a top-k index; what happens between the products (packing of gate
and up, clamps, activation, shares) is found by trying the few forms there are, each verified numerically.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product as combinations
from typing import Any

import numpy as np

from mapper.errors import ModelError
from mapper.frontend import build
from mapper.frontend.agree import MAX_ELEMENTS, Checker, sizes_for, volume
from mapper.frontend.cut import View, numbers_in, region_of
from mapper.frontend.find_linear import KINDS
from mapper.frontend.net import Node, Value, walk
from mapper.frontend.resize import resized, small_widths
from mapper.frontend.rewrite import Match
from mapper.ir.dims import ONE, Dim

_VIEWS = frozenset(["reshape", "expand", "transpose", "cast", "slice", "gather", "round_blocks"])
_STEPS = 24  # nodes between two products, or from the last one to the sum


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product of `other` with looked-up matrices of `stack`, [E, out, in] where `transposed`."""

    node: Node
    other: Value
    stack: Value
    transposed: bool
    bias: Value | None = None


@dataclass(eq=False)
class Group:
    """All products whose matrices one index chose."""

    index: Value
    products: list[Product] = field(default_factory=list)


def experts(view: View, checker: Checker) -> list[Match]:
    """The share-weighted sum of chosen experts, once per choice."""
    found = []
    for group in _groups(view):
        match = _experts(view, checker, group)
        if match is not None:
            found.append(match)
    return found


def stack_of(value: Value, rank: int) -> tuple[Value, bool] | None:
    """(stored stack of that rank, whether its last two axes are exchanged) behind a value."""
    if value.weight is not None and value.rank == rank:
        return value, False
    if value.op == "transpose" and value.node and value.args[0].weight is not None and value.rank == rank:
        exchanged = (*range(rank - 2), rank - 1, rank - 2)
        return (value.args[0], True) if value.node.attrs["perm"] == exchanged else None
    return None


def index_root(value: Value) -> Value:
    """The integers behind views and casts between integer types."""
    while value.op in ("reshape", "cast") and value.dtype[0] in "iu":
        value = value.args[0]
    return value


def _looked_up(value: Value) -> tuple[Value, bool, Value] | None:
    """(stack, exchanged, index root) of a value that is rows of a stack, also behind an exchange of axes."""
    turned = False
    while value.op in ("reshape", "cast", "transpose") and value.node:
        if value.op == "transpose":
            last = value.rank - 1
            if value.node.attrs["perm"] != (*range(last - 1), last, last - 1):
                return None
            turned = not turned
        elif value.op == "reshape" and value.dims[-2:] != value.args[0].dims[-2:]:
            return None
        value = value.args[0]
    if value.op != "gather" or value.node is None or value.node.attrs["axis"]:
        return None
    stored = stack_of(value.args[0], 3)
    return None if stored is None else (stored[0], stored[1] != turned, index_root(value.args[1]))


def _groups(view: View) -> list[Group]:
    groups: dict[int, Group] = {}
    for node in view.nodes:
        if node.op != "matmul":
            continue
        for side in (0, 1):
            found = _looked_up(node.inputs[side])
            if found is None or found[2].op not in ("topk", "argmax"):
                continue
            stack, exchanged, index = found
            # from the left, a matrix [in, out] would have to be [out, in]
            item = Product(node, node.inputs[1 - side], stack, exchanged != (side == 0))
            groups.setdefault(id(index), Group(index)).products.append(item)
            break
    return list(groups.values())


def _experts(view: View, checker: Checker, group: Group) -> Match | None:
    made = {id(p.node.outputs[0]): p for p in group.products}
    reached = {
        id(p): [made[id(v)] for v in walk(p.other, _ends(group, made)) if id(v) in made]
        for p in group.products
    }
    first = [p for p in group.products if not reached[id(p)]]
    last = [p for p in group.products if reached[id(p)]]
    if len(last) != 1 or not 1 <= len(first) <= 2 or len(group.products) > 3:
        return None
    roots = {id(v): v for v in (_input_root(view, group, p.other) for p in first)}
    if len(roots) != 1:
        return None
    x = next(iter(roots.values()))
    for out in _results(view, last[0]):
        share = _share(out, group.index, x)
        if share is not None:
            match = _fitted(view, checker, group, first, last[0], (out, x, share))
            if match is not None:
                return match
    return None


def _ends(group: Group, made: Mapping[int, Product]) -> Any:
    return lambda v: v is group.index or id(v) in made or v.node is None


def _input_root(view: View, group: Group, value: Value) -> Value:
    """The hidden state behind views of it, repetitions of tokens, and a multiplication with the shares."""
    while value.node is not None:
        if value.op in _VIEWS and view.is_data(value.args[0]):
            if value.op == "gather" and view.is_data(value.args[1]):
                break
            value = value.args[0]
        elif value.op == "mul":
            wide = [v for v in value.args if _width(v) == _width(value) or v.dims == value.dims]
            if len(wide) != 1:
                break
            value = wide[0]
        else:
            break
    return value


def _width(value: Value) -> Dim | None:
    """The last dimension that is not one."""
    return next((d for d in reversed(value.dims) if d != ONE), None)


def _results(view: View, last: Product) -> Iterator[Value]:
    """Values after the last product that may be the sum over the chosen experts, nearest first."""
    value, width = last.node.outputs[0], _width(last.node.outputs[0])
    for _ in range(_STEPS):
        node = view.sole_reader(value)
        if node is None or node.op not in (
            "reshape",
            "cast",
            "transpose",
            "add",
            "mul",
            "matmul",
            "reduce",
            "slice",
        ):
            return
        value = node.outputs[0]
        if (
            node.op in ("reduce", "matmul", "mul", "reshape")
            and value.dims[-1:] == (width,)
            and value.rank > 1
        ):
            yield value


def _share(out: Value, index: Value, x: Value) -> Value | None:
    """The one value of the index's shape that the result is made with."""
    found: dict[int, Value] = {}

    def ends(value: Value) -> bool:
        fits = (
            value.dims == index.dims
            and value.dtype[0] in "fb"
            and value.dtype != "bool"
            and value.node is not None
        )
        if fits:
            found[id(value)] = value
        return fits or value is index or value is x or value.node is None

    for _ in walk(out, ends):
        pass
    return next(iter(found.values())) if len(found) == 1 else None


def _fitted(
    view: View,
    checker: Checker,
    group: Group,
    first: list[Product],
    last: Product,
    ends: tuple[Value, Value, Value],
) -> Match | None:
    out, x, share = ends
    net, index = view.net, group.index
    tokens = index.dims[:-1]
    rows = build.reshape(net, x, (*tokens, x.dims[-1])) if x.dims[:-1] != tokens else x
    if out.dims != (*tokens, out.dims[-1]):
        return None
    region = region_of([out], [x, index, share])
    biases = _biases(region, index)
    for attrs, names in _forms(region, first, last, biases):
        slots = {"x": rows, "index": index, "share": share, **names}
        match = Match(
            out, "moe", tuple(slots), tuple(slots.values()), attrs, (x, index, share, *_stored(slots))
        )
        widths = _widths(rows, names, attrs)
        if checker.holds(match, None, None, widths, _operands(match, slots, widths)):
            return match
    return None


def _stored(slots: Mapping[str, Value]) -> list[Value]:
    return [v for n, v in slots.items() if n not in ("x", "index", "share")]


def _biases(region: list[Node], index: Value) -> list[Value]:
    """Stored [E, width] vectors that the index looks up."""
    found: dict[int, Value] = {}
    for node in region:
        if node.op == "gather" and not node.attrs["axis"] and index_root(node.inputs[1]) is index:
            stored = stack_of(node.inputs[0], 2)
            if stored is not None and not stored[1]:
                found[id(stored[0])] = stored[0]
    return list(found.values())


def _forms(
    region: list[Node], first: list[Product], last: Product, biases: list[Value]
) -> Iterator[tuple[dict[str, Any], dict[str, Value]]]:
    """(attributes, weights by slot) of every form that the parts of a region could have."""
    acts = [n.attrs["kind"] for n in region if n.op == "activation"]
    acts += [k for n in region if n.op in KINDS for k in KINDS[n.op]] + ["identity"]
    limits = [0.0, *(abs(v) for v in numbers_in(region, "min") if v)]
    offsets = [0.0, *(v for v in numbers_in(region, "add") if v)]
    inputs = [False, True]
    orders = [first] if len(first) == 1 else [first, first[::-1]]
    packings = ["none"] if len(first) == 2 else ["halves", "interleaved", "none"]
    blocks = {n.attrs["block"] for n in region if n.op == "round_blocks"}
    rounding = {"round_block": blocks.pop()} if len(blocks) == 1 else {}
    options = (dict.fromkeys(acts), dict.fromkeys(limits), dict.fromkeys(offsets))
    for order, packing, share_input in combinations(orders, packings, inputs):
        names = _weights(order, last, biases, packing)
        if names is None:
            continue
        for act, limit, offset in combinations(*options):
            attrs: dict[str, Any] = {f"{n}_transposed": p.transposed for n, p in _named(order, last).items()}
            attrs |= {"act": act, "packing": packing, "share_input": share_input}
            yield attrs | {"limit": limit, "up_offset": offset} | rounding, names


def _named(order: list[Product], last: Product) -> dict[str, Product]:
    return dict(zip(("gate", "up") if len(order) == 2 else ("up",), order, strict=True)) | {"down": last}


def _weights(
    order: list[Product], last: Product, biases: list[Value], packing: str
) -> dict[str, Value] | None:
    """Slot -> stored stack; biases go by their width, where that is equal in the order of meeting them."""
    inner = last.stack.dims[2 if last.transposed else 1]
    wide = order[-1].stack.dims[1 if order[-1].transposed else 2]
    if wide != (inner if packing == "none" else inner * 2):
        return None
    names = {n: p.stack for n, p in _named(order, last).items()}
    left = list(biases)
    for name in [n for n in ("down", "up", "gate") if n in names]:
        wanted = names[name].dims[1 if _named(order, last)[name].transposed else 2]
        own = [b for b in left if b.dims[1] == wanted]
        if own:
            names[f"{name}_bias"] = own[0]
            left.remove(own[0])
    return None if left else names


def _widths(x: Value, names: Mapping[str, Value], attrs: Mapping[str, Any]) -> dict[int, int]:
    model, stack = x.dims[-1], names["down"].dims
    inner = stack[2 if attrs["down_transposed"] else 1]
    return small_widths(inner.value, model.value) if model.is_const else {}


def _operands(match: Match, slots: Mapping[str, Value], widths: Mapping[int, int]) -> Any:
    """Operands for the comparison: all experts, hidden states large enough to reach a clamp."""
    experts_there = slots["up"].dims[0].value

    def draw(sizes: Mapping[str, int]) -> dict[int, Any]:
        rng = np.random.default_rng(3)
        env = sizes_for(match.inputs, [], sizes)
        shapes = {id(v): [resized(d, widths).evaluate(env) for d in v.dims] for v in match.bounds[:2]}
        x, index = match.bounds[:2]
        rows = volume(shapes[id(index)][:-1])
        if max(rows * experts_there, volume(shapes[id(x)])) > MAX_ELEMENTS:
            raise ModelError("the operands are too large for a comparison")
        chosen = rng.random((rows, experts_there)).argsort(-1)
        count = shapes[id(index)][-1]
        return {
            id(x): 4.0 * rng.standard_normal(shapes[id(x)]),
            id(index): chosen[:, :count].reshape(shapes[id(index)]),
        }

    return draw
