"""Where a model keeps the cache of a layer: an input of its own in some order of axes, or a part of a stack;
as long as what is used, or of fixed length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Entry = tuple[str, int]  # ("key" | "value", layer)
AXES = "BHLD"
"""Layout of a schedule's states: batch, KV head, position, element."""


@dataclass(frozen=True)
class Place:
    """A cache's input and output. `layout` names the axes: those of AXES, some of them stored as one in
    parentheses, and axes of a stack, along which `slot` indexes. `rows` None: the cache grows; else it has
    that many rows, 0: any number. `heads` must be known where they are stored as one with another axis."""

    input: str
    output: str
    slot: tuple[int, ...] = ()
    layout: str = AXES
    rows: int | None = None
    heads: int = 0

    @property
    def axes(self) -> list[str]:
        """The layout, axis by axis."""
        return [a.strip("()") for a in re.findall(r"\(.*?\)|.", self.layout)]

    def state(self, array: Array, batch: int) -> Array:
        """The cache [B, Hkv, L, D] in an array of the model."""
        index = iter(self.slot)
        part = array[tuple(slice(None) if set(a) <= set(AXES) else next(index) for a in self.axes)]
        kept = [a for a in self.axes if set(a) <= set(AXES)]
        sizes: list[int] = []
        for name, size in zip(kept, part.shape, strict=True):
            one = {"B": batch, "H": self.heads}
            rest = size // max(int(np.prod([one.get(a, 1) for a in name])), 1)
            sizes += [size] if len(name) == 1 else [one.get(a, rest) for a in name]
        flat = part.reshape(sizes)
        return np.transpose(flat, ["".join(kept).index(a) for a in AXES])

    def part(self, state: Array) -> Array:
        """A cache [B, Hkv, L, D] with the model's axes, without those of a stack."""
        kept = [a for a in self.axes if set(a) <= set(AXES)]
        order = "".join(kept)
        turned = np.transpose(state, [AXES.index(a) for a in order])
        sizes = dict(zip(order, turned.shape, strict=True))
        return turned.reshape([int(np.prod([sizes[a] for a in name])) for name in kept])


def arrays(
    places: Mapping[Entry, Place], caches: Mapping[Entry, Array], room: int, given: bool
) -> dict[str, Array]:
    """The model's arrays by name, from caches [B, Hkv, P, D] of every entry: its inputs (`given`), else its
    outputs. Caches of any fixed length get `room` rows; rows behind the caches' are zero."""
    stacks: dict[str, list[tuple[Place, Array]]] = {}
    for entry, place in places.items():
        state = caches[entry]
        missing = 0 if place.rows is None else (place.rows or room) - state.shape[2]
        state = np.pad(state, ((0, 0), (0, 0), (0, max(missing, 0)), (0, 0)))
        stacks.setdefault(place.input if given else place.output, []).append((place, place.part(state)))
    return {name: _stacked(held) for name, held in stacks.items()}


def _stacked(held: Iterable[tuple[Place, Array]]) -> Array:
    parts = list(held)
    place, first = parts[0]
    if not place.slot:
        return first
    axes = place.axes
    stack = [i for i, a in enumerate(axes) if not set(a) <= set(AXES)]
    sizes = [max(p.slot[i] for p, _ in parts) + 1 for i in range(len(place.slot))]
    shape = list(first.shape)
    for axis, size in zip(stack, sizes, strict=True):
        shape.insert(axis, size)
    whole = np.zeros(shape, first.dtype)
    for p, part in parts:
        index = iter(p.slot)
        whole[tuple(next(index) if i in stack else slice(None) for i in range(len(axes)))] = part
    return whole


def read_places(table: Any) -> dict[Entry, Place]:
    """The places that a graph's roles tell ("caches": see the frontend's README). Raises KeyError, ValueError
    where it is malformed."""
    found = {}
    for name, row in dict(table).items():
        kind, layer = str(name).split(".")
        rows = str(row["rows"])
        grows = "past" in rows or rows == ""
        fixed = None if grows else int(rows) if rows.isdigit() else 0
        slot = tuple(int(i) for i in str(row["slot"]).split(",") if i)
        found[(kind, int(layer))] = Place(
            str(row["input"]), str(row["output"]), slot, str(row["layout"]), fixed, _number(row["heads"])
        )
    return found


def _number(text: Any) -> int:
    return int(text) if str(text).isdigit() else 0
