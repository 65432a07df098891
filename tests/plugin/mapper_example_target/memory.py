"""Addresses: weights, states and constants one after the other; temporaries above them, by first fit."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from mapper.errors import CapacityError
from mapper.schedule.tables import BUFFER_SCHEMA

ALIGN = 64


@dataclass(eq=False)
class Buffer:
    """One buffer. `program` is "" for one that lasts; `first` and `last` are cycles (-1: before, beyond)."""

    value: str
    bytes: int
    program: str = ""
    first: int = -1
    last: int = -1
    offset: int = 0
    number: int = 0


def place(buffers: list[Buffer], capacity: int) -> pa.Table:
    """Give every buffer an address; the buffer table. Raises CapacityError."""
    end = 0
    for buffer in buffers:
        if not buffer.program:
            buffer.offset, end = end, end + _rounded(buffer.bytes)
    top = end
    for program in sorted({b.program for b in buffers} - {""}):
        placed: list[Buffer] = []
        for buffer in sorted((b for b in buffers if b.program == program), key=lambda b: (b.first, b.number)):
            buffer.offset = _first_fit(buffer, [p for p in placed if _together(p, buffer)], end)
            placed.append(buffer)
            top = max(top, buffer.offset + buffer.bytes)
    if top > capacity:
        raise CapacityError(f"the model needs {top} bytes of memory ram, which has {capacity}")
    rows = [
        {"memory": 0, **{k: getattr(b, k) for k in ("offset", "bytes", "value", "first", "last", "program")}}
        for b in buffers
    ]
    return pa.Table.from_pylist(rows, schema=BUFFER_SCHEMA)


def _rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _together(a: Buffer, b: Buffer) -> bool:
    return (a.last < 0 or a.last >= b.first) and (b.last < 0 or b.last >= a.first)


def _first_fit(buffer: Buffer, others: list[Buffer], base: int) -> int:
    at = base
    for other in sorted(others, key=lambda o: o.offset):
        if at + buffer.bytes <= other.offset:
            break
        at = max(at, _rounded(other.offset + other.bytes))
    return at
