"""Symbolic evaluation of shape arithmetic: small integer tensors whose elements are dimensions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from xdsl.ir import SSAValue

from mapper.errors import ModelError
from mapper.ir.dims import Dim
from mapper.ir.op import DataflowOp, tensor_type

SymbolicArray = npt.NDArray[np.object_]
"""An object array of Dim."""

_LARGEST = 64
_INTEGERS = ("i64", "i32", "i16", "i8", "u64", "u32", "u16", "u8")

Known = Mapping[SSAValue, SymbolicArray]
_Rule = Callable[[DataflowOp, list[SymbolicArray]], SymbolicArray]


def symbolic_array(values: Any, shape: tuple[int, ...]) -> SymbolicArray:
    """An object array of Dim from nested or flat ints or Dims."""
    made = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        made[index] = Dim.of(value)
    return made.reshape(shape)


def symbolic_value(op: DataflowOp, known: Known) -> SymbolicArray | None:
    """The elements of the op's first result as dimensions, None where it is no (small) shape arithmetic."""
    if not op.results:
        return None
    result = tensor_type(op.results[0])
    if result.dtype not in _INTEGERS or not result.is_static or (result.elements.value > _LARGEST):
        return None
    if op.mnemonic == "constant":
        flat = np.frombuffer(op.attr("value"), result.numpy)
        return symbolic_array([int(v) for v in flat], result.ints)
    if op.mnemonic == "shape_of":
        shape = tensor_type(op.operands[0]).shape[op.attr("start") : op.attr("end")]
        return symbolic_array(shape, (len(shape),))
    rule = _RULES.get(op.mnemonic)
    values = [known[v] for v in op.operands if v in known]
    if rule is None or len(values) != len(op.operands):
        return None
    try:
        return rule(op, values)
    except (ModelError, IndexError, ValueError):
        return None


def _elementwise(function: Callable[..., Dim]) -> _Rule:
    vector = np.frompyfunc(function, 2, 1)

    def apply(op: DataflowOp, values: list[SymbolicArray]) -> SymbolicArray:
        return np.asarray(vector(*values), dtype=object)

    return apply


def _truncating_division(a: Dim, b: Dim) -> Dim:
    if a.is_const and b.is_const:
        quotient = abs(a.value) // abs(b.value)
        return Dim.of(quotient if (a.value < 0) == (b.value < 0) else -quotient)
    return a // b  # dimensions are not negative


def _like_result(op: DataflowOp, values: list[SymbolicArray]) -> SymbolicArray:
    return values[0].reshape(op.result_shape())


def _concat(op: DataflowOp, values: list[SymbolicArray]) -> SymbolicArray:
    return np.concatenate(values, axis=op.attr("axis"))


def _gather(op: DataflowOp, values: list[SymbolicArray]) -> SymbolicArray:
    data, indices = values
    index = np.array([d.value for d in indices.flatten()], dtype=np.int64).reshape(indices.shape)
    return np.asarray(np.take(data, index, axis=op.attr("axis")), dtype=object).reshape(op.result_shape())


def _slice(op: DataflowOp, values: list[SymbolicArray]) -> SymbolicArray:
    axes, steps = op.attr("axes"), op.attr("steps") or (1,) * len(op.attr("axes"))
    starts = op.attr("starts") or list(values[1])
    ends = op.attr("ends") or list(values[-1])
    index = [slice(None)] * values[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start.value, end.value, step)
    return values[0][tuple(index)]


def _reduce(op: DataflowOp, values: list[SymbolicArray]) -> SymbolicArray:
    if op.attr("kind") not in _FOLDS or values[0].ndim != 1:
        raise ModelError("no shape arithmetic")
    total = functools.reduce(_FOLDS[op.attr("kind")], values[0])
    return symbolic_array([total], op.result_shape())


_FOLDS: dict[str, Callable[[Dim, Dim], Dim]] = {
    "prod": lambda a, b: a * b,
    "sum": lambda a, b: a + b,
    "max": lambda a, b: Dim.max(a, b),
    "min": lambda a, b: Dim.min(a, b),
}

_RULES: dict[str, _Rule] = {
    "add": _elementwise(lambda a, b: a + b),
    "sub": _elementwise(lambda a, b: a - b),
    "mul": _elementwise(lambda a, b: a * b),
    "div": _elementwise(_truncating_division),
    "mod": _elementwise(lambda a, b: a % b),
    "max": _elementwise(lambda a, b: Dim.max(a, b)),
    "min": _elementwise(lambda a, b: Dim.min(a, b)),
    "neg": lambda op, values: np.asarray(-values[0], dtype=object),
    "cast": lambda op, values: values[0],
    "squeeze": _like_result,
    "unsqueeze": _like_result,
    "reshape": lambda op, values: values[0].reshape(op.result_shape()),
    "expand": lambda op, values: np.broadcast_to(values[0], op.result_shape()),
    "concat": _concat,
    "gather": _gather,
    "slice": _slice,
    "reduce": _reduce,
}
