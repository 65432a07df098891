"""Emission: where each tensor lies in MEM (`memory_map.csv`), and how full each slice is
(`memory_map.txt`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np

from mapper.backend import Artifact
from mapper.schedule.tables import Schedule
from mapper_lpu import isa

_HEAD = ("value", "port", "kind", "program", "memory", "bank", "first_row", "last_row", "bytes")


def artifacts(schedule: Schedule) -> list[Artifact]:
    """`memory_map.csv` and `memory_map.txt`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEAD)
    writer.writerows(_rows(schedule))
    return [
        Artifact("memory_map.csv", text.getvalue().encode()),
        Artifact("memory_map.txt", summary(schedule).encode()),
    ]


def _rows(schedule: Schedule) -> Iterator[tuple[object, ...]]:
    """One row per buffer and bank, in the order of the buffer table."""
    ports = _ports(schedule)
    for number, buffer in enumerate(schedule.buffers.to_pylist()):
        if not buffer["bytes"]:
            continue
        port, kind = ports.get(number, ("", "temporary"))
        low, high = buffer["offset"], buffer["offset"] + buffer["bytes"]
        size = isa.BANK_ROWS * isa.LANES
        for bank in range(low // size, (high - 1) // size + 1):
            a, b = max(low, bank * size), min(high, (bank + 1) * size)
            memory = schedule.memories[buffer["memory"]][0]
            rows = a // isa.LANES, (b - 1) // isa.LANES
            yield (buffer["value"], port, kind, buffer["program"], memory, bank, *rows, b - a)


def _ports(schedule: Schedule) -> dict[int, tuple[str, str]]:
    """Buffer -> (port, kind)."""
    return {buffer: (port.name, port.kind) for port in schedule.ports for buffer in port.buffers}


def summary(schedule: Schedule) -> str:
    """Rows taken in each slice, by kind of value, and the totals. A row that several buffers share counts
    once, for the first of weight, constant, state, input, output, temporary that it belongs to."""
    kinds = ("weight", "constant", "state", "input", "output", "temporary")
    ports = _ports(schedule)
    owner = np.full((len(schedule.memories), isa.ROWS), len(kinds), np.int64)
    for number, buffer in enumerate(schedule.buffers.to_pylist()):
        kind = kinds.index(ports.get(number, ("", "temporary"))[1])
        low, high = buffer["offset"] // isa.LANES, -(-(buffer["offset"] + buffer["bytes"]) // isa.LANES)
        part = owner[buffer["memory"], low:high]
        np.minimum(part, kind, out=part)
    count = np.stack([(owner == k).sum(axis=1) for k in range(len(kinds))], axis=1)
    lines = [
        "rows of 320 bytes per slice",
        "slice      " + "".join(f"{k:>11}" for k in kinds) + "       free",
    ]
    for (name, _), row in zip(schedule.memories, count.tolist(), strict=True):
        lines.append(f"{name:11}" + "".join(f"{n:>11}" for n in row) + f"{isa.ROWS - sum(row):>11}")
    total = count.sum(axis=0).tolist()
    whole = isa.ROWS * len(schedule.memories)
    lines.append(f"{'all':11}" + "".join(f"{n:>11}" for n in total) + f"{whole - sum(total):>11}")
    share = 100 * sum(total) / whole if whole else 0.0
    lines.append(f"{sum(total) * isa.LANES} of {whole * isa.LANES} bytes taken ({share:.1f} %)")
    return "\n".join(lines) + "\n"
