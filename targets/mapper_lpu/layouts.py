"""Where the elements of a port's array are: the layouts of ISA.md, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.backend import Array, Memories
from mapper.errors import ExecutionFault, ScheduleError
from mapper.schedule.tables import Port, Schedule
from mapper_lpu.isa import LANES

_TYPES = {"i8": "<i1", "u8": "<u1", "i16": "<i2", "u16": "<u2", "i32": "<i4", "f16": "<f2", "f32": "<f4"}

Take = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """A resolved "rows" or "broadcast" layout: `count` rows of `columns` numbers in `buffers`."""

    schedule: Schedule
    port: Port
    buffers: tuple[int, ...]
    type: np.dtype[Any]
    ways: int
    axes: tuple[int, ...]
    count: int
    columns: int
    take: Take | None
    broadcast: bool

    def buffer(self, way: int, plane: int, memories: Memories) -> tuple[Array, Array]:
        """Bytes and flags of one buffer as [rows, LANES]: the rows of one way, one byte plane."""
        number = self.buffers[way * self.type.itemsize + plane]
        column = self.schedule.buffers.column
        memory, first, size = (int(column(n)[number].as_py()) for n in ("memory", "offset", "bytes"))
        rows = len(range(way, self.count, self.ways))
        if rows * LANES > size:
            raise ScheduleError(f"port {self.port.name!r}: buffer {number} is too small for {rows} rows")
        data, flags = memories.data(memory), memories.written(memory).flags()
        if first + rows * LANES > len(data):
            raise ExecutionFault(f"port {self.port.name!r}: buffer {number} ends outside its memory")
        part = slice(first, first + rows * LANES)
        return data[part].reshape(rows, LANES), flags[part].reshape(rows, LANES)

    def planes(self) -> Iterator[tuple[int, int]]:
        """Every (way, byte plane)."""
        return ((way, plane) for way in range(self.ways) for plane in range(self.type.itemsize))


def _resolve(schedule: Schedule, port: Port, layout: Mapping[str, Any], buffers: tuple[int, ...]) -> _Rows:
    kind = layout.get("kind")
    if kind not in ("rows", "broadcast") or layout.get("dtype") not in _TYPES:
        raise ScheduleError(f"port {port.name!r} has an unknown layout: {layout}")
    dtype = np.dtype(_TYPES[layout["dtype"]])
    axes = tuple(layout.get("axes") or range(len(port.shape)))
    shape = tuple(port.shape[a] for a in axes)
    split = len(shape) if kind == "broadcast" else int(layout.get("row_axes", 1))
    count, columns = prod(shape[:split]), prod(shape[split:])
    name = layout.get("take")
    take = None if name is None else np.asarray(schedule.constants[name], np.int64)
    if take is not None and ((take < -1).any() or (take >= columns).any()):
        raise ScheduleError(f"port {port.name!r}: {name!r} takes columns outside -1..{columns - 1}")
    if (columns if take is None else len(take)) > LANES:
        raise ScheduleError(f"port {port.name!r}: a row is wider than {LANES} lanes")
    ways = int(layout.get("ways", 1))
    if len(buffers) != ways * dtype.itemsize:
        raise ScheduleError(
            f"port {port.name!r}: {len(buffers)} buffers for {ways} ways of {dtype.itemsize} bytes"
        )
    return _Rows(schedule, port, buffers, dtype, ways, axes, count, columns, take, kind == "broadcast")


def _parts(schedule: Schedule, port: Port) -> list[_Rows]:
    layout = port.layout
    if isinstance(layout, Mapping) and layout.get("kind") == "multi":
        return [_resolve(schedule, port, p["layout"], tuple(p["buffers"])) for p in layout["parts"]]
    return [_resolve(schedule, port, layout or {}, port.buffers)]


def _columns(port: Port) -> list[tuple[Port, int, int]]:
    """The parts of a "columns" layout as ports with their column ranges; empty for other layouts."""
    layout = port.layout
    if not isinstance(layout, Mapping) or layout.get("kind") != "columns":
        return []
    split, width = int(layout["row_axes"]), int(layout["width"])
    rows, total = prod(port.shape[:split]), prod(port.shape[split:])
    if len(layout["parts"]) != -(-total // width):
        raise ScheduleError(f"port {port.name!r}: {len(layout['parts'])} parts do not hold {total} columns")
    out = []
    for number, part in enumerate(layout["parts"]):
        begin, end = number * width, min((number + 1) * width, total)
        shape = (rows, end - begin)
        out.append(
            (replace(port, shape=shape, layout=part["layout"], buffers=tuple(part["buffers"])), begin, end)
        )
    return out


def place(schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
    """Write an array of port.shape into the port's buffers and mark all 320 lanes of its rows written.

    Raises ScheduleError for a layout that does not fit the port or its buffers.
    """
    if tuple(array.shape) != tuple(port.shape):
        raise ScheduleError(f"port {port.name!r} takes shape {port.shape}, not {array.shape}")
    for part_port, begin, end in _columns(port):
        matrix = np.reshape(array, (part_port.shape[0], -1))
        place(schedule, part_port, matrix[:, begin:end], memories)
        if end == matrix.shape[1]:
            return
    for part in _parts(schedule, port):
        rows = np.zeros((part.count, LANES), part.type)
        matrix = np.transpose(np.asarray(array), part.axes).reshape(part.count, part.columns)
        with np.errstate(over="ignore", invalid="ignore"):
            if part.broadcast:
                rows[:] = matrix.astype(part.type)
            elif part.take is None:
                rows[:, : part.columns] = matrix.astype(part.type)
            else:
                taken = matrix[:, np.maximum(part.take, 0)].astype(part.type)
                rows[:, : len(part.take)] = np.where(part.take >= 0, taken, part.type.type(0))
        planes = rows.view(np.uint8).reshape(part.count, LANES, part.type.itemsize)
        for way, plane in part.planes():
            data, flags = part.buffer(way, plane, memories)
            data[:] = planes[way :: part.ways, :, plane]
            flags[:] = True


def fetch(schedule: Schedule, port: Port, memories: Memories) -> Array:
    """The port's array of its shape and dtype. Raises ExecutionFault on a byte that was never written."""
    columns = [fetch(schedule, part_port, memories) for part_port, _, _ in _columns(port)]
    if columns:
        return np.concatenate(columns, axis=1).reshape(port.shape)
    part = _parts(schedule, port)[0]
    lanes = _lanes(part)
    planes = np.zeros((part.count, len(lanes), part.type.itemsize), np.uint8)
    for way, plane in part.planes():
        data, flags = part.buffer(way, plane, memories)
        missing = np.flatnonzero(~flags[:, lanes].all(axis=1))
        if len(missing):
            row = int(missing[0]) * part.ways + way
            raise ExecutionFault(f"port {port.name!r}: byte {plane} of row {row} was never written")
        planes[way :: part.ways, :, plane] = data[:, lanes]
    matrix = planes.view(part.type)[:, :, 0].astype(port.dtype)
    turned = matrix.reshape([port.shape[a] for a in part.axes])
    return np.transpose(turned, np.argsort(part.axes)).reshape(port.shape)


def _lanes(part: _Rows) -> Take:
    """The lane that each column comes from. Raises ScheduleError for a column that no lane holds."""
    if part.take is None:
        return np.arange(part.columns)
    lanes = np.full(part.columns, -1, np.int64)
    for lane in range(len(part.take) - 1, -1, -1):
        if part.take[lane] >= 0:
            lanes[part.take[lane]] = lane
    if (lanes < 0).any():
        raise ScheduleError(f"port {part.port.name!r}: column {int(np.argmin(lanes))} is in no lane")
    return lanes
