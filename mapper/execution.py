"""Loading what is executed: sessions of saved schedules and of graphs, and what judges their results."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from mapper import backend as targets
from mapper.backend import Array
from mapper.catalog import machine_for
from mapper.errors import UsageError
from mapper.runtime.caches import Entry
from mapper.runtime.execute import Session
from mapper.runtime.inputs import Interface, states
from mapper.runtime.verify import Judge, OracleJudge
from mapper.schedule.tables import Request, Schedule

if TYPE_CHECKING:
    from mapper.ir.graph import Graph

HOST = "host"


def session(
    schedule: Schedule, model: str | Path | None = None, external_root: str | Path | None = None
) -> Session:
    """A schedule loaded and ready to run: weights come from the folder of `model` (default: as compiled) or
    by links in it from `external_root`."""
    folder = model_file(schedule, model).parent
    return Session(schedule, targets.load(schedule.target).semantics(), folder, external_root=external_root)


def model_file(schedule: Schedule, model: str | Path | None) -> Path:
    """The model's file: `model`, or where it was when the schedule was made. Raises UsageError."""
    from mapper.zoo.files import is_name, skeleton

    path = Path(model if model is not None else schedule.model.path)
    if is_name(path):
        return skeleton(path)
    if not path.is_file():
        hint = "" if model is not None else "; say where it is now with --model"
        raise UsageError(f"the model file {path} is not there{hint}")
    return path


def arrays_in(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file. Raises UsageError where it is none."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return dict(found)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an .npz file of inputs: {error}") from error


def judge_for(
    schedule: Schedule,
    model: Path,
    names: Interface,
    start: Mapping[Entry, Array],
    external_root: str | Path | None = None,
) -> Judge:
    """onnxruntime itself for targets that compute in float32; else float64 within their formats' error."""
    arithmetic = dict((schedule.plan or {}).get("arithmetic") or {"matmul": "float32"})
    if arithmetic["matmul"] == "float32":
        return OracleJudge()
    from mapper.frontend.load import load
    from mapper.judge import FormatJudge, Formats

    graph = load(model, external_root=external_root)
    return FormatJudge(graph, names, Formats(**arithmetic), start, states(schedule))


_sessions: WeakKeyDictionary[Graph, dict[tuple[Any, ...], Session]] = WeakKeyDictionary()


def loaded(graph: Graph, inputs: Mapping[str, Array]) -> Session:
    """The graph, specialised to the inputs' shapes and lowered for the host; kept for the next call."""
    wanted = [name for name, _ in graph.inputs]
    if set(wanted) != set(inputs):
        odd = sorted(set(wanted) ^ set(inputs))[0]
        raise UsageError(f"input {odd!r} is {'missing' if odd in wanted else 'none of the graph'}")
    shapes = {name: np.shape(inputs[name]) for name in wanted}
    graph = graph.chosen(inputs)
    kept = _sessions.setdefault(graph, {})
    key = tuple(shapes.items())
    if key not in kept:
        kept[key] = _specialised(graph, shapes)
    return kept[key]


def _specialised(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> Session:
    from mapper.passes.specialise import specialise
    from mapper.passes.unroll import Unroll

    static = specialise(Unroll().apply(graph), shapes)
    backend = targets.load(HOST)
    schedule = backend.lower(static, machine_for(backend), Request(phases=("prefill",)))
    return Session(schedule, backend.semantics(), weights=lambda name: static.weights[name].load())
