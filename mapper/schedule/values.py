"""Value expressions: how the array of a port is made from weights on disk and constants of the schedule.

A small JSON language, so that a schedule holds no copy of the weights, and the executor needs no backend code
to fetch them. Each expression is a list `[op, ...]`:

    ["weight", name]              a weight of Schedule.weights, read from its file, as stored
    ["const", name]               an array of Schedule.constants
    ["zeros", [dims], dtype]      ["full", [dims], dtype, value]
    ["cast", e, dtype]            NumPy astype (round to nearest even); dtype is a NumPy name
    ["transpose", e, [axes]]      ["reshape", e, [dims]]
    ["take", e, axis, const]      gather along `axis` with the index array named `const`
    ["slice", e, axis, begin, end]
    ["pad", e, axis, before, after]   with zeros
    ["concat", [e, ...], axis]
    ["mul", e, e]  ["add", e, e]  NumPy broadcasting, in the operands' common type
    ["dequantise", SCHEME, [dims], dtype, values, scales, zeros | null, order | null]
                                  a weight from its low-bit parts (see mapper.lowbit)
    ["quantise", SCHEME, part, e]     the part ("values", "scales", "zeros") of e [..., N, K] in low bits
                                  SCHEME is [bits, block, axis, layout, kind], mapper.lowbit.Scheme's fields
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ScheduleError
from mapper.lowbit import Scheme, dequantise, quantise
from mapper.schedule.dtypes import dtype

Array = npt.NDArray[Any]
Lookup = Callable[[str], Array]

OPS = (
    *("weight", "const", "zeros", "full", "cast", "transpose", "reshape"),
    *("take", "slice", "pad", "concat", "mul", "add", "dequantise", "quantise"),
)
MAX_BYTES = 1 << 36
"""An array that an expression makes up (not one that it reads) stays below this."""


def evaluate(expr: Any, weight: Lookup, const: Lookup) -> Array:
    """The array that `expr` stands for. `weight` and `const` look names up. Raises ScheduleError."""
    try:
        return _evaluate(expr, weight, const)
    except (TypeError, ValueError, IndexError, KeyError, RecursionError, MemoryError) as error:
        raise ScheduleError(f"value expression {str(expr)[:80]}: {error}") from error


def _evaluate(expr: Any, weight: Lookup, const: Lookup) -> Array:
    op, *rest = expr

    def sub(e: Any) -> Array:
        return _evaluate(e, weight, const)

    match op:
        case "weight":
            return weight(rest[0])
        case "const":
            return const(rest[0])
        case "zeros":
            _bounded(rest[0], rest[1])
            return np.zeros(tuple(rest[0]), dtype(rest[1]))
        case "full":
            _bounded(rest[0], rest[1])
            return np.full(tuple(rest[0]), rest[2], dtype(rest[1]))
        case "cast":
            return sub(rest[0]).astype(dtype(rest[1]))
        case "transpose":
            return np.transpose(sub(rest[0]), rest[1])
        case "reshape":
            return np.reshape(sub(rest[0]), rest[1])
        case "take":
            return np.take(sub(rest[0]), const(rest[2]), axis=rest[1])
        case "slice":
            index = [slice(None)] * (rest[1] + 1)
            index[rest[1]] = slice(rest[2], rest[3])
            return sub(rest[0])[tuple(index)]
        case "pad":
            array = sub(rest[0])
            widths = [(0, 0)] * array.ndim
            widths[rest[1]] = (rest[2], rest[3])
            _bounded([n + sum(w) for n, w in zip(array.shape, widths, strict=True)], array.dtype.name)
            return np.pad(array, widths)
        case "concat":
            return np.concatenate([sub(e) for e in rest[0]], axis=rest[1])
        case "mul":
            return np.asarray(np.multiply(sub(rest[0]), sub(rest[1])))
        case "add":
            return np.asarray(np.add(sub(rest[0]), sub(rest[1])))
        case "dequantise":
            scheme, dims, name, *parts = rest
            _bounded(dims, name)
            arrays = [None if e is None else sub(e) for e in parts]
            values, scales, zeros, order = arrays
            if values is None or scales is None:
                raise ScheduleError("a value expression dequantises without integers or scales")
            return dequantise(Scheme(*scheme), tuple(dims), values, scales, zeros, order, dtype(name))
        case "quantise":
            scheme, part, source = rest
            return quantise(Scheme(*scheme), sub(source), (part,))[part]
    raise ScheduleError(f"unknown value expression {op!r}")


def _bounded(dims: Any, name: str) -> None:
    size = math.prod(dims) * dtype(name).itemsize
    if size > MAX_BYTES:
        raise ScheduleError(f"a value expression makes an array of {size} bytes")


def leaves(expr: Any) -> list[tuple[str, str]]:
    """All ("weight" | "const", name) that `expr` reads."""
    op, *rest = expr
    if op not in OPS:
        raise ScheduleError(f"unknown value expression {str(op)[:40]!r}")
    if op in ("weight", "const"):
        return [(op, rest[0])]
    found: list[tuple[str, str]] = []
    if op == "take":
        found.append(("const", rest[2]))
    if op == "concat":
        for e in rest[0]:
            found += leaves(e)
        return found
    for e in rest:
        if isinstance(e, list) and e and isinstance(e[0], str):
            found += leaves(e)
    return found
