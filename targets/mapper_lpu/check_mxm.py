"""The MXM: weights are complete when installed and belong to the activations that meet them; results leave in
time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first, label
from mapper_lpu import isa
from mapper_lpu.check_columns import ACTIVATE, CODE, EMIT, INSTALL, LOAD, Bool, Columns, columns
from mapper_lpu.check_flow import flow
from mapper_lpu.check_names import names, related
from mapper_lpu.check_streams import unit

GROUPS = 20
_PLANES = [(h, p) for h in "ew" for p in (0, 1)]


@dataclass(frozen=True)
class MxmWeights:
    """Weights, activations and results of the MXM planes.

    - An install finds all 20 load groups loaded, and no load is issued while it lasts.
    - Every load is installed, and every install meets an activation.
    - An activation meets weights that were installed in this run, for its own op.
    - f16: both planes of a hemisphere are activated at once with the same streams; plane 0 holds the low
      bytes and plane 1 the high bytes of the same rows; int8: the plane holds one-byte weights.
    - Every activation's result is emitted `mxm.latency` later, and nothing else is.
    - The two results of an f16 activation meet in a `vxm.add`.
    """

    name: str = "MxmWeights"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(v for phase in schedule.programs for v in self._program(schedule, phase))

    def _program(self, schedule: Schedule, phase: str) -> Iterator[Violation]:
        table = columns(schedule, phase)
        planes = [_Plane.of(schedule, table, h, p) for h, p in _PLANES]
        for plane in planes:
            for step, why in plane.faults(schedule, table):
                yield _violation(schedule, table, int(step), why)
        for low, high in (planes[:2], planes[2:]):
            for step, why in _pair(table, low, high):
                yield _violation(schedule, table, int(step), why)
            for step, why in _joined(schedule, table, low, high):
                yield _violation(schedule, table, int(step), why)


def _violation(schedule: Schedule, table: Columns, step: int, why: str) -> Violation:
    message = f"{label(schedule, table.phase, table.times, step)} {why}"
    return Violation(message, (step,), unit(schedule, table, step), int(table.times.start[step]))


@dataclass(frozen=True)
class _Plane:
    """The steps of one plane in time order. `held[i, g]`: the load step of group g that install i copies (-1:
    none); `met[a]`: the install that activation a meets (-1: none); `weights`, of each step of the program:
    what a load carries (a number for value, ways, rows), its byte plane, and the planes of its value."""

    plane: int
    loads: Int
    installs: Int
    activations: Int
    emits: Int
    held: Int
    met: Int
    what: Int
    byte: Int
    bytes: Int

    @staticmethod
    def of(schedule: Schedule, table: Columns, h: str, p: int) -> _Plane:
        """The plane p of hemisphere h."""
        queue = {q: isa.UNITS.index(f"mxm.{h}.{p}.{q}") for q in ("load", "in", "out")}

        def steps(code: int, name: str) -> Int:
            found: Int = table.steps(code)
            mine: Int = found[table.step_unit[found] == queue[name]]
            return mine

        loads, installs = steps(LOAD, "load"), steps(INSTALL, "load")
        activations, emits = steps(ACTIVATE, "in"), steps(EMIT, "out")
        start = table.times.start
        group = table.args[table.row[loads], 0]
        held = np.full((len(installs), GROUPS), -1, np.int64)
        for g in range(GROUPS):
            step = loads[group == g]
            at = np.searchsorted(start[step], start[installs], side="left") - 1
            if len(step):
                held[:, g] = np.where(at >= 0, step[np.maximum(at, 0)], -1)
        limit = start[activations] - table.timing.install
        met = np.searchsorted(start[installs], limit, side="right") - 1
        what, byte, count = _contents(schedule, table, loads)
        return _Plane(p, loads, installs, activations, emits, held, met, what, byte, count)

    def faults(self, schedule: Schedule, table: Columns) -> Iterator[tuple[int, str]]:
        """(step, what is wrong) within the plane."""
        start = table.times.start
        for i in np.flatnonzero((self.held < 0).any(axis=1)):
            yield (
                self.installs[i],
                f"installs weights of which group {np.argmax(self.held[i] < 0)} was never loaded",
            )
        at = np.searchsorted(start[self.installs], start[self.loads], side="right") - 1
        if len(self.installs):
            during = (at >= 0) & (start[self.loads] < start[self.installs[at]] + table.timing.install)
            for step in self.loads[during]:
                yield step, "loads weights while they are being installed"
        for step in self.activations[self.met < 0]:
            yield step, "meets weights that were never installed"
        for step in self.loads[~np.isin(self.loads, self.held)]:
            yield step, "loads weights that are never installed"
        for step in self.installs[~np.isin(np.arange(len(self.installs)), self.met)]:
            yield step, "installs weights that no activation meets"
        yield from self._same_op(schedule, table)
        yield from self._results(table)

    def _same_op(self, schedule: Schedule, table: Columns) -> Iterator[tuple[int, str]]:
        ready = self.met >= 0
        held = self.held[self.met[ready]]
        step = np.repeat(self.activations[ready], GROUPS).reshape(held.shape)
        loaded = held >= 0
        bad = np.zeros(held.shape, bool)
        bad[loaded] = ~related(schedule, table, held[loaded], step[loaded])
        for row in np.flatnonzero(bad.any(axis=1)):
            yield step[row, 0], "meets weights that were loaded for an op without an edge to its own"
        kind = table.args[table.row[self.activations[ready]], 0]
        wanted = np.where(kind == isa.F16, self.plane, 0)[:, None]
        size = np.where(kind == isa.F16, 2, 1)[:, None]
        wrong = loaded & ((self.byte[held] != wanted) | (self.bytes[held] != size))
        for row in np.flatnonzero(wrong.any(axis=1)):
            yield step[row, 0], f"meets weights of which plane {self.plane} does not hold the right bytes"

    def _results(self, table: Columns) -> Iterator[tuple[int, str]]:
        start, latency = table.times.start, table.timing.latency
        for step in self.emits[~np.isin(start[self.emits] - latency, start[self.activations])]:
            yield step, f"emits where no activation was accepted {latency} cycles before"
        for step in self.activations[~np.isin(start[self.activations] + latency, start[self.emits])]:
            yield step, f"is accepted, but its result is not emitted {latency} cycles later"


def _contents(schedule: Schedule, table: Columns, loads: Int) -> tuple[Int, Int, Int]:
    """(what rows it carries, byte plane, planes of the value) of each step that is a load in `loads`, else
    -1."""
    edges, known = flow(schedule, table.phase), names(schedule)
    out = np.full((3, len(table.times) + 1), -1, np.int64)
    if not len(loads):
        return out[0], out[1], out[2]
    at = np.searchsorted(edges.used.step, loads)
    source = edges.source[at[:, None] + np.arange(16)]
    step = np.where(source >= 0, edges.made.step[source], -1)
    buffer = np.where(step >= 0, table.buffer[step], -1)
    mixed = np.zeros(len(loads), np.uint64)
    for column in (known.value[buffer], table.line[step], table.step_code[step]):
        for i in range(16):
            mixed = (mixed ^ column[:, i].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
    out[0][loads] = mixed.view(np.int64)
    out[1][loads] = known.plane[buffer[:, 0]]
    out[2][loads] = known.planes[buffer[:, 0]]
    return out[0], out[1], out[2]


def _f16(table: Columns, plane: _Plane) -> tuple[Int, Int]:
    """(activations of type f16, the installs that they meet)."""
    keep = table.args[table.row[plane.activations], 0] == isa.F16
    return plane.activations[keep], plane.met[keep]


def _pair(table: Columns, low: _Plane, high: _Plane) -> Iterator[tuple[int, str]]:
    """f16 activations come in pairs, and meet the two bytes of the same weights."""
    start = table.times.start
    (a, met_a), (b, met_b) = _f16(table, low), _f16(table, high)
    for mine, other in ((a, b), (b, a)):
        for step in mine[~np.isin(start[mine], start[other])]:
            yield step, "is of type f16, but the other plane is not activated with it"
    _, ia, ib = np.intersect1d(start[a], start[b], return_indices=True)
    streams = table.args[:, 1]
    for i in np.flatnonzero(streams[table.row[a[ia]]] != streams[table.row[b[ib]]]):
        yield a[ia[i]], "is of type f16, but the other plane takes other streams"
    ready = (met_a[ia] >= 0) & (met_b[ib] >= 0)
    ia, ib = ia[ready], ib[ready]
    if not len(ia):
        return
    left, right = low.held[met_a[ia]], high.held[met_b[ib]]
    differ: Bool = ((left >= 0) & (right >= 0) & (low.what[left] != high.what[right])).any(axis=1)
    for i in np.flatnonzero(differ):
        yield a[ia[i]], "is of type f16, but the two planes do not hold the bytes of the same weights"


def _joined(schedule: Schedule, table: Columns, low: _Plane, high: _Plane) -> Iterator[tuple[int, str]]:
    """The two results of each f16 activation are operands of one add."""
    edges, start = flow(schedule, table.phase), table.times.start
    made, used = edges.made, edges.used
    rows = np.flatnonzero(
        (edges.source >= 0) & (used.plane == 0) & (table.step_code[used.step] == CODE["vxm.add"])
    )
    consumer, producer = used.step[rows], made.step[edges.source[rows]]
    queues = [table.step_unit[plane.emits[:1]] for plane in (low, high)]
    if not (len(queues[0]) and len(queues[1])):
        return
    parts = []
    for queue in queues:
        from_plane = table.step_unit[producer] == queue[0]
        parts.append(consumer[from_plane] * (1 << 40) + start[producer[from_plane]])
    met = np.intersect1d(parts[0], parts[1]) % (1 << 40)
    activations = np.intersect1d(start[_f16(table, low)[0]], start[_f16(table, high)[0]])
    for at in activations[~np.isin(activations + table.timing.latency, met)]:
        step = int(low.activations[np.searchsorted(start[low.activations], at)])
        yield step, "is of type f16, but its two results do not meet in an add"
