"""What buffers and ops are called: `<value>[.<way>]#<plane>`, and which op's results an op may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from mapper.schedule.tables import Int, Schedule
from mapper_lpu.check_columns import Bool, Cache, Columns

_NAME = re.compile(r"(?P<base>.*?)(?:\.(?P<way>\d+))?(?:#(?P<plane>\d))?")


@dataclass(frozen=True)
class Names:
    """Per buffer: `value` (number of the name before '#'), `plane` (-1 where the name has none), `planes`
    (how many the value has), `base` (number of the name without way and plane), `way` (-1 without).
    The last row stands for no buffer."""

    value: Int
    plane: Int
    planes: Int
    base: Int
    way: Int


_NAMES, _RELATED = Cache(), Cache()


def names(schedule: Schedule) -> Names:
    """The parsed names of all buffers."""
    return _NAMES.get(schedule, "", _names)


def _names(schedule: Schedule, _: str) -> Names:
    texts = [str(text) for text in schedule.buffers.column("value").to_pylist()]
    programs = schedule.buffers.column("program").to_pylist()
    base, way, plane = [], [], []
    for text, program in zip(texts, programs, strict=True):
        match = _NAME.fullmatch(text.replace("\n", " "))
        part: Any = match.groupdict() if match else {"base": text, "way": None, "plane": None}
        base.append((part["base"], program))
        way.append(-1 if part["way"] is None else int(part["way"][:9]))
        plane.append(-1 if part["plane"] is None else int(part["plane"]))
    seen_value: dict[Any, int] = {}
    seen_base: dict[Any, int] = {}
    value = [seen_value.setdefault((b, w), len(seen_value)) for b, w in zip(base, way, strict=True)]
    number = [seen_base.setdefault(b, len(seen_base)) for b in base]
    columns = [np.array([*c, -1], np.int64) for c in (value, plane, number, way)]
    planes = np.zeros(len(seen_value) + 1, np.int64)
    np.maximum.at(planes, columns[0], columns[1] + 1)
    return Names(columns[0], columns[1], planes[columns[0]], columns[2], columns[3])


def _reach(schedule: Schedule, _: str) -> Bool:
    """[producer, consumer] of ops: whether the consumer is the producer or depends on it; work that one op
    does for others counts as all of theirs. The last row and column stand for no op, which is related to
    all."""
    count = schedule.ops.num_rows
    doer = np.arange(count)
    plan: Any = schedule.plan
    fused = plan.get("fused") if isinstance(plan, dict) else None
    for op, by in (fused or {}).items():
        if 0 <= int(op) < count and 0 <= int(by) < count:
            doer[int(op)] = int(by)
    reach = np.eye(count + 1, dtype=bool)
    reach[-1] = reach[:, -1] = True
    lists = schedule.ops.column("operands").to_pylist()
    for _round in range(count):
        before = int(reach.sum())
        for op in range(count):
            for operand in lists[op] or ():
                if operand >= 0:
                    reach[:, doer[op]] |= reach[:, doer[operand]]
        if int(reach.sum()) == before:
            break
    spread = np.append(doer, count)
    # an op whose work another does is as good as the doer
    result: Bool = reach[spread][:, spread]
    return result


def related(schedule: Schedule, table: Columns, producer: Int, consumer: Int) -> Bool:
    """Whether each consumer step may use what the producer step made: by the graph's edges, or from one run
    of a repeated body to a later one."""
    reach = _RELATED.get(schedule, "", _reach)
    op, times = table.times.op, table.times
    repeat = np.append(schedule.ops.column("repeat").to_numpy().astype(np.int64), 1)
    a, b = op[producer], op[consumer]
    carried = (repeat[a] > 1) & (repeat[b] > 1) & (times.repetition[producer] < times.repetition[consumer])
    allowed: Bool = reach[a, b] | carried
    return allowed
