"""Threads that run a program together: kept alive from call to call, each on a core of its own.

The caller is thread 0. The others wait inside compiled code, looking at a control block, so that a call costs
about a microsecond; after PATIENCE looks without work they return to Python and sleep until they are woken.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import UsageError
from mapper.schedule.tables import Int
from mapper_host.cores import choose

PATIENCE = 20_000
"""Looks before a thread goes to sleep: some milliseconds."""


@dataclass(eq=False)
class Team:
    """`threads` threads for one program's tables. Close it, or let it go, to end them."""

    rows: Int
    args: Int
    floats: npt.NDArray[np.float64]
    scratch_bytes: int
    threads: int
    control: Int = field(init=False)
    barrier: Int = field(init=False)
    scratch: npt.NDArray[np.uint8] = field(init=False)
    workers: list[threading.Thread] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        from mapper_host.interpreter import CONTROL, PARTS

        self.control = np.zeros(CONTROL, np.int64)
        self.control[PARTS] = self.threads
        self.barrier = np.zeros(2, np.int64)
        self.each = -(-self.scratch_bytes // 4096) * 4096 + 4096
        self.scratch = np.zeros(self.each * self.threads + 64, np.uint8)
        self.sleep = _Sleep()
        cores = choose(self.threads)
        for part in range(1, self.threads):
            tables = (self.rows, self.args, self.floats, self.control, self.barrier)
            args = (tables, part, self.own(part), self.scratch, cores[part], self.sleep)
            self.workers.append(threading.Thread(target=_work, args=args, daemon=True, name=f"mapper-{part}"))
            self.workers[-1].start()
        weakref.finalize(self, _stop, self.control, self.sleep)

    def own(self, part: int) -> int:
        """Address of a thread's own scratch memory."""
        base = self.scratch.ctypes.data
        return int(base + -base % 64 + part * self.each)

    def run(self, begin: int, end: int) -> int:
        """Run steps begin..end - 1; what `interpreter.member` returns."""
        from mapper_host import interpreter as compiled

        control = self.control
        self.barrier[:] = 0
        control[compiled.BEGIN], control[compiled.END], control[compiled.FINISHED] = begin, end, 0
        control[compiled.GENERATION] += 1  # what was written before is seen by whoever sees this
        self.sleep.wake()
        own = self.own(0)
        return int(compiled.member(self.rows, self.args, self.floats, control, self.barrier, own, 0, 0, 0))


class _Sleep:
    """Where threads sleep, and how they are woken."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.asleep = 0

    def wake(self) -> None:
        """There is work: wake those that sleep."""
        if self.asleep:
            with self.condition:
                self.condition.notify_all()

    def wait(self, idle: Callable[[], bool]) -> None:
        """Sleep while `idle`. It is looked at after `asleep` is set, which `wake` looks at after there is
        work: one of them sees the other."""
        with self.condition:
            self.asleep += 1
            while idle():
                self.condition.wait()
            self.asleep -= 1


def _work(
    tables: tuple[Any, ...],
    part: int,
    own: int,
    scratch: npt.NDArray[np.uint8],
    core: int | None,
    sleep: _Sleep,
) -> None:
    from mapper_host.interpreter import GENERATION, STOP, member

    if core is not None:
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, {core})
    rows, args, floats, control, barrier = tables
    seen = 0

    def idle() -> bool:
        return bool(control[GENERATION] == seen and not control[STOP])

    while True:
        seen = int(member(rows, args, floats, control, barrier, own, part, seen, PATIENCE))
        if seen < 0:
            return
        sleep.wait(idle)


def _stop(control: Int, sleep: _Sleep) -> None:
    from mapper_host.interpreter import STOP

    control[STOP] = 1
    sleep.wake()


def thread_count(asked: int | None) -> int:
    """How many threads a program gets: as many as asked for, else one per core. Raises UsageError."""
    from mapper_host.cores import available

    most = len(available())
    if asked is None:
        return most
    if not 1 <= asked <= 256:
        raise UsageError(f"threads must be 1 to 256, not {asked}")
    return asked
