"""The executable meaning of the host's schedules: arrays are row-major bytes, programs run in the
interpreter."""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.backend import Memories, Written
from mapper.errors import ExecutionFault
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import Phase, Port, Schedule
from mapper_host.packed import Packed, Span, merged, pack
from mapper_host.scratch import scratch_bytes
from mapper_host.team import Team, thread_count

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prepared:
    """A program on memories: its tables, the bytes it leaves written, and the threads that run it."""

    packed: Packed
    written: list[Span]
    stretches: list[tuple[int, int, bool]]
    team: Team
    cycles: int


@dataclass(eq=False)
class HostSemantics:
    """See mapper.backend.Semantics. Tables are prepared once per schedule, program and memories.

    `threads` None: one per core."""

    threads: int | None = None
    _known: dict[tuple[int, int, str], tuple[Any, Any, Prepared]] = field(default_factory=dict)
    _places: dict[tuple[int, str, tuple[int, ...]], tuple[Any, Span]] = field(default_factory=dict)

    def on_threads(self, threads: int) -> HostSemantics:
        """See mapper.runtime.interface.Threaded."""
        return HostSemantics(thread_count(threads))

    def place(self, schedule: Schedule, port: Port, array: Array, memories: Memories) -> None:
        """Copy the array's bytes, in C order, into the port's buffer."""
        memory, low, high = self._where(schedule, port)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if raw.size != high - low:
            raise ExecutionFault(f"port {port.name}: {raw.size} bytes for a buffer of {high - low}")
        memories.bytes_of(port.buffers[0])[:] = raw
        memories.written(memory).add(low, high)

    def fetch(self, schedule: Schedule, port: Port, memories: Memories) -> Array:
        """A copy of the port's array. Raises ExecutionFault on unwritten bytes."""
        memory, low, high = self._where(schedule, port)
        at = memories.written(memory).missing(low, high)
        if at is not None:
            raise ExecutionFault(f"port {port.name}: byte {at} of its memory is read and was never written")
        return memories.bytes_of(port.buffers[0]).copy().view(dtype(port.dtype)).reshape(port.shape)

    def _where(self, schedule: Schedule, port: Port) -> Span:
        """(memory, first byte, end) of a port that is one row-major buffer; kept, because decoding asks for
        each token. Raises ExecutionFault."""
        key = (id(schedule), port.name, tuple(port.buffers))
        known, found = self._places.get(key, (None, None))
        if found is None or known is None or known() is not schedule:
            found = _where(schedule, port)
            self._places[key] = (weakref.ref(schedule), found)
        return found

    def plain(self, schedule: Schedule, port: Port) -> bool:
        """See mapper.runtime.interface.PlainPorts."""
        try:
            self._where(schedule, port)
        except ExecutionFault:
            return False
        return True

    def run(self, schedule: Schedule, phase: Phase, memories: Memories) -> int:
        """Execute a program in one call of the interpreter. Raises ExecutionFault."""
        ready = self.prepare(schedule, phase, memories)
        execute(ready)
        for memory, low, high in ready.written:
            memories.written(memory).add(low, high)
        return ready.cycles

    def prepare(self, schedule: Schedule, phase: Phase, memories: Memories) -> Prepared:
        """The tables of a program on these memories. Addresses are fixed, so what the steps read is known:
        the first time, every read is checked to be of written bytes. Raises ExecutionFault naming the
        step."""
        key = (id(schedule), id(memories), phase)
        if (
            key not in self._known
            or self._known[key][0]() is not schedule
            or self._known[key][1]() is not memories
        ):
            packed = pack(schedule, phase, memories)
            _trace(packed, memories)
            stretches = _stretches(packed)
            wanted = (
                self.threads if any(serving for *_, serving in stretches) and _is_serving(schedule) else 1
            )
            team = Team(
                packed.rows, packed.args, packed.floats, scratch_bytes(packed.rows, packed.args),
                thread_count(wanted),
            )  # fmt: skip
            cycles = schedule.programs[phase].cycles
            ready = Prepared(packed, merged(packed.writes), stretches, team, cycles)
            self._known[key] = (weakref.ref(schedule), weakref.ref(memories), ready)
        return self._known[key][2]


def execute(ready: Prepared) -> None:
    """Run prepared tables: a serving program is one call. Raises ExecutionFault where data leads out of
    range."""
    from mapper_host.interpreter import FAULTS, unpack

    packed, team = ready.packed, ready.team
    for begin, end, serving in ready.stretches:
        if serving:
            result = team.run(begin, end)
        else:
            from mapper_host.interpreter_general import interpret_general

            result = interpret_general(
                packed.rows, packed.args, packed.floats, begin, end, 0, 1, team.barrier, team.own(0)
            )
        if result:
            step, fault = unpack(result)
            raise ExecutionFault(f"{packed.names[step]}: {FAULTS[fault]}")


def _is_serving(schedule: Schedule) -> bool:
    return isinstance(schedule.plan, dict) and bool(schedule.plan.get("serving"))


def _stretches(packed: Packed) -> list[tuple[int, int, bool]]:
    """(first step, end, whether `interpret` runs it) of each stretch that one interpreter can run."""
    from mapper_host.interpreter import SERVING

    serving = np.isin(packed.rows[:, 0], SERVING)
    cuts = [0, *(np.flatnonzero(serving[1:] != serving[:-1]) + 1).tolist(), len(serving)]
    return [(a, b, bool(serving[a])) for a, b in itertools.pairwise(cuts) if a < b]


def _trace(packed: Packed, memories: Memories) -> None:
    """Walk the steps over what is written. Raises ExecutionFault at the first read of an unwritten byte."""
    known: dict[int, Written] = {}
    for i, (reads, writes) in enumerate(zip(packed.reads, packed.writes, strict=True)):
        for memory, low, high in reads:
            if memory not in known:
                known[memory] = memories.written(memory).copy()
            at = known[memory].missing(low, high)
            if at is not None:
                raise ExecutionFault(
                    f"{packed.names[i]}: byte {at} of memory {memory} is read and was never written"
                )
        for memory, low, high in writes:
            if memory not in known:
                known[memory] = memories.written(memory).copy()
            known[memory].add(low, high)


def _where(schedule: Schedule, port: Port) -> Span:
    if len(port.buffers) != 1 or port.layout != "row-major":
        raise ExecutionFault(f"port {port.name}: not one row-major buffer")
    column, number = schedule.buffers.column, port.buffers[0]
    memory, offset, size = (int(column(c)[number].as_py()) for c in ("memory", "offset", "bytes"))
    if math.prod(port.shape) * dtype(port.dtype).itemsize != size:
        raise ExecutionFault(f"port {port.name}: its buffer has {size} bytes")
    return memory, offset, offset + size
