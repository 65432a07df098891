"""Checks of experts that groups of chips own: every expert has one owner in each replica, or among all of
them, whose tasks look for its tokens; and what passes between replicas comes from the right chips, is all of
it, and pays for its way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper import machine as machines
from mapper.schedule.tables import Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_experts import of_even_routing
from mapper_gpu.check_rows import ITEM, LINK, NETWORK, Rows, exchanges, replicas_of, rows_of, stage_of


@dataclass(frozen=True)
class ExchangesHold:
    """An exchange has one task on each chip of its stage. It reads the replicas' parts in their order from
    the chips that have its own rank in them; what comes back is the sum over rows of the chip's own tokens.
    It carries the bytes that come from other replicas, of experts' rows those of the fullest group of an even
    routing, and pays for the network where that joins link domains."""

    name: str = "ExchangesHold"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        replicas = replicas_of(schedule)
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        for rows, record in rows_of(schedule):
            group = stage_of(schedule, record)
            for number, kernel in enumerate(record["kernels"]):
                kind = exchanges(kernel)
                if not kind:
                    continue
                mine = np.flatnonzero(rows["kernel"] == number)
                chip = rows["unit"][mine] // (len(schedule.units) // schedule.chips)
                if sorted(chip.tolist()) != list(group):
                    yield Violation(f"{rows.kernel(number)}: not one task on each chip")
                    continue
                least = _least(schedule, machine, rows, int(mine[0]), kind, replicas, group)
                for row, c in zip(mine.tolist(), chip.tolist(), strict=True):
                    yield from _task(schedule, rows, row, c, kind, replicas, group)
                    yield from _pays(rows, row, machine, replicas, group, least)


def _task(
    schedule: Schedule, rows: Rows, row: int, chip: int, kind: str, replicas: int, group: range
) -> Iterator[Violation]:
    size = len(group) // replicas
    replica, rank = divmod(chip - group.start, size)
    peers = [group.start + d * size + rank for d in range(replicas)]
    program = schedule.plan["programs"][rows.phase][int(rows["program"][row])]
    away = [o for o in program["reads"] if int(o["chip"]) >= 0]
    for value in dict.fromkeys(o["value"] for o in away):
        asked = [int(o["chip"]) for o in away if o["value"] == value]
        if asked != peers:
            yield Violation(f"{rows.name(row)} reads {value} of chips {asked}, not of {peers}", (row,))
    if len({o["value"] for o in away}) != (2 if kind == "collect" else 1):
        yield Violation(f"{rows.name(row)} does not read what a {kind} takes from each replica", (row,))
    if any(o["r"] != "all" for o in away if kind != "collect" or o["value"] == away[0]["value"]):
        yield Violation(f"{rows.name(row)} reads parts of what the replicas have", (row,))
    box = [int(rows[k][row]) for k in ("m0", "m1", "n0", "n1", "k0", "k1")]
    made = program["writes"][0]
    want = [0, int(made["rows"]), 0, int(made["width"]), 0, 0]
    if kind == "collect":
        own = schedule.request.batch // replicas * schedule.programs[rows.phase].sequence
        want = [0, own, replica * own, (replica + 1) * own, 0, 0]
    if box != want:
        yield Violation(f"{rows.name(row)} is at {box}, not at {want}", (row,))


def _pays(
    rows: Rows, row: int, machine: machines.Machine, replicas: int, group: range, least: float
) -> Iterator[Violation]:
    domain = machine.whole("link.domain")
    far = group.start // domain != (group.stop - 1) // domain
    if rows["lead"][row] != (NETWORK if far else LINK):
        yield Violation(f"{rows.name(row)} does not pay for its link", (row,))
    if rows["near"][row] + 1 < least:
        yield Violation(f"{rows.name(row)} carries {rows['near'][row]} bytes, not {least:.0f}", (row,))


def _least(
    schedule: Schedule,
    machine: machines.Machine,
    rows: Rows,
    row: int,
    kind: str,
    replicas: int,
    group: range,
) -> float:
    """Bytes that a task carries at least, those inside of a link domain at the link's rate and those from
    outside at the network's, counted at the slower one. What there is of experts the weights' ports say."""
    domain = machine.whole("link.domain")
    size = len(group) // replicas
    near = replicas if len(group) <= domain else max(1, domain // size)
    program = schedule.plan["programs"][rows.phase][int(rows["program"][row])]
    first_away = next(o for o in program["reads"] if int(o["chip"]) >= 0)
    each = float(first_away["width"]) * ITEM[first_away["dtype"]]
    whole = each * float(first_away["rows"]) * replicas
    if kind != "exchange":
        tokens = schedule.request.batch * schedule.programs[rows.phase].sequence
        owned = _owners(schedule)
        whole = each * min(
            (of_even_routing(tokens, count, _chosen(program, kind), groups)[1] for groups, count in owned),
            default=0.0,
        )
    inside, outside = whole * (near - 1) / replicas, whole * (replicas - near) / replicas
    if near == replicas:
        return inside
    link, network = machine.value("link.bandwidth"), machine.value("network.bandwidth")
    return max(outside, inside * min(1.0, network / link))


def _chosen(program: Any, kind: str) -> int:
    """Experts that a token chooses, as a program has them."""
    if kind == "dispatch":
        return next(int(i[4]) for i in program["code"] if i[0] == "gather")
    return int([o for o in program["reads"] if int(o["chip"]) >= 0][1]["width"])


def _owners(schedule: Schedule) -> set[tuple[int, int]]:
    """(groups that own experts, experts) of the schedule's weights."""
    shared = [(p.layout["experts"], p.shape[0]) for p in schedule.ports if "experts" in p.layout]
    return {(int(e["inside"]) * int(e["spread"]), count) for e, count in shared}


@dataclass(frozen=True)
class ExpertsOwned:
    """Where experts have owners, a chip looks for the tokens of just those that it holds: the experts of the
    groups of one replica, or of all, follow each other and are all there are."""

    name: str = "ExpertsOwned"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        shared = {
            (int(p.layout["experts"]["inside"]), int(p.layout["experts"]["spread"]), p.shape[0])
            for p in schedule.ports
            if "experts" in p.layout
        }
        replicas = replicas_of(schedule)
        for inside, spread, count in shared:
            if count % (inside * spread) or spread not in (1, replicas):
                yield Violation(f"{count} experts for {inside} groups in each of {spread} replicas")
                return
        for rows, record in rows_of(schedule):
            group = stage_of(schedule, record)
            chip = rows["unit"] // (len(schedule.units) // schedule.chips)
            programs = schedule.plan["programs"][rows.phase]
            for row in np.flatnonzero(rows["opcode"] == list(schedule.opcodes).index("route")).tolist():
                for i in programs[int(rows["program"][row])]["code"]:
                    if i[0] in ("align", "places"):
                        asked = (int(i[7]), int(i[8])) if len(i) > 8 else (0, int(i[3]))
                        yield from _owned(
                            rows, row, asked, int(i[3]), shared, int(chip[row]), group, replicas
                        )


def _owned(
    rows: Rows, row: int, asked: tuple[int, int], count: int, shared: set[tuple[int, int, int]], chip: int,
    group: range, replicas: int,
) -> Iterator[Violation]:  # fmt: skip
    size = len(group) // replicas
    replica, rank = divmod(chip - group.start, size)
    want = {(0, count)}
    for inside, spread, total in shared:
        if total == count:
            own = count // (inside * spread)
            number = (replica * inside if spread > 1 else 0) + rank // (size // inside)
            want = {(number * own, own)}
    if asked not in want:
        yield Violation(f"{rows.name(row)} looks for experts {asked}, its chip has {sorted(want)}", (row,))


CHECKS = (ExchangesHold(), ExpertsOwned())
