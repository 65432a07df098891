"""Inference rules of the primitives that move elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mapper.ir.dims import ONE, Dim
from mapper.ir.infer import Call, broadcast, rule
from mapper.ir.primitives_shape import (
    ConcatOp,
    ExpandOp,
    FillOp,
    GatherElementsOp,
    GatherNdOp,
    GatherOp,
    LoadOp,
    NonzeroOp,
    OneHotOp,
    PadOp,
    RangeOp,
    ReshapeOp,
    ScatterElementsOp,
    ScatterNdOp,
    ShapeOfOp,
    SliceOp,
    SplitOp,
    SqueezeOp,
    TileOp,
    TransposeOp,
    TriluOp,
    UnsqueezeOp,
)
from mapper.ir.types import TensorType

Types = Sequence[TensorType]


def _dims_of(call: Call, attribute: str, operand: str) -> list[Dim]:
    """The dimensions from the attribute or the operand; fresh symbols where only its length is known."""
    given = call.attrs.get(attribute)
    if given is not None:
        call.need(not call.has(operand), f"both attribute {attribute} and operand {operand}")
        return list(given)
    known = call.dims(operand)
    if known is not None:
        return known
    vector = call.type(operand)
    call.need(vector.rank == 1 and vector.is_static, f"{operand} has no fixed length")
    return [call.scope.fresh() for _ in range(vector.ints[0])]


@rule(LoadOp)
def _load(call: Call) -> Types:
    return [call.weight("weight")]


@rule(ReshapeOp)
def _reshape(call: Call) -> Types:
    x = call.type("x")
    dims = _dims_of(call, "dims", "shape")
    if call.has("shape") and not call.attrs["allowzero"]:
        copied = [x.shape[i] if i < x.rank else d for i, d in enumerate(dims)]
        dims = [c if d.is_const and d.value == 0 else d for c, d in zip(copied, dims, strict=True)]
    wild = [i for i, d in enumerate(dims) if d.is_const and d.value == -1]
    call.need(len(wild) <= 1, "more than one -1")
    rest = math.prod((d for i, d in enumerate(dims) if i not in wild), start=ONE)
    if wild:
        known = rest.is_const and x.elements.is_const
        call.need(
            not known or (rest.value != 0 and x.elements.value % rest.value == 0), f"{x.elements} elements"
        )
        dims[wild[0]] = x.elements // rest if rest.terms else call.scope.fresh()
    elif rest.is_const and x.elements.is_const:
        call.need(rest == x.elements, f"{x.elements} elements into {rest}")
    return [TensorType.of(dims, x.dtype)]


@rule(SqueezeOp)
def _squeeze(call: Call) -> Types:
    x = call.type("x")
    axes = {call.axis(a, x.rank) for a in call.attrs["axes"]}
    for axis in axes:
        call.need(
            not x.shape[axis].is_const or x.shape[axis].value == 1, f"dimension {x.shape[axis]} is not 1"
        )
    return [TensorType.of([d for i, d in enumerate(x.shape) if i not in axes], x.dtype)]


@rule(UnsqueezeOp)
def _unsqueeze(call: Call) -> Types:
    x = call.type("x")
    rank = x.rank + len(call.attrs["axes"])
    axes = {call.axis(a, rank) for a in call.attrs["axes"]}
    call.need(len(axes) == rank - x.rank, "an axis twice")
    rest = iter(x.shape)
    return [TensorType.of([ONE if i in axes else next(rest) for i in range(rank)], x.dtype)]


@rule(TransposeOp)
def _transpose(call: Call) -> Types:
    x, perm = call.type("x"), call.attrs["perm"]
    call.need(sorted(perm) == list(range(x.rank)), f"perm {perm} of a tensor of rank {x.rank}")
    return [TensorType.of([x.shape[p] for p in perm], x.dtype)]


@rule(ExpandOp)
def _expand(call: Call) -> Types:
    x = call.type("x")
    return [TensorType.of(broadcast(call, x.shape, _dims_of(call, "dims", "shape")), x.dtype)]


@rule(ConcatOp)
def _concat(call: Call) -> Types:
    parts = call.types("parts")
    call.need(len(parts) > 0, "no operands")
    first = parts[0]
    axis = call.axis(call.attrs["axis"], first.rank)
    dims = list(first.shape)
    for part in parts[1:]:
        call.need(part.dtype == first.dtype and part.rank == first.rank, f"{part} after {first}")
        dims[axis] = dims[axis] + part.shape[axis]
        for i in set(range(first.rank)) - {axis}:
            a, b = dims[i], part.shape[i]
            call.need(a == b or not (a.is_const and b.is_const), f"{part} after {first}")
            dims[i] = b if b.is_const else a
    return [TensorType.of(dims, first.dtype)]


@rule(SplitOp)
def _split(call: Call) -> Types:
    x = call.type("x")
    axis = call.axis(call.attrs["axis"], x.rank)
    sizes = call.attrs["sizes"]
    whole = x.shape[axis]
    call.need(not whole.is_const or sum(sizes) == whole.value, f"sizes {sizes} of dimension {whole}")
    return [TensorType.of([*x.shape[:axis], s, *x.shape[axis + 1 :]], x.dtype) for s in sizes]


def _clamped(bound: Dim, size: Dim) -> Dim | None:
    """A slice bound as an offset from the front, None where that depends on symbols' values."""
    if bound.is_const and bound.value < 0:
        return Dim.max(size + bound.value, 0) if size.is_const else size + bound.value
    if bound.is_const and size.is_const:
        return Dim.min(bound, size)
    if bound == size or (bound.is_const and bound.value == 0):
        return bound
    if bound.is_const and bound.value >= 2**31 - 1:
        return size
    return Dim.min(bound, size)


@rule(SliceOp)
def _slice(call: Call) -> Types:
    x, axes = call.type("x"), call.attrs["axes"]
    steps = call.attrs.get("steps") or (1,) * len(axes)
    starts, ends = _dims_of(call, "starts", "begin"), _dims_of(call, "ends", "end")
    call.need(
        len(axes) == len(starts) == len(ends) == len(steps), "starts, ends, axes and steps differ in number"
    )
    dims = list(x.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        dims[call.axis(axis, x.rank)] = _slice_size(call, x.shape[axis], start, end, step)
    return [TensorType.of(dims, x.dtype)]


def _slice_size(call: Call, size: Dim, start: Dim, end: Dim, step: int) -> Dim:
    if size.is_const and start.is_const and end.is_const:
        return Dim.of(len(range(*slice(start.value, end.value, step).indices(size.value))))
    if any(s.startswith("?") for d in (start, end) for s in d.symbols) or step < 1:
        return call.scope.fresh()
    first, last = _clamped(start, size), _clamped(end, size)
    if first is None or last is None:
        return call.scope.fresh()
    return (last - first + (step - 1)) // step


@rule(GatherOp)
def _gather(call: Call) -> Types:
    x, indices = call.type("x"), call.type("indices")
    axis = call.axis(call.attrs["axis"], x.rank)
    return [TensorType.of([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]], x.dtype)]


@rule(GatherElementsOp)
def _gather_elements(call: Call) -> Types:
    x, indices = call.type("x"), call.type("indices")
    call.need(x.rank == indices.rank, f"ranks {x.rank} and {indices.rank}")
    return [TensorType.of(indices.shape, x.dtype)]


@rule(GatherNdOp)
def _gather_nd(call: Call) -> Types:
    x, indices, batch = call.type("x"), call.type("indices"), call.attrs["batch_dims"]
    depth = indices.shape[-1].value if indices.rank else 0
    call.need(0 < depth <= x.rank - batch, f"index vectors of {depth} into rank {x.rank}")
    return [TensorType.of([*indices.shape[:-1], *x.shape[batch + depth :]], x.dtype)]


@rule(ScatterNdOp, ScatterElementsOp, TriluOp)
def _like_x(call: Call) -> Types:
    return [call.type("x")]


@rule(PadOp)
def _pad(call: Call) -> Types:
    x, pads = call.type("x"), call.attrs["pads"]
    call.need(len(pads) == 2 * x.rank, f"{len(pads)} pads for rank {x.rank}")
    return [TensorType.of([d + pads[i] + pads[x.rank + i] for i, d in enumerate(x.shape)], x.dtype)]


@rule(TileOp)
def _tile(call: Call) -> Types:
    x, times = call.type("x"), _dims_of(call, "repeats", "times")
    call.need(len(times) == x.rank, f"{len(times)} repeats for rank {x.rank}")
    return [TensorType.of([d * t for d, t in zip(x.shape, times, strict=True)], x.dtype)]


@rule(RangeOp)
def _range(call: Call) -> Types:
    bounds = [call.dims(n) for n in ("start", "limit", "delta")]
    size = call.scope.fresh()
    if all(b is not None for b in bounds):
        start, limit, delta = (b[0] for b in bounds if b is not None)
        if delta.is_const and delta.value > 0:
            size = (limit - start + (delta.value - 1)) // delta.value
            size = Dim.max(size, 0) if size.is_const else size
    return [TensorType.of([size], call.type("start").dtype)]


@rule(ShapeOfOp)
def _shape_of(call: Call) -> Types:
    chosen = call.type("x").shape[call.attrs["start"] : call.attrs.get("end")]
    return [TensorType.of([len(chosen)], "i64")]


@rule(FillOp)
def _fill(call: Call) -> Types:
    return [TensorType.of(_dims_of(call, "dims", "shape"), call.attrs["dtype"])]


@rule(OneHotOp)
def _one_hot(call: Call) -> Types:
    return [TensorType.of([*call.type("indices").shape, call.attrs["depth"]], call.attrs["dtype"])]


@rule(NonzeroOp)
def _nonzero(call: Call) -> Types:
    return [TensorType.of([call.type("x").rank, call.scope.fresh()], "i64")]
