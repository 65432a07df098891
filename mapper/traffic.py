"""The bytes that a decode step must read: its weights as stored, and the cache that there is so far."""

from __future__ import annotations

from dataclasses import dataclass

from mapper.ir.cost import seen_from
from mapper.ir.graph import Graph
from mapper.runtime.inputs import state_name, states
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import Schedule


@dataclass(frozen=True)
class Traffic:
    """`weights`: bytes of a step; `caches`: bytes per position of every cache, and window and chunk of the
    attention that reads it (0: none)."""

    weights: int
    caches: tuple[tuple[int, int, int], ...]

    def bytes(self, length: int) -> int:
        """Bytes that a step reads whose token is number `length` of the sequence, counted from 1."""
        last = length - 1
        return self.weights + sum(s * (length - seen_from(last, *masks)) for s, *masks in self.caches)


def of(schedule: Schedule, graph: Graph) -> Traffic:
    """The traffic of a schedule's decode program: weights from its ops table, caches from its state ports,
    and windows and runs of attention from the graph that it was made of."""
    rows = schedule.ops.select(["program", "weight_bytes", "repeat"]).to_pylist()
    weights = sum(int(r["weight_bytes"]) * int(r["repeat"]) for r in rows if r["program"] == "decode")
    kinds = {port.name: dtype(port.dtype).itemsize for port in schedule.ports}
    shapes, windows = states(schedule), _windows(graph.phase("decode"))
    layers = {layer for _, layer in shapes}
    reach = dict(enumerate(windows)) if len(windows) == len(layers) else {}
    return Traffic(
        weights,
        tuple(
            (b * h * d * kinds[state_name(entry)], *reach.get(entry[1], (0, 0)))
            for entry, (b, h, _, d) in shapes.items()
        ),
    )


def _windows(graph: Graph) -> list[tuple[int, int]]:
    """Window and chunk of each layer's attention in order, 0: none."""
    found: list[tuple[int, int]] = []
    for section in graph.sections():
        attentions = [op for op in section.ops if op.mnemonic == "attention"]
        here = [(int(op.attr("window")), int(op.attr("chunk"))) for op in attentions]
        found += here * section.count
    return found
