"""Reference semantics of the primitives that move elements, and of constants and weights as values."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper.ir.op import tensor_type
from mapper.ir.reference import Step, meaning, result_dtype
from mapper.ir.types import Array
from mapper.ir.weights import decode


@meaning("constant")
def _constant(s: Step) -> Array:
    kind = tensor_type(s.op.results[0])
    return s.cast(decode(np.frombuffer(s.attr("value"), np.uint8), kind.ints, kind.dtype))


@meaning("load")
def _load(s: Step) -> Array:
    return s.need("weight")


def _target(s: Step, attribute: str, operand: str) -> list[int]:
    given = s.optional(operand)
    return s.sizes(attribute) if given is None else [int(v) for v in given]


@meaning("reshape")
def _reshape(s: Step) -> Array:
    x, dims = s.arg("x"), _target(s, "dims", "shape")
    if s.optional("shape") is not None and not s.attr("allowzero"):
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


@meaning("squeeze")
def _squeeze(s: Step) -> Array:
    return np.squeeze(s.arg("x"), tuple(s.attr("axes")))


@meaning("unsqueeze")
def _unsqueeze(s: Step) -> Array:
    return np.expand_dims(s.arg("x"), tuple(s.attr("axes")))


@meaning("transpose")
def _transpose(s: Step) -> Array:
    return np.transpose(s.arg("x"), s.attr("perm"))


@meaning("expand")
def _expand(s: Step) -> Array:
    x = s.arg("x")
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_target(s, "dims", "shape"))))


@meaning("concat")
def _concat(s: Step) -> Array:
    return np.concatenate(s.args["parts"], axis=s.attr("axis"))


@meaning("split")
def _split(s: Step) -> tuple[Array, ...]:
    sizes = s.attr("sizes")
    if sum(sizes) != s.arg("x").shape[s.attr("axis")]:
        raise ValueError(f"sizes {sizes} of shape {s.arg('x').shape}")
    return tuple(np.split(s.arg("x"), np.cumsum(sizes)[:-1], axis=s.attr("axis")))


@meaning("slice")
def _slice(s: Step) -> Array:
    axes = s.attr("axes")
    steps = s.attr("steps") or (1,) * len(axes)
    starts, ends = _target(s, "starts", "begin"), _target(s, "ends", "end")
    index: list[Any] = [slice(None)] * s.arg("x").ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return np.asarray(s.arg("x")[tuple(index)])


@meaning("gather")
def _gather(s: Step) -> Array:
    return np.take(s.arg("x"), s.arg("indices"), axis=s.attr("axis"))


@meaning("gather_elements")
def _gather_elements(s: Step) -> Array:
    x, indices, axis = s.arg("x"), s.arg("indices"), s.attr("axis")
    return np.asarray(x[_element_index(indices, axis)])


def _element_index(indices: Array, axis: int) -> tuple[Array, ...]:
    grid: list[Array] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = indices
    return tuple(grid)


@meaning("gather_nd")
def _gather_nd(s: Step) -> Array:
    x, indices, batch = s.arg("x"), s.arg("indices"), s.attr("batch_dims")
    if not batch:
        return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])
    lead = indices.shape[:batch]
    flat = zip(x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:]), strict=True)
    rows = [one[tuple(np.moveaxis(index, -1, 0))] for one, index in flat]
    return np.stack(rows).reshape(*lead, *rows[0].shape)


_COMBINE: dict[str, Any] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _scatter(s: Step, index: tuple[Array, ...]) -> Array:
    result = s.arg("x").copy()
    if s.attr("reduction") == "none":
        result[index] = s.arg("updates")
    else:
        _COMBINE[s.attr("reduction")].at(result, index, s.arg("updates"))
    return result


@meaning("scatter_nd")
def _scatter_nd(s: Step) -> Array:
    return _scatter(s, tuple(np.moveaxis(s.arg("indices"), -1, 0)))


@meaning("scatter_elements")
def _scatter_elements(s: Step) -> Array:
    return _scatter(s, _element_index(s.arg("indices"), s.attr("axis")))


@meaning("pad")
def _pad(s: Step) -> Array:
    x, pads = s.arg("x"), s.attr("pads")
    pairs = [(pads[i], pads[x.ndim + i]) for i in range(x.ndim)]
    cropped = x[tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pairs, x.shape, strict=True))]
    return np.pad(cropped, [(max(a, 0), max(b, 0)) for a, b in pairs], constant_values=s.attr("value"))


@meaning("tile")
def _tile(s: Step) -> Array:
    return np.tile(s.arg("x"), _target(s, "repeats", "times"))


@meaning("range")
def _range(s: Step) -> Array:
    start, limit, delta = (s.arg(n) for n in ("start", "limit", "delta"))
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@meaning("shape_of")
def _shape_of(s: Step) -> Array:
    return np.array(s.arg("x").shape[s.attr("start") : s.attr("end")], dtype=np.int64)


@meaning("fill")
def _fill(s: Step) -> Array:
    dtype = result_dtype(s.attr("dtype"), s.precision)
    return np.full(_target(s, "dims", "shape"), s.attr("value"), dtype=dtype)


@meaning("trilu")
def _trilu(s: Step) -> Array:
    return (np.triu if s.attr("upper") else np.tril)(s.arg("x"), s.attr("k"))


@meaning("one_hot")
def _one_hot(s: Step) -> Array:
    return np.asarray(s.arg("indices")[..., None] == np.arange(s.attr("depth")))


@meaning("nonzero")
def _nonzero(s: Step) -> Array:
    return np.stack(np.nonzero(s.arg("x"))).astype(np.int64)
