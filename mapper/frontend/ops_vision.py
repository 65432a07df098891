"""Lowerings of the operators around attention in vision transformers: pooling, blocks of pixels, padding."""

from __future__ import annotations

import itertools
import math

from mapper.frontend import build as b
from mapper.frontend.lower import Call, lowers
from mapper.frontend.net import Net, Value, product
from mapper.ir.dims import ONE, Dim

MAX_WINDOW = 1024  # elements of a pooling window, each one slice of the graph


@lowers("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(c: Call) -> list[Value]:
    kind = "mean" if c.node.op == "GlobalAveragePool" else "max"
    return [b.reduce(c.net, kind, c.x(), list(range(2, c.x().rank)), True)]


def _window(c: Call) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, padding before and after, and the results' sizes."""
    x, kernel = c.x(), c.integers("kernel_shape")
    if not kernel or len(kernel) != x.rank - 2 or min(kernel) < 1 or math.prod(kernel) > MAX_WINDOW:
        raise c.refuse(f"a pooling window of {kernel} is not supported")
    if not all(d.is_const for d in x.dims[2:]):
        raise c.refuse("pooling over a symbolic dimension is not supported")
    n = len(kernel)
    strides, dilations = c.integers("strides") or [1] * n, c.integers("dilations") or [1] * n
    pads = c.integers("pads") or [0] * (2 * n)
    if min(strides) < 1 or min(dilations) < 1 or min(pads) < 0:
        raise c.refuse("strides, dilations or padding below their least values")
    before, after, sizes = pads[:n], pads[n:], []
    auto, up = c.text("auto_pad", "NOTSET"), c.integer("ceil_mode")
    for i, d in enumerate(x.dims[2:]):
        reach = (kernel[i] - 1) * dilations[i] + 1
        if auto.startswith("SAME"):
            size = -(-d.value // strides[i])
            total = max(0, (size - 1) * strides[i] + reach - d.value)
            before[i] = total // 2 if auto == "SAME_UPPER" else -(-total // 2)
            after[i] = total - before[i]
        else:
            free = d.value + before[i] + after[i] - reach
            size = (-(-free // strides[i]) if up else free // strides[i]) + 1
            if up and (size - 1) * strides[i] >= d.value + before[i]:
                size -= 1  # a window that starts in the padding after the end is left out
        sizes.append(size)
    return kernel, strides, dilations, before, after, sizes


@lowers("MaxPool", "AveragePool")
def _pool(c: Call) -> list[Value]:
    if any(c.node.outputs[1:]):
        raise c.refuse("the places of the largest elements are an output")
    net, x, largest = c.net, c.x(), c.node.op == "MaxPool"
    kernel, strides, dilations, before, after, sizes = _window(c)
    reach = [
        (n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    least = {"u8": 0.0, "i8": -128.0}.get(x.dtype, -math.inf) if largest else 0.0
    pads = (before, after, reach)
    total = _gathered(net, _padded(net, x, pads, least), (kernel, strides, dilations, sizes), largest)
    if largest:
        return [total]
    ones = b.expand(net, net.scalar(1.0, x), [ONE, ONE, *x.dims[2:]])
    if c.integer("count_include_pad"):
        ones = _padded(
            net,
            ones,
            (before, after, [d.value + p + q for d, p, q in zip(x.dims[2:], before, after, strict=True)]),
            1.0,
        )
        ones = _padded(net, ones, ([0] * len(kernel), [0] * len(kernel), reach), 0.0)
    else:
        ones = _padded(net, ones, pads, 0.0)
    count = _gathered(net, ones, (kernel, strides, dilations, sizes), False)
    return [b.binary(net, "div", total, count)]


def _padded(net: Net, x: Value, pads: tuple[list[int], list[int], list[int]], fill: float) -> Value:
    """`x` with rows before it, and after it up to the length that all windows reach."""
    before, _, reach = pads
    after = [max(0, r - p - d.value) for r, p, d in zip(reach, before, x.dims[2:], strict=True)]
    if not any(before) and not any(after):
        return x
    zero = Dim.of(0)
    attrs = {
        "before": (zero, zero, *map(Dim.of, before)),
        "after": (zero, zero, *map(Dim.of, after)),
    }
    return net.make("pad", [x, net.scalar(fill, x)], attrs)


Window = tuple[list[int], list[int], list[int], list[int]]


def _gathered(net: Net, x: Value, window: Window, largest: bool) -> Value:
    """The largest of, or the sum over, the elements that each window sees."""
    kernel, strides, dilations, sizes = window
    axes, out = list(range(2, x.rank)), None
    for at in itertools.product(*map(range, kernel)):
        starts = [a * d for a, d in zip(at, dilations, strict=True)]
        ends = [s + (n - 1) * t + 1 for s, n, t in zip(starts, sizes, strides, strict=True)]
        seen = b.slice_(net, x, [Dim.of(s) for s in starts], [Dim.of(e) for e in ends], axes, strides)
        out = seen if out is None else b.binary(net, "max" if largest else "add", out, seen)
    assert out is not None
    return out


@lowers("DepthToSpace", "SpaceToDepth")
def _blocks(c: Call) -> list[Value]:
    net, x, block = c.net, c.x(), Dim.of(c.integer("blocksize"))
    batch, depth, height, width = x.dims
    if c.node.op == "SpaceToDepth":
        cut = b.reshape(net, x, [batch, depth, height // block, block, width // block, block])
        depth_first = c.text("mode", "DCR") == "CRD"
        cut = b.transpose(net, cut, (0, 1, 3, 5, 2, 4) if depth_first else (0, 3, 5, 1, 2, 4))
        return [b.reshape(net, cut, [batch, depth * block * block, height // block, width // block])]
    rest = depth // (block * block)
    if c.text("mode", "DCR") == "CRD":
        cut = b.reshape(net, x, [batch, rest, block, block, height, width])
        cut = b.transpose(net, cut, (0, 1, 4, 2, 5, 3))
    else:
        cut = b.reshape(net, x, [batch, block, block, rest, height, width])
        cut = b.transpose(net, cut, (0, 3, 4, 1, 5, 2))
    return [b.reshape(net, cut, [batch, rest, height * block, width * block])]


def padded_by_index(c: Call, x: Value, axis: int, before: int, after: int, mode: str) -> Value:
    """`x` extended along one axis by its own rows: edge, reflect or wrap."""
    if not x.dims[axis].is_const or x.dims[axis].value < 1:
        raise c.refuse(f"padding mode {mode!r} of a symbolic or empty dimension is not supported")
    size = x.dims[axis].value
    places = []
    for i in range(-before, size + after):
        if mode == "edge":
            places.append(min(max(i, 0), size - 1))
        elif mode == "wrap":
            places.append(i % size)
        else:
            turn = i % max(2 * (size - 1), 1)
            places.append(min(turn, 2 * (size - 1) - turn))
    return b.gather(c.net, x, c.net.ints(places), axis)


@lowers("Resize")
def _resize(c: Call) -> list[Value]:
    """Nearest neighbours at whole factors: every row repeated. Others are refused."""
    net, x = c.net, c.x()
    if c.text("mode", "nearest") != "nearest" or c.integers("axes"):
        raise c.refuse("resizing other than by whole factors and nearest neighbours is not supported")
    if c.has(3):
        factors = [t // s for t, s in zip(c.content(3, "the sizes"), x.dims, strict=True)]
        whole = all((s * f) == t for t, s, f in zip(c.content(3, "the sizes"), x.dims, factors, strict=True))
    else:
        scales = c.x(2).const
        if scales is None:
            raise c.refuse("scales that are stored or computed, where sizes are not given, are not supported")
        factors = [Dim.of(int(v)) for v in scales.reshape(-1)]
        whole = bool((scales == scales.astype(int)).all()) and len(factors) == x.rank
    half = c.text("coordinate_transformation_mode", "half_pixel") in ("half_pixel", "asymmetric")
    rounding = c.text("nearest_mode", "round_prefer_floor")
    centred = c.text("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    if not whole or not half or (rounding != "floor" and not (centred and rounding.startswith("round"))):
        raise c.refuse("resizing other than by whole factors and nearest neighbours is not supported")
    for axis, factor in enumerate(factors):
        if factor != ONE:
            dims = x.dims
            wide = b.reshape(net, x, [*dims[: axis + 1], ONE, *dims[axis + 1 :]])
            wide = b.expand(net, wide, [*dims[: axis + 1], factor, *dims[axis + 1 :]])
            x = b.reshape(net, wide, [*dims[:axis], product([dims[axis], factor]), *dims[axis + 1 :]])
    return [x]
