"""Moving elements: strided copies, gathers, scatters, fills. Items are moved as words of their size (1, 2,
4, 8).

Functions that read indices from data return 0, or 1 + the position of the first index that is out of range.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import jit
from mapper_kernels.memory import FLOATS, load_f, load_i, store_f, store_i, u8, u16, u32, u64
from mapper_kernels.split import share

ADD, MUL, MAX, MIN = 1, 2, 3, 4
# typed numbers: a literal argument would compile the callee once more for that literal
_ONE: Any = np.int64(1)


@jit
def _reversed(source: int, target: int, size: int, n: int, from_step: int, to_step: int) -> None:
    """`move` with a negative step: byte by byte, because compiled code takes negative indices from the
    end."""
    for i in range(n):
        a, b = u8(source + i * from_step * size, size), u8(target + i * to_step * size, size)
        for j in range(size):
            b[j] = a[j]


@jit
def _strided(a: Any, b: Any, n: int, from_step: int, to_step: int) -> None:
    for i in range(n):
        b[i * to_step] = a[i * from_step]


@jit
def move(source: int, target: int, size: int, n: int, from_step: int, to_step: int) -> None:
    """Copy n items of `size` bytes from address `source` to `target`; steps in items."""
    if from_step == 1 and to_step == 1:
        a, b = u8(source, n * size), u8(target, n * size)
        for i in range(n * size):
            b[i] = a[i]
    elif from_step < 0 or to_step < 0:
        _reversed(source, target, size, n, from_step, to_step)
    elif size == 4:
        _strided(u32(source, n * from_step + 1), u32(target, n * to_step + 1), n, from_step, to_step)
    elif size == 8:
        _strided(u64(source, n * from_step + 1), u64(target, n * to_step + 1), n, from_step, to_step)
    elif size == 2:
        _strided(u16(source, n * from_step + 1), u16(target, n * to_step + 1), n, from_step, to_step)
    else:
        _strided(u8(source, n * from_step + 1), u8(target, n * to_step + 1), n, from_step, to_step)


@jit
def copy(
    x: int, y: int, size: int, shape: Any, x_strides: Any, y_strides: Any, part: int, parts: int
) -> None:
    """y[i, j, ...] = x[i, j, ...] over `shape` (at least one dimension), with strides in items. Shares rows.

    A stride may be 0 (broadcast, in x) or negative; the addresses are those of item [0, 0, ...].
    """
    last = shape.shape[0] - 1
    rows = 1
    for d in range(last):
        rows *= shape[d]
    low, high = share(rows, 1, part, parts)
    for row in range(low, high):
        rest, a, b = row, 0, 0
        for d in range(last - 1, -1, -1):
            i = rest % shape[d]
            a += i * x_strides[d]
            b += i * y_strides[d]
            rest //= shape[d]
        move(x + a * size, y + b * size, size, shape[last], x_strides[last], y_strides[last])


@jit
def fill(y: int, code: int, n: int, value: float, whole: int) -> None:
    """n elements of type `code` set to `value` (integers and bool: to `whole`)."""
    for i in range(n):
        if code < FLOATS:
            store_f(y, code, i, value)
        else:
            store_i(y, code, i, whole)


@jit
def arange(start: int, delta: int, y: int, code: int, n: int) -> None:
    """y[i] = start + i * delta, i < n; start and delta are addresses of one element of type `code`."""
    for i in range(n):
        if code < FLOATS:
            store_f(y, code, i, load_f(start, code, 0) + i * load_f(delta, code, 0))
        else:
            store_i(y, code, i, load_i(start, code, 0) + i * load_i(delta, code, 0))


@jit
def one_hot(indices: int, index_code: int, y: int, code: int, n: int, depth: int) -> None:
    """y [n, depth] of type `code`: 1 at each index (negative ones count from the end), 0 elsewhere."""
    for i in range(n):
        hot = load_i(indices, index_code, i)
        hot = hot + depth if hot < 0 else hot
        for j in range(depth):
            if code < FLOATS:
                store_f(y, code, i * depth + j, 1.0 if j == hot else 0.0)
            else:
                store_i(y, code, i * depth + j, 1 if j == hot else 0)


@jit
def gather(
    x: int, indices: int, index_code: int, y: int, size: int, outer: int, n: int, inner: int, count: int
) -> int:
    """y [outer, count, inner] = x [outer, n, inner] taken at `count` indices of the middle dimension."""
    for i in range(count):
        at = load_i(indices, index_code, i)
        at = at + n if at < 0 else at
        if at < 0 or at >= n:
            return i + 1
        for o in range(outer):
            move(x + (o * n + at) * inner * size, y + (o * count + i) * inner * size, size, inner, _ONE, _ONE)
    return 0


@jit
def gather_elements(
    x: int, indices: int, index_code: int, y: int, size: int, shape: Any, x_shape: Any, axis: int
) -> int:
    """y of the indices' shape: x with its coordinate `axis` replaced by the index."""
    total = 1
    for d in range(shape.shape[0]):
        total *= shape[d]
    for i in range(total):
        at = _replaced(i, shape, x_shape, axis, load_i(indices, index_code, i))
        if at < 0:
            return i + 1
        move(x + at * size, y + i * size, size, _ONE, _ONE, _ONE)
    return 0


@jit
def _replaced(i: int, shape: Any, x_shape: Any, axis: int, value: int) -> int:
    """Flat position in x_shape of item i of `shape`, with coordinate `axis` replaced; -1 out of range."""
    value = value + x_shape[axis] if value < 0 else value
    if value < 0 or value >= x_shape[axis]:
        return -1
    flat, stride = 0, 1
    for d in range(shape.shape[0] - 1, -1, -1):
        coordinate = value if d == axis else i % shape[d]
        flat += coordinate * stride
        stride *= x_shape[d]
        i //= shape[d]
    return flat


@jit
def _vector(indices: int, index_code: int, first: int, dims: Any) -> int:
    """Row-major position of the index vector that starts at element `first`; -1 out of range."""
    flat = 0
    for d in range(dims.shape[0]):
        i = load_i(indices, index_code, first + d)
        i = i + dims[d] if i < 0 else i
        if i < 0 or i >= dims[d]:
            return -1
        flat = flat * dims[d] + i
    return flat


@jit
def gather_nd(
    x: int, indices: int, index_code: int, y: int, size: int, batch: int, count: int, inner: int, dims: Any
) -> int:
    """y [batch, count, inner] = x [batch, dims..., inner] at index vectors [batch, count, len(dims)]."""
    span = 1
    for d in range(dims.shape[0]):
        span *= dims[d]
    for i in range(batch * count):
        at = _vector(indices, index_code, i * dims.shape[0], dims)
        if at < 0:
            return i + 1
        move(x + (i // count * span + at) * inner * size, y + i * inner * size, size, inner, _ONE, _ONE)
    return 0


@jit
def _combine(target: int, code: int, at: int, source: int, i: int, how: int) -> None:
    if code < FLOATS:
        a, b = load_f(target, code, at), load_f(source, code, i)
        if how == ADD:
            b = a + b
        elif how == MUL:
            b = a * b
        elif how == MAX:
            b = np.maximum(a, b)
        elif how == MIN:
            b = np.minimum(a, b)
        store_f(target, code, at, b)
    else:
        c, e = load_i(target, code, at), load_i(source, code, i)
        if how == ADD:
            e = c + e
        elif how == MUL:
            e = c * e
        elif how == MAX:
            e = max(c, e)
        elif how == MIN:
            e = min(c, e)
        store_i(target, code, at, e)


@jit
def scatter_nd(
    indices: int,
    index_code: int,
    updates: int,
    y: int,
    code: int,
    count: int,
    inner: int,
    dims: Any,
    how: int,
) -> int:
    """y [dims..., inner] (already holding x) combined with updates [count, inner] at index vectors."""
    for i in range(count):
        at = _vector(indices, index_code, i * dims.shape[0], dims)
        if at < 0:
            return i + 1
        for j in range(inner):
            _combine(y, code, at * inner + j, updates, i * inner + j, how)
    return 0


@jit
def scatter_elements(
    indices: int,
    index_code: int,
    updates: int,
    y: int,
    code: int,
    shape: Any,
    y_shape: Any,
    axis: int,
    how: int,
) -> int:
    """y (already holding x) combined with each update, at its own coordinates but `axis`, which the index
    gives."""
    total = 1
    for d in range(shape.shape[0]):
        total *= shape[d]
    for i in range(total):
        at = _replaced(i, shape, y_shape, axis, load_i(indices, index_code, i))
        if at < 0:
            return i + 1
        _combine(y, code, at, updates, i, how)
    return 0
