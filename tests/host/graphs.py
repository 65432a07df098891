"""Running small graphs on the host target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.ir.graph import Graph
from mapper.machine import Machine, find
from mapper.runtime.execute import Session
from mapper.schedule.checks import run_checks
from mapper.schedule.tables import Request, Schedule
from mapper_host import BACKEND

Array = npt.NDArray[Any]


def machine() -> Machine:
    """The shipped machine."""
    return find("host-generic", BACKEND.machine_files())


def lowered(graph: Graph, request: Request | None = None) -> Schedule:
    """The schedule of a graph, all of whose checks must hold."""
    schedule = BACKEND.lower(graph, machine(), request or Request(phases=("prefill",)))
    broken = {name: found for name, found in run_checks(schedule, BACKEND.checks()).items() if found}
    assert not broken, broken
    return schedule


def run(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a static graph on the host's kernels."""
    session = Session(lowered(graph), BACKEND.semantics(), graph.folder)
    return session.run("prefill", {k: np.asarray(v) for k, v in inputs.items()})
