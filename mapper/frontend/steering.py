"""What the small integer inputs of a cache of fixed length say: how many rows hold tokens, where new ones go.

Found numerically: an input means that of the meanings known here with which the rows written are those after
the past, or the attention mask is causal over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mapper.errors import MapperError
from mapper.frontend.agree import Probe
from mapper.frontend.net import Array, Node, Value, numpy_of
from mapper.ir.dims import Dim

LENGTHS = ("write_index", "last_index", "total_length")
"""Tokens before this step; index of its last token; tokens after it."""
_PROBES = ((3, 4), (1, 5), (4, 0))  # (new tokens, past)
_MORE = 3  # rows that a cache of unknown length has to spare
Meanings = Mapping[str, str]


@dataclass(frozen=True)
class Steering:
    """What is known of a graph's small integer inputs, by name. `fixed`: its caches have a fixed length."""

    fixed: bool = False
    meanings: Meanings = field(default_factory=dict)


def sizes(new: int, past: int) -> dict[str, int]:
    """The symbols' values for one sequence of `new` tokens after `past`."""
    return {"batch": 1, "sequence": new, "past": past, "capacity": past + new + _MORE}


def fed(leaf: Value, new: int, past: int, meanings: Meanings) -> Array:
    """An input of a cache of fixed length, for one sequence without padding. Raises ValueError where its
    fixed size is too short."""
    known = sizes(new, past)
    shape = tuple(d.evaluate(known) if d.symbols <= set(known) else past + new for d in leaf.dims)
    meaning = meanings.get(leaf.source, "")
    if meaning in LENGTHS:
        value = {"write_index": past, "last_index": past + new - 1, "total_length": past + new}[meaning]
        return np.full(shape, value)
    if is_positions(leaf):
        return np.broadcast_to(np.arange(past, past + new), shape).copy()
    tokens = np.ones(shape, numpy_of(leaf.dtype))
    if shape and shape[-1] < past + new and leaf.rank >= 2:
        raise ValueError(f"{past + new} tokens in {shape[-1]} places")
    if leaf.rank >= 2:
        tokens[..., past + new :] = 0
    return tokens


def is_positions(leaf: Value) -> bool:
    """Whether an input is shaped like the positions of the new tokens."""
    return leaf.dtype in ("i64", "i32") and leaf.dims[-1:] == (Dim.symbol("sequence"),)


def unknown(leaves: Sequence[Value], meanings: Meanings) -> list[Value]:
    """The integer inputs with one number, or one per sequence, that have no meaning yet."""
    return [
        v
        for v in leaves
        if v.source and v.dtype in ("i64", "i32") and v.rank <= 1 and not is_positions(v)
        if v.source not in meanings
    ]


def hypotheses(leaves: Sequence[Value], meanings: Meanings) -> Iterator[dict[str, str]]:
    """Every way to give the unknown ones among some leaves a meaning, with what is known."""
    open_ = unknown(leaves, meanings)
    if len(open_) <= 2:
        for chosen in itertools.product(LENGTHS, repeat=len(open_)):
            yield {**meanings, **{v.source: m for v, m in zip(open_, chosen, strict=True)}}


def from_rows(nodes: Sequence[Node]) -> Steering:
    """What the rows written into caches tell."""
    rows = {id(n.inputs[2]): n.inputs[2] for n in nodes if n.op == "kv_update"}
    meanings: dict[str, str] = {}
    for value in rows.values():
        probe = Probe.of([value], [])
        for guess in hypotheses(probe.leaves, meanings):
            if all(_follow(probe, new, past, guess) for new, past in _PROBES):
                meanings = guess
                break
    return Steering(bool(rows), meanings)


def _follow(probe: Probe, new: int, past: int, meanings: Meanings) -> bool:
    try:
        arrays = {id(v): fed(v, new, past, meanings) for v in probe.leaves if v.source}
        (found,) = probe.evaluate(sizes(new, past), arrays)
    except (MapperError, ValueError):
        return False
    return found.shape[-1:] == (new,) and bool((found == np.arange(past, past + new)).all())
