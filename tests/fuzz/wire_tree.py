"""Protobuf bytes as a tree that can be changed and written again, well formed or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

VARINT, FIXED64, SPAN, FIXED32 = 0, 1, 2, 5
EXTREMES = [0, 1, 2, 3, 7, 16, 127, 128, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63]
EXTREMES += [(1 << 64) - 1, (1 << 64) - 2, (1 << 64) - 7]
WORDS = [b"", b"\0", b"x\ny", b"\x1b[31mred", "\u202ename".encode(), b"../../etc/passwd", b"a" * 300, b"-1"]
WORDS += [b"ai.onnx", b"If", b"Loop", b"Constant", b"a*b*c*d", b"9" * 40, b"(a+b)**8", b"max()", b"\xff\xfe"]


@dataclass
class Item:
    """One field: a number, bytes, or a message (`parts`). `lie` is added to the length that is written."""

    number: int
    kind: int
    value: int | bytes = 0
    parts: list[Item] | None = None
    lie: int = 0


def parse(data: bytes, descriptor: Any) -> list[Item]:
    """The fields of a well-formed message of the type that `descriptor` describes."""
    items, at = [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            items.append(Item(number, kind, value))
            continue
        if kind == SPAN:
            size, at = _varint(data, at)
        else:
            size = 4 if kind == FIXED32 else 8
        chunk, at = data[at : at + size], at + size
        known = descriptor.fields_by_number.get(number)
        if kind == SPAN and known is not None and known.message_type is not None:
            items.append(Item(number, kind, parts=parse(chunk, known.message_type)))
        else:
            items.append(Item(number, kind, chunk))
    return items


def write(items: list[Item]) -> bytes:
    """The bytes of a message."""
    out = bytearray()
    for item in items:
        out += _number(item.number << 3 | item.kind)
        if item.kind == VARINT and isinstance(item.value, int):
            out += _number(item.value)
            continue
        body = write(item.parts) if item.parts is not None else item.value
        body = body if isinstance(body, bytes) else _number(body)
        if item.kind == SPAN:
            out += _number(max(len(body) + item.lie, 0))
        out += body
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@dataclass
class Places:
    """Every list of fields in a tree, and every field with the list that holds it."""

    lists: list[list[Item]] = field(default_factory=list)
    items: list[tuple[list[Item], int]] = field(default_factory=list)

    @staticmethod
    def of(tree: list[Item]) -> Places:
        """All places of a tree."""
        found, pending = Places(), [tree]
        seen: set[int] = set()  # a message that was doubled is one list in many places
        while pending:
            here = pending.pop()
            if id(here) in seen:
                continue
            seen.add(id(here))
            found.lists.append(here)
            found.items += [(here, i) for i in range(len(here))]
            pending += [i.parts for i in here if i.parts is not None]
        return found


def change(tree: list[Item], other: list[Item], rng: random.Random) -> None:
    """One random change: a field dropped, doubled, swapped, moved, changed, or taken from `other`."""
    places = Places.of(tree)
    if not places.items:
        return
    here, at = rng.choice(places.items)
    item = here[at]
    what = rng.randrange(10)
    if what == 0:
        del here[at]
    elif what == 1:
        here[at:at] = [item] * rng.choice([1, 1, 2, 40 if item.parts is None else 3])
    elif what == 2:
        to = rng.randrange(len(here))
        here[at], here[to] = here[to], here[at]
    elif what == 3:
        rng.choice(places.lists).append(item)
        if _cyclic(tree):
            rng.choice(places.lists)[:] = []
    elif what == 4:
        item.number = rng.choice([item.number, rng.randrange(1, 30)])
    elif what == 5:
        item.kind = rng.choice([0, 1, 2, 3, 4, 5, 6, 7])
    elif what == 6:
        item.lie = rng.choice([-3, -1, 1, 2, 5, 1000, 1 << 20, 1 << 40])
    elif what == 7 and other:
        there = rng.choice(Places.of(other).items)
        here[at] = there[0][there[1]]
    else:
        item.value = _other_value(item, rng)


def _other_value(item: Item, rng: random.Random) -> int | bytes:
    if isinstance(item.value, int):
        return rng.choice([*EXTREMES, item.value + 1, max(item.value - 1, 0)])
    if not item.value or rng.random() < 0.5:
        return rng.choice(WORDS)
    cut = rng.randrange(len(item.value) + 1)
    return rng.choice([item.value[:cut], item.value + item.value, bytes(len(item.value)), item.value[::-1]])


def _cyclic(tree: list[Item]) -> bool:
    """Whether a message now holds itself."""
    open_: set[int] = set()

    def visit(items: list[Item]) -> bool:
        if id(items) in open_:
            return True
        open_.add(id(items))
        found = any(visit(i.parts) for i in items if i.parts is not None)
        open_.discard(id(items))
        return found

    return visit(tree)
