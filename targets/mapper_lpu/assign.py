"""VXM assignment: which ALU runs each operation of a chain, and on which stream group each value travels.

The wiring rule of the VXM (ISA.md) makes this a constraint problem: an ALU of row r sees the groups 2r..2r+3
(mod 8), a value passed on inside must flow from rank to rank in its direction, some operations need a large
ALU. Solved by depth-first search with a node budget; other seeds give other solutions, so that chains may
share the VXM in time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from mapper_lpu.isa import ALUS, EAST, LARGE_ALUS, SMALL_OPS, WEST

_BUDGET = 300
_ATTEMPTS = 60
GROUPS = 8


@dataclass(frozen=True)
class Node:
    """One operation to assign: offset and count give its issue cycles; operands by kind; where its result
    must go.
    """

    opcode: str
    offset: int
    count: int
    outer: tuple[tuple[int, int], ...]  # (operand slot, direction)
    inner: tuple[tuple[int, int], ...]  # (operand slot, producing node)
    hold: int | None  # node whose result is taken from the output register
    direction: int | None  # forced direction of the result; None: free
    result: bool  # whether the result travels on a stream at all
    result_from: int  # first vector whose result travels


@dataclass
class Assignment:
    """alu[n]; out[n] = (direction, group) or None; outer[(n, slot)] = group."""

    alu: dict[int, int] = field(default_factory=dict)
    out: dict[int, tuple[int, int]] = field(default_factory=dict)
    outer: dict[tuple[int, int], int] = field(default_factory=dict)


_WINDOWS = tuple(tuple((2 * (alu // 4) + i) % GROUPS for i in range(4)) for alu in range(ALUS))


def window(alu: int) -> tuple[int, ...]:
    """Stream groups that an ALU can read: 2 r .. 2 r + 3 (mod 8) in row r."""
    return _WINDOWS[alu]


class _Search:
    def __init__(self, nodes: Sequence[Node], entry: int, latency: int, seed: int) -> None:
        self.nodes, self.entry, self.latency = nodes, entry, latency
        self.rng = random.Random(seed)
        self.found = Assignment()
        self.alu_busy: dict[int, list[tuple[int, int]]] = {}
        self.group_busy: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.budget = _BUDGET
        self.held = {n.hold: i for i, n in enumerate(nodes) if n.hold is not None}
        self.feeds: dict[int, list[int]] = {}
        for i, n in enumerate(nodes):
            for _, producer in n.inner:
                self.feeds.setdefault(producer, []).append(i)

    def run(self) -> Assignment | None:
        return self.found if self._node(0) else None

    def _node(self, index: int) -> bool:
        if index == len(self.nodes):
            return True
        self.budget -= 1
        if self.budget < 0:
            return False
        node = self.nodes[index]
        alus = [self.found.alu[node.hold]] if node.hold is not None else self._order(ALUS)
        return any(self._alu(index, node, alu) for alu in alus)

    def _order(self, count: int) -> list[int]:
        order = list(range(count))
        self.rng.shuffle(order)
        order.sort(key=lambda n: n in LARGE_ALUS)  # keep the large ones for what needs them
        return order

    def _alu(self, index: int, node: Node, alu: int) -> bool:
        if node.opcode not in SMALL_OPS and alu not in LARGE_ALUS:
            return False
        begin = node.offset
        end = node.offset + node.count
        user = self.held.get(index)
        if user is not None:
            end = self.nodes[user].offset + 1
        if node.hold is not None:
            begin = node.offset + (1 if node.offset < self._held_until(node.hold) else 0)
        if self._overlaps(self.alu_busy.get(alu, []), begin, end):
            return False
        seen = {}
        for slot, producer in node.inner:
            direction, group = self.found.out[producer]
            if group not in window(alu) or not self._downstream(self.found.alu[producer], alu, direction):
                return False
            seen[slot] = (direction, group)
        if any(a[1] == b[1] and a[0] != b[0] for s, a in seen.items() for t, b in seen.items() if s < t):
            return False
        self.found.alu[index] = alu
        self.alu_busy.setdefault(alu, []).append((begin, end))
        if self._outers(index, node, alu, 0, seen):
            return True
        self.alu_busy[alu].pop()
        del self.found.alu[index]
        return False

    def _held_until(self, producer: int) -> int:
        user = self.held[producer]
        return self.nodes[user].offset + 1

    @staticmethod
    def _downstream(producer: int, consumer: int, direction: int) -> bool:
        return producer % 4 < consumer % 4 if direction == EAST else producer % 4 > consumer % 4

    @staticmethod
    def _overlaps(intervals: Sequence[tuple[int, int]], begin: int, end: int) -> bool:
        return any(begin < e and b < end for b, e in intervals)

    def _outers(self, index: int, node: Node, alu: int, which: int, seen: dict[int, tuple[int, int]]) -> bool:
        if which == len(node.outer):
            return self._result(index, node)
        slot, direction = node.outer[which]
        begin = node.offset - self.entry
        groups = list(window(alu))
        self.rng.shuffle(groups)
        for group in groups:
            if any(g == group and d != direction for d, g in seen.values()):
                continue
            taken = self.group_busy.setdefault((direction, group), [])
            if self._overlaps(taken, begin, begin + node.count):
                continue
            taken.append((begin, begin + node.count))
            self.found.outer[(index, slot)] = group
            if self._outers(index, node, alu, which + 1, {**seen, slot: (direction, group)}):
                return True
            taken.pop()
            del self.found.outer[(index, slot)]
        return False

    def _result(self, index: int, node: Node) -> bool:
        if not node.result:
            return self._node(index + 1)
        begin = node.offset + self.latency + node.result_from
        end = node.offset + self.latency + node.count
        options = [
            (d, g)
            for d in ((EAST, WEST) if node.direction is None else (node.direction,))
            for g in range(GROUPS)
            if self._useful(index, d)
        ]
        self.rng.shuffle(options)
        for option in options if self.feeds.get(index) else options[:3]:
            taken = self.group_busy.setdefault(option, [])
            if self._overlaps(taken, begin, end):
                continue
            taken.append((begin, end))
            self.found.out[index] = option
            if self._node(index + 1):
                return True
            taken.pop()
            del self.found.out[index]
        return False

    def _useful(self, index: int, direction: int) -> bool:
        if not self.feeds.get(index):
            return True
        rank = self.found.alu[index] % 4
        return rank < 3 if direction == EAST else rank > 0


@cache
def assign(nodes: tuple[Node, ...], entry: int, latency: int, seed: int) -> Assignment | None:
    """An assignment that meets the wiring rule, or None where the search finds none within its budget.

    Many short searches from different orders find one sooner than a long one. `entry` and `latency` are the
    machine's vxm.entry and vxm.alu in cycles.
    """
    for attempt in range(_ATTEMPTS):
        found = _Search(nodes, entry, latency, seed * _ATTEMPTS + attempt).run()
        if found is not None:
            return found
    return None
