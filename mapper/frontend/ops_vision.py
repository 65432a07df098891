"""Lowerings of operators of vision transformers: pooling, and moves between depth and space."""

from __future__ import annotations

import math

from mapper.frontend import build as b
from mapper.frontend.lower import Call, lowers
from mapper.frontend.net import Net, Value
from mapper.frontend.ops_nn import times
from mapper.ir.dims import ONE, Dim


@lowers("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(c: Call) -> list[Value]:
    kind = "mean" if c.node.op == "GlobalAveragePool" else "max"
    return [b.reduce(c.net, kind, c.x(), list(range(2, c.x().rank)), True)]


@lowers("DepthToSpace", "SpaceToDepth")
def _depth_space(c: Call) -> list[Value]:
    net, x, size = c.net, c.x(), c.integer("blocksize")
    if size < 1:
        raise c.refuse("no block size")
    batch, channels, height, width = x.dims
    side, column = Dim.of(size), c.text("mode", "DCR") != "CRD"
    if c.node.op == "SpaceToDepth":
        parts = b.reshape(net, x, [batch, channels, height // size, side, width // size, side])
        parts = b.transpose(net, parts, (0, 3, 5, 1, 2, 4))
        return [b.reshape(net, parts, [batch, channels * (size * size), height // size, width // size])]
    rest = channels // (size * size)
    shape = [batch, side, side, rest] if column else [batch, rest, side, side]
    parts = b.reshape(net, x, [*shape, height, width])
    parts = b.transpose(net, parts, (0, 3, 4, 1, 5, 2) if column else (0, 1, 4, 2, 5, 3))
    return [b.reshape(net, parts, [batch, rest, height * size, width * size])]


@lowers("MaxPool", "AveragePool")
def _pool(c: Call) -> list[Value]:
    """The maximum or mean of shifted copies, one per place of the window."""
    net, x = c.net, c.x()
    spatial = x.rank - 2
    window = c.integers("kernel_shape") or []
    strides, dilations = (c.integers(n) or [1] * spatial for n in ("strides", "dilations"))
    pads = c.integers("pads") or [0] * (2 * spatial)
    if (
        any(c.node.outputs[1:])
        or c.integer("ceil_mode")
        or c.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    ):
        raise c.refuse("indices, rounding up and automatic padding are not supported")
    if len(window) != spatial or not 0 < math.prod(window) <= 64:
        raise c.refuse(f"a window of {window} is not supported")
    mean = c.node.op == "AveragePool"
    ones = b.expand(net, net.scalar(1.0, x), [ONE, ONE, *x.dims[2:]]) if mean else None
    out = _windows(net, x, window, strides, dilations, pads, mean)
    if ones is None or c.integer("count_include_pad") or not any(pads):
        return [times(net, out, 1.0 / math.prod(window)) if mean else out]
    return [b.binary(net, "div", out, _windows(net, ones, window, strides, dilations, pads, True))]


def _windows(
    net: Net,
    x: Value,
    window: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int],
    total: bool,
) -> Value:
    """Sum or maximum of `x` over each window."""
    spatial = len(window)
    if any(pads):
        fill = net.scalar(0.0 if total else -math.inf, x)
        before, after = (
            (Dim.of(0),) * 2 + tuple(Dim.of(p) for p in half) for half in (pads[:spatial], pads[spatial:])
        )
        x = net.make("pad", [x, fill], {"before": before, "after": after})
    out: Value | None = None
    axes = list(range(2, x.rank))
    for place in range(math.prod(window)):
        offsets = []
        for size, step in zip(window[::-1], dilations[::-1], strict=True):
            place, at = divmod(place, size)
            offsets.insert(0, at * step)
        ends = [
            (d - (w - 1) * e - 1) // s * s + o + 1
            for d, w, e, s, o in zip(x.dims[2:], window, dilations, strides, offsets, strict=True)
        ]
        piece = b.slice_(net, x, [Dim.of(o) for o in offsets], ends, axes, strides)
        out = piece if out is None else b.binary(net, "add" if total else "max", out, piece)
    assert out is not None
    return out
