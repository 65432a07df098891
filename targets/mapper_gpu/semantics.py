"""The executable meaning of this target's schedules: layouts of ports, and tasks run one by one in time
order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.backend import Memories
from mapper.errors import ExecutionFault
from mapper.runtime.written import require_written
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import Phase, Port, Schedule
from mapper_gpu import execute, lowbit_ops

Array = npt.NDArray[Any]


class GpuSemantics:
    """See mapper.backend.Semantics.

    Layouts: "copies" (the array in C order on every chip), "sequences" (each of the `replicas` of a `group`
    has its share of the first axis, on all its chips), "panels" ([rows, width] as width/panel blocks,
    cut among chips along n or k, or copied; with "bits" the array's rows are `columns` packed elements (an
    element each where "loose"), and a panel's rows are packed too), "stack" ([experts, n, k] in C order, cut
    likewise, packed likewise), "cache" ([heads, batch, positions, elements], heads cut among chips). With
    "replicas" a layout is that of each replica's chips: weights are the same in all, a cache's and logits'
    sequences are cut among them. With "experts" the first axis is shared out, to `inside` groups of a
    replica's chips in a row, those of the next replica going on where there are `spread`; a group's chips cut
    its part."""

    def place(self, schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
        """Write the array into the buffers of all chips."""
        for part, (memory, low, high) in zip(_parts(port, array), _where(schedule, port), strict=True):
            raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            if raw.size != high - low:
                raise ExecutionFault(f"port {port.name}: {raw.size} bytes for a buffer of {high - low}")
            memories.data(memory)[low:high] = raw
            memories.written(memory).add(low, high)

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> Array:
        """A copy of the port's array. Raises ExecutionFault on unwritten bytes."""
        found = []
        for memory, low, high in _where(schedule, port):
            require_written(memories.written(memory), low, high, f"port {port.name}")
            found.append(memories.data(memory)[low:high].copy().view(dtype(port.dtype)))
        replicas = int(port.layout.get("replicas", 1))
        each = len(found) // replicas
        parts = [_joined(port, found[i : i + each], replicas) for i in range(0, len(found), each)]
        return parts[0] if replicas == 1 else np.concatenate(parts)

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Execute a program, task by task. Raises ExecutionFault."""
        return execute.run(schedule, phase, memories)


def _joined(port: Port, found: list[Array], replicas: int) -> Array:
    """A replica's part of a port's array, from its chips' buffers."""
    kind = port.layout["kind"]
    shape = (port.shape[0] // replicas, *port.shape[1:])
    if kind == "cache":
        batch, heads, length, width = shape
        found = found[:: int(port.layout["copies"])]
        part = (heads // len(found), batch, length, width)
        return np.concatenate([f.reshape(part) for f in found]).transpose(1, 0, 2, 3)
    if kind == "panels" and len(found) == 1:
        panel = int(port.layout["panel"])
        rows = int(np.prod(shape[:-1]))
        return found[0].reshape(-1, rows, panel).transpose(1, 0, 2).reshape(shape)
    raise ExecutionFault(f"port {port.name}: nothing is read back from the layout {kind!r}")


def _parts(port: Port, array: Array) -> Iterator[Array]:
    """The bytes of each chip's buffer, as arrays."""
    layout, count, replicas = port.layout, len(port.buffers), int(port.layout.get("replicas", 1))
    if layout["kind"] == "copies":
        yield from [array] * count
        return
    if layout["kind"] == "sequences":
        group = int(layout["group"])
        for _ in range(count // group):
            for part in np.split(array, replicas):
                yield from [part] * (group // replicas)
        return
    if layout["kind"] == "cache":
        for part in np.split(array, replicas):
            yield from _heads(part, count // replicas, int(layout["copies"]))
        return
    yield from _weights(port, array, count // replicas, replicas)


def _heads(array: Array, count: int, copies: int) -> Iterator[Array]:
    for part in np.split(array.transpose(1, 0, 2, 3), count // copies):
        yield from [part] * copies


def _weights(port: Port, array: Array, count: int, replicas: int) -> Iterator[Array]:
    """A weight's parts on the chips of all replicas, `count` each."""
    shared = port.layout.get("experts")
    if shared is None:
        for _ in range(replicas):
            yield from _weight(port, array, count)
        return
    inside, spread = int(shared["inside"]), int(shared["spread"])
    if inside * spread < 1 or len(array) % (inside * spread) or count % inside or spread not in (1, replicas):
        raise ExecutionFault(f"port {port.name}: {len(array)} experts for {inside} x {spread} groups")
    parts = np.split(array, inside * spread)
    for replica in range(replicas):
        first = replica * inside if spread > 1 else 0
        for part in parts[first : first + inside]:
            yield from _weight(port, part, count // inside)


def _weight(port: Port, array: Array, count: int) -> Iterator[Array]:
    """A weight's parts on `count` chips."""
    layout = port.layout
    if layout["kind"] == "stack" and array.ndim == 3:
        array, bits = _unpacked(port, array)
        axis = {"n": 1, "k": 2, "": None}[layout["split"]]
        for piece in _cut(array, axis, count, int(layout["copies"])):
            yield lowbit_ops.packed(piece, bits) if bits else piece
        return
    if layout["kind"] != "panels" or array.ndim != 2:
        raise ExecutionFault(f"port {port.name}: unknown layout {layout['kind']!r}")
    array, bits = _unpacked(port, array)
    axis = {"n": 0, "k": 1, "": None}[layout["split"]]
    if axis == 0 and array.shape[0] == 1:
        axis = 1
    panel = int(layout["panel"])
    for piece in _cut(array, axis, count, int(layout.get("copies", 1))):
        blocks = piece.reshape(piece.shape[0], -1, panel).transpose(1, 0, 2)
        yield lowbit_ops.packed(blocks, bits) if bits else blocks


def _unpacked(port: Port, array: Array) -> tuple[Array, int]:
    """(an element each, bits of one; 0: they are not packed)."""
    bits = int(port.layout.get("bits", 0))
    if bits not in (0, 2, 4, 8):
        raise ExecutionFault(f"port {port.name}: elements of {bits} bits")
    loose = not bits or port.layout.get("loose")
    return (array if loose else lowbit_ops.unpacked(array, bits, int(port.layout["columns"]))), bits


def _cut(array: Array, axis: int | None, count: int, copies: int) -> list[Array]:
    """Each chip's part."""
    if axis is None:
        return [array] * count
    return [p for p in np.split(array, count // copies, axis) for _ in range(copies)]


def _where(schedule: Schedule, port: Port) -> Iterator[tuple[int, int, int]]:
    for buffer in port.buffers:
        row = schedule.buffers.slice(buffer, 1)
        memory, offset, size = (int(row.column(c)[0].as_py()) for c in ("memory", "offset", "bytes"))
        yield memory, offset, offset + size
