"""Checks of what tasks cover: output tiles, stretches of the cache, fused cuts, collectives; and pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mapper import machine as machines
from mapper.schedule.tables import Int, Schedule
from mapper.schedule.violation import Violation, first
from mapper_gpu.check_rows import EXCHANGES, Rows, exchanges, replica_of, rows_of, sends, stage_of

HEAVY = {"linear", "attention", "allreduce", "allgather", *EXCHANGES, "expert_up", "expert_down"}
"""Kinds of nodes of which a kernel has at most one."""


def of_kind(schedule: Schedule, rows: Rows, name: str) -> Any:
    """Which rows have an opcode."""
    return rows["opcode"] == list(schedule.opcodes).index(name)


def painted(boxes: Int, size: tuple[int, ...]) -> str:
    """How boxes [n, 2 x dims] fail to cover [0, size) exactly once; "" where they do."""
    dims = len(size)
    if not len(boxes):
        return "no task"
    edges = [
        np.unique(np.concatenate([boxes[:, 2 * d], boxes[:, 2 * d + 1], [0, size[d]]])) for d in range(dims)
    ]
    if any(e[0] < 0 or e[-1] > size[d] for d, e in enumerate(edges)):
        return "a tile outside"
    count = np.zeros([len(e) - 1 for e in edges], np.int32)
    places = [np.searchsorted(edges[d], boxes[:, 2 * d : 2 * d + 2]) for d in range(dims)]
    for i in range(len(boxes)):
        count[tuple(slice(int(p[i, 0]), int(p[i, 1])) for p in places)] += 1
    if (count == 1).all():
        return ""
    return "a part that no tile covers" if (count == 0).any() else "a part that two tiles cover"


def chips_of(rows: Rows, schedule: Schedule) -> Int:
    """The chip of each row."""
    return rows["unit"] // (len(schedule.units) // schedule.chips)


@dataclass(frozen=True)
class TilesCover:
    """The tiles of a product cover all rows, columns and all of K exactly once, on every chip, lane by
    lane; its merges cover all rows and columns once."""

    name: str = "TilesCover"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        for rows, record in rows_of(schedule):
            boxes = np.stack([rows[k] for k in ("m0", "m1", "n0", "n1", "k0", "k1")], axis=1)
            chip = chips_of(rows, schedule)
            programs = schedule.plan["programs"][rows.phase]
            for number, kernel in enumerate(record["kernels"]):
                if kernel["kind"] != "product":
                    continue
                mine = rows["kernel"] == number
                here = stage_of(schedule, record)
                yield from self._product(schedule, rows, kernel, number, mine, boxes, chip, programs, here)

    def _product(
        self, schedule: Schedule, rows: Rows, kernel: Any, number: int, mine: Any, boxes: Int, chip: Int,
        programs: Any, chips: range,
    ) -> Iterator[Violation]:  # fmt: skip
        main, merge = of_kind(schedule, rows, "product"), of_kind(schedule, rows, "product_merge")
        m, k = int(kernel["tile"]["rows"]), int(kernel["weights"][0]["k"] if kernel["weights"] else 0)
        lanes = _lanes(rows, kernel, mine & main, programs)
        splits = int(kernel["tile"]["splits"])
        for c in chips:
            for lane, (n, depth, selected) in enumerate(lanes):
                here = selected & (chip == c)
                wrong = painted(boxes[here], (m, n, depth or k))
                if wrong:
                    yield Violation(f"{rows.kernel(number)}, lane {lane} on chip {c}: {wrong}")
            if splits > 1:
                joined = mine & merge & (chip == c)
                tiles = np.unique(
                    np.concatenate(
                        [
                            boxes[mine & main & (chip == c)][:, :4],
                            rows["join"][mine & main & (chip == c)][:, None],
                        ],
                        axis=1,
                    ),
                    axis=0,
                )
                merged = np.concatenate([boxes[joined][:, :4], rows["join"][joined][:, None]], axis=1)
                same = len(tiles) == len(merged) and np.array_equal(tiles, np.unique(merged, axis=0))
                if not same:
                    yield Violation(f"{rows.kernel(number)}: merges of other tiles than there are")


def _lanes(rows: Rows, kernel: Any, selected: Any, programs: Any) -> list[tuple[int, int, Any]]:
    """(columns, K, rows of the table) of each lane of a product: lanes are told apart by the weights they
    read."""
    found: list[tuple[int, int, Any]] = []
    weight = {w["name"]: w for w in kernel["weights"]}
    groups: dict[tuple[str, ...], list[int]] = {}
    for program in np.unique(rows["program"][selected]).tolist():
        names = tuple(o["value"] for o in programs[program]["reads"] if o["r"] == "n")
        groups.setdefault(names, []).append(program)
    for names, mine in groups.items():
        reads = next(o for o in programs[mine[0]]["reads"] if o["r"] == "n")
        found.append((int(reads["rows"]), int(reads["width"]), selected & np.isin(rows["program"], mine)))
        del names
    if len(groups) != len(kernel["lanes"]):
        found += [
            (int(lane["n"]), 0, np.zeros(len(selected), bool)) for lane in kernel["lanes"][len(groups) :]
        ]
    del weight
    return found


@dataclass(frozen=True)
class SplitsCover:
    """For every sequence, token and cache head, the stretches of the cache cover [0, length) exactly once,
    and a split one is merged once."""

    name: str = "SplitsCover"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        for rows, record in rows_of(schedule):
            chip = chips_of(rows, schedule)
            for number, kernel in enumerate(record["kernels"]):
                if kernel["kind"] != "attention":
                    continue
                a, mine = kernel["attention"], rows["kernel"] == number
                width = int(a["heads"]) * int(a["value_dim"])
                size = (int(a["batch"]) * int(a["tokens"]), width, int(a["length"]))
                for c in stage_of(schedule, record):
                    for name in ("attention", "attention_merge"):
                        here = mine & (chip == c) & of_kind(schedule, rows, name)
                        if name == "attention_merge" and int(kernel["split"]["splits"]) < 2:
                            continue
                        boxes = np.stack(
                            [rows[k][here] for k in ("m0", "m1", "n0", "n1", "k0", "k1")], axis=1
                        )
                        wrong = painted(boxes, size)
                        if wrong:
                            yield Violation(f"{rows.kernel(number)} on chip {c}, {name}: {wrong}")


@dataclass(frozen=True)
class FusionConvex:
    """Every node belongs to exactly one kernel, and no path leaves a kernel and comes back; a kernel has
    one kind of heavy node."""

    name: str = "FusionConvex"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(
            v for phase in schedule.programs for i, record in enumerate(schedule.plan["blocks"][phase])
            for v in self._block(f"{phase}, block {i}", record)
        )  # fmt: skip

    def _block(self, where: str, record: Any) -> Iterator[Violation]:
        nodes = [(k, n) for k, kernel in enumerate(record["kernels"]) for n in kernel["nodes"]]
        count = Counter(n["number"] for _, n in nodes)
        if any(c != 1 for c in count.values()) or sorted(count) != list(range(len(count))):
            yield Violation(f"{where}: the kernels do not hold every node once")
            return
        owner = {n["number"]: k for k, n in nodes}
        maker = {n["output"]: n["number"] for _, n in nodes}
        before = {n["number"]: {maker[v] for v in n["inputs"] if v in maker} for _, n in nodes}
        for k, kernel in enumerate(record["kernels"]):
            heavy = {n["kind"] for n in kernel["nodes"]} & HEAVY
            if len(heavy) > 1:
                yield Violation(f"{where}: kernel {k} has {' and '.join(sorted(heavy))}")
            above = _above({n["number"] for n in kernel["nodes"]}, before, owner, k)
            if above is not None:
                yield Violation(f"{where}: a path leaves kernel {k} and comes back through node {above}")
            later = [n["number"] for n in kernel["nodes"] if any(owner[p] > k for p in before[n["number"]])]
            if later:
                yield Violation(f"{where}: kernel {k} reads what a later kernel makes (node {later[0]})")


def _above(members: set[int], before: dict[int, set[int]], owner: dict[int, int], kernel: int) -> int | None:
    """A node outside of the kernel that lies between two of its nodes, or None."""
    pending = [p for n in members for p in before[n] if owner[p] != kernel]
    seen: set[int] = set()
    while pending:
        n = pending.pop()
        if n in seen:
            continue
        seen.add(n)
        if any(owner[p] == kernel for p in before[n]):
            return n
        pending += before[n]
    return None


@dataclass(frozen=True)
class CollectivesMatched:
    """Every chip takes part in every collective, once per stage, and reads the same bytes of the same value
    from all chips of its replica, its own included, and from no others. (What passes between replicas
    ExchangesHold looks at.)"""

    name: str = "CollectivesMatched"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        memory = np.asarray(schedule.buffers.column("memory").to_numpy(), np.int64)
        for rows, record in rows_of(schedule):
            chip, link = chips_of(rows, schedule), of_kind(schedule, rows, "collective")
            sent = [sends(k) or bool(exchanges(k)) for k in record["kernels"]]
            link &= ~np.array(sent)[rows["kernel"]]
            group = stage_of(schedule, record)
            for stage in np.unique(rows["stage"][link]).tolist():
                mine = np.flatnonzero(link & (rows["stage"] == stage))
                if sorted(chip[mine].tolist()) != list(group):
                    yield Violation(
                        f"{rows.phase}, block {rows.number}, stage {stage}: not one task on each chip"
                    )
                offsets, buffer, _, _ = rows.block.steps.slices("reads")
                for row in mine.tolist():
                    chips = memory[buffer[offsets[row] : offsets[row + 1]]].tolist()
                    if set(chips) != set(replica_of(schedule, group, int(chip[row]))):
                        yield Violation(f"{rows.name(row)} does not read from every chip", (row,))


@dataclass(frozen=True)
class PagesDisjoint:
    """A task's pages of shared memory lie inside the SM's; no two tasks that are on an SM at once share one
    (in a persistent kernel a task's pages are filled while the one before it runs); the accumulators of a
    product tile fit half of the registers."""

    name: str = "PagesDisjoint"

    def run(self, schedule: Schedule) -> list[Violation]:
        """See class."""
        return first(self._all(schedule))

    def _all(self, schedule: Schedule) -> Iterator[Violation]:
        machine = machines.parse(schedule.machine_toml, schedule.machine)
        room = int(machine.value("sm.shared") // machine.value("sm.page"))
        registers = machine.value("sm.registers") / 2
        for rows, _ in rows_of(schedule):
            first_page, pages = rows["page"], rows["pages"]
            for row in np.flatnonzero((first_page < 0) | (pages < 1) | (first_page + pages > room)).tolist():
                yield Violation(
                    f"{rows.name(row)}: {pages[row]} pages from page {first_page[row]} on, of {room}",
                    (row,),
                    limit=float(room),
                )
            programs = schedule.plan["programs"][rows.phase]
            made = np.array([sum(i[0] == "matmul" for i in p["code"]) for p in programs])
            held = (
                4
                * (rows["m1"] - rows["m0"])
                * (rows["n1"] - rows["n0"])
                * made[np.clip(rows["program"], 0, len(made) - 1)]
            )
            for row in np.flatnonzero(of_kind(schedule, rows, "product") & (held > registers)).tolist():
                yield Violation(
                    f"{rows.name(row)} accumulates in {held[row]} bytes of registers", (row,), limit=registers
                )
            yield from _shared_pages(rows, schedule.plan["style"] == "megakernel")


def _shared_pages(rows: Rows, early: bool) -> Iterator[Violation]:
    unit, start, end = rows["unit"], rows["start"].copy(), rows["start"] + rows["duration"]
    page, pages = rows["page"], rows["pages"]
    order = np.lexsort((start, unit)).tolist()
    if early:
        for a, b in reversed(list(pairwise(order))):
            if unit[a] == unit[b]:
                start[b] = start[a]
    else:
        at = np.array(order)
        busy = (unit[at][1:] == unit[at][:-1]) & (start[at][1:] < end[at][:-1])
        if not busy.any():
            return
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            if unit[b] != unit[a] or start[b] >= end[a]:
                break
            if page[a] < page[b] + pages[b] and page[b] < page[a] + pages[a]:
                yield Violation(
                    f"{rows.name(b)} takes pages that row {a} holds until {end[a]}",
                    (a, b),
                    None,
                    int(start[b]),
                )


CHECKS = (TilesCover(), SplitsCover(), FusionConvex(), CollectivesMatched(), PagesDisjoint())
