"""Stretches of known length that begin at a number from the data: rows `at` .. `at + n - 1`."""

from __future__ import annotations

from mapper.frontend import build as b
from mapper.frontend.net import Net, Value
from mapper.ir.dims import ONE, ZERO, Dim


def stretch(start: Value, end: Value) -> Dim | None:
    """n where `end` is `start` + n, each of one element; None where the difference depends on the data."""
    if start.content is not None and end.content is not None:
        return end.content[0] - start.content[0]
    first, last = _plain(start), _plain(end)
    if last.op != "add":
        return None
    for part, more in (last.args, last.args[::-1]):
        if _plain(part) is first and more.content is not None and len(more.content) == 1:
            return more.content[0]
    return None


def _plain(value: Value) -> Value:
    """A number behind views and casts between integer types."""
    while value.op == "reshape" or (value.op == "cast" and value.args[0].dtype in ("i64", "i32")):
        value = value.args[0]
    return value


def counted(net: Net, start: Value, length: Dim) -> Value:
    """[n]: `length` numbers from `start` on, of its type."""
    steps = b.cast(net, b.iota(net, ZERO, length, 1), start.dtype)
    return b.binary(net, "add", steps, b.reshape(net, start, [ONE]))


def rows_from(net: Net, x: Value, start: Value, end: Value, axis: int) -> Value | None:
    """`x` from `start` to `end` along an axis, where the length is known; None where it is not.

    The stretch is taken to lie inside: one that does not is an error, where ONNX would cut it."""
    length = stretch(start, end)
    if length is None or start.dims not in ((), (ONE,)):
        return None
    return b.gather(net, x, counted(net, b.cast(net, start, "i64"), length), axis)
