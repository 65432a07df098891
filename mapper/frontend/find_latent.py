"""Recognises multi-head latent attention: attention whose keys and values are one product of cached rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper.frontend import build
from mapper.frontend.agree import Checker, random_array, sizes_for
from mapper.frontend.cut import View
from mapper.frontend.net import Net, Node, Value
from mapper.frontend.resize import LARGE
from mapper.frontend.rewrite import Match
from mapper.ir.dims import ONE, ZERO, Dim

_SMALL = 6  # stand-in width of latent rows


@dataclass(frozen=True, eq=False)
class Parts:
    """What keys and values are made of: the product, how its result is split, the part all heads share."""

    product: Node
    nope: Dim
    rope_key: Value


def latents(view: View, checker: Checker) -> list[Match]:
    """Attention over rows that a stored matrix expands to keys and values of all heads."""
    found = []
    for node in view.nodes:
        if node.op == "attention":
            match = _latent(view, node)
            if match is not None and checker.holds(match, _shapes(match), draw=_operands(match)):
                found.append(match)
    return found


def _latent(view: View, node: Node) -> Match | None:
    slots = dict(zip(node.attrs["slots"], node.inputs, strict=True))
    parts = _parts(slots["k"])
    if parts is None or "sinks" in slots or not _is_rest(slots["v"], parts) or "slopes" in node.attrs:
        return None
    product = dict(zip(parts.product.attrs["slots"], parts.product.inputs, strict=True))
    if "bias" in product:
        return None
    latent, rope_key = _rows(view.net, product["x"]), _rows(view.net, parts.rope_key)
    if latent is None or rope_key is None:
        return None
    operands = {"q": slots["q"], "latent": latent, "rope_key": rope_key}
    operands |= {"mask": slots["mask"]} if "mask" in slots else {}
    operands |= {"weight": product["weight"]}
    attrs: dict[str, Any] = {
        k: node.attrs[k] for k in ("scale", "softcap", "causal", "window") if k in node.attrs
    }
    attrs |= {"nope_dim": parts.nope.value, "transposed": parts.product.attrs["transposed"]}
    bounds = (slots["q"], product["x"], parts.rope_key, *list(operands.values())[3:])
    return Match(
        node.outputs[0], "latent_attention", tuple(operands), tuple(operands.values()), attrs, bounds
    )


def _parts(keys: Value) -> Parts | None:
    """Keys [B, H, T, Dn + Dr] as columns of a product beside a part that is the same for all heads."""
    if keys.op != "concat" or keys.node is None or keys.node.attrs["axis"] != 3 or len(keys.args) != 2:
        return None
    first, second = keys.args
    product = _sliced(first, ZERO)
    while second.op == "expand":
        second = second.args[0]
    if product is None or not first.dims[3].is_const or second.dims[1:2] != (ONE,):
        return None
    return Parts(product, first.dims[3], second)


def _is_rest(values: Value, parts: Parts) -> bool:
    return _sliced(values, parts.nope) is parts.product


def _sliced(value: Value, start: Dim) -> Node | None:
    """The linear layer of whose result, in heads, a value is the columns from `start` on."""
    if value.op != "slice" or value.node is None:
        return None
    attrs = value.node.attrs
    if attrs["axes"] != (3,) or attrs["steps"] != (1,) or attrs["starts"] != (start,):
        return None
    value = value.args[0]
    while value.op in ("reshape", "transpose"):
        value = value.args[0]
    return value.node if value.node is not None and value.op == "linear" else None


def _rows(net: Net, value: Value) -> Value | None:
    """[B, 1, T, R] of rows that are stored so, or without the axis of heads."""
    if value.rank == 4 and value.dims[1] == ONE:
        return value
    if value.rank == 3:
        return build.reshape(net, value, [value.dims[0], ONE, *value.dims[1:]])
    return None


def _shapes(match: Match) -> dict[int, tuple[int, ...]]:
    """Of the weight, whose inner width takes no part in any shape."""
    weight, rows = match.inputs[-1], match.bounds[1]
    width = rows.dims[-1].value
    inner = _SMALL if width > LARGE else width
    outer = weight.dims[0 if match.attrs["transposed"] else 1].value
    return {id(weight): (outer, inner) if match.attrs["transposed"] else (inner, outer), id(rows): (inner,)}


def _operands(match: Match) -> Any:
    """Latent rows of the width that `_shapes` gives them."""
    rows = match.bounds[1]
    inner = _shapes(match)[id(rows)][0]

    def draw(sizes: Mapping[str, int]) -> dict[int, Any]:
        env = sizes_for(match.inputs, [], sizes)
        shape = [*(d.evaluate(env) for d in rows.dims[:-1]), inner]
        return {id(rows): random_array(rows, shape, np.random.default_rng(5))}

    return draw
