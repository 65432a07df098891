"""How many chips a model needs, from its serving graph and the machine alone: what `--chips auto` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mapper.errors import CapacityError
from mapper.ir.graph import Graph
from mapper.ir.op import tensor_type
from mapper.ir.types import TensorType
from mapper.machine import Machine
from mapper.schedule.tables import Phase
from mapper_gpu.packed import dequantised, held_bytes, used

MOST_CHIPS = 64
_TABLES = ("embed", "embed_at", "rope_at", "scale_at")
_MARGIN = 1.002
"""Alignment of buffers, vectors, partial sums."""


def chips_for(graphs: Mapping[Phase, Graph], machine: Machine, item: int) -> int:
    """The fewest chips, in powers of two, whose memory holds matrices of `item` bytes an element, caches, and
    the values of all phases. Tables are on every chip. Raises CapacityError."""
    room = machine.value("memory.hbm.capacity") * (1 - machine.value("memory.hbm.reserved"))
    first = next(iter(graphs.values()))
    tables = {op.attr("table") for op in first.ops() if op.mnemonic in _TABLES}
    tables |= {
        op.attr("weight") for op in first.ops() if op.mnemonic == "load" and len(op.result_shape()) > 1
    }
    shared = sum(w.elements for n, w in first.weights.items() if n in tables)
    plain = dequantised(first)
    matrices = sum(
        w.elements * item if n in plain else held_bytes(w, item, turned)
        for n, w, turned in used(first) if n not in tables
    )  # fmt: skip
    heads = {op.attr("weight") for op in first.ops() if op.mnemonic == "lm_head"} & tables
    split = matrices + item * sum(first.weights[n].elements for n in heads)
    states = [tensor_type(first.input_values[n]) for n in first.inputs_with_role("state")]
    values = sum(_values(g) for g in graphs.values())
    chips = 1
    while _MARGIN * (split / chips + (_caches(states, chips) + shared) * item + values * 4) > room:
        chips *= 2
        if chips > MOST_CHIPS:
            need = split + _caches(states, 1) * item
            raise CapacityError(
                f"gpu: {need:.0f} bytes of weights and caches do not fit {MOST_CHIPS} x {machine.name}"
            )
    return chips


def _caches(states: Sequence[TensorType], chips: int) -> int:
    """Elements of all caches on one chip: heads are shared out, and copied where there are fewer of them."""
    return sum(math.prod(t.ints) // min(chips, t.ints[1]) for t in states)


def _values(graph: Graph) -> int:
    """Elements of all activations, those of a repeat once (views count again: an upper figure)."""
    results = (v for op in graph.ops() if op.mnemonic not in ("repeat", "cache_append") for v in op.results)
    return sum(math.prod(tensor_type(v).ints) for v in results)
