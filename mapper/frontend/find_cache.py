"""Recognises the append to a key-value cache: new rows joined to it, or written into it."""

from __future__ import annotations

from mapper.frontend import build
from mapper.frontend.agree import Checker
from mapper.frontend.caches import Cache, find_caches
from mapper.frontend.cut import View
from mapper.frontend.find_attention import grounded
from mapper.frontend.net import Net, Value
from mapper.frontend.rewrite import Match
from mapper.ir.dims import ONE


def appends(view: View, checker: Checker) -> list[Match]:
    """`kv_append` and `kv_update` for every cache of [B, H, L, D] rows."""
    found = []
    for cache in find_caches(view.net, view.nodes):
        match = _match(view, cache)
        if match is not None and checker.holds(match):
            found.append(match)
    return found


def _match(view: View, cache: Cache) -> Match | None:
    node = cache.node
    out = node.outputs[0]
    if out.rank != 4:
        return None
    if cache.grows:
        return Match(out, "kv_append", ("past", "new"), node.inputs)
    rows = _rows(view.net, node.inputs[1])
    if node.op != "scatter_elements" or rows is None:
        return None
    operands = (node.inputs[0], node.inputs[2], rows)
    return Match(out, "kv_update", ("past", "new", "rows"), operands, {}, grounded(view, operands))


def _rows(net: Net, index: Value) -> Value | None:
    """The [S] or [B, S] row numbers behind an index [B, H, S, D] alike for all heads and columns."""
    if index.op == "expand":
        index = index.args[0]
    if index.rank != 4 or index.dims[1] != ONE or index.dims[3] != ONE:
        return None
    shape = [index.dims[2]] if index.dims[0] == ONE else [index.dims[0], index.dims[2]]
    return build.reshape(net, index, shape)
