"""Loading what is executed: sessions of saved schedules and of graphs, and what judges their results."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from mapper import backend as targets
from mapper.backend import Array
from mapper.catalog import machine_for
from mapper.errors import SubstitutionError, UsageError
from mapper.runtime.caches import Entry
from mapper.runtime.execute import Session
from mapper.runtime.inputs import Interface, states
from mapper.runtime.interface import Threaded
from mapper.runtime.oracle import Oracle, Substitute, oracle, substituted
from mapper.runtime.verify import Judge, OracleJudge, Stepper
from mapper.schedule.tables import Request, Schedule

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.ir.weights import WeightSymbol

HOST = "host"


def session(
    schedule: Schedule,
    model: str | Path | None = None,
    external_root: str | Path | None = None,
    threads: int | None = None,
) -> Session:
    """A schedule loaded and ready to run: weights come from the folder of `model` (default: as compiled) or
    by links in it from `external_root`. `threads` None: as many as the target likes. Raises UsageError where
    it takes no number of threads."""
    folder = model_file(schedule, model).parent
    semantics = targets.load(schedule.target).semantics()
    if threads is not None:
        if not isinstance(semantics, Threaded):
            raise UsageError(f"{schedule.target} does not run on a number of threads")
        semantics = semantics.on_threads(threads)
    return Session(schedule, semantics, folder, external_root=external_root)


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


def in_format(graph: Graph, backend: targets.Backend, held: str | None) -> Graph:
    """The graph with the weights of its products in format `held`; itself for the target's own format."""
    from mapper.passes.quantise import Quantise

    return graph if held in (None, backend.formats[0]) else Quantise(str(held)).apply(graph)


@contextmanager
def oracles(
    schedule: Schedule,
    path: Path,
    names: Interface,
    start: Mapping[Entry, Array],
    external_root: str | Path | None = None,
) -> Iterator[tuple[Stepper, Judge, Oracle | None]]:
    """What a schedule is compared with, what judges the comparison, and, where its weights are in another
    format than the target's own, the original model to state the deviation from.

    The first is onnxruntime on the model at `path` with the weights that the schedule has; where those are
    not all initializers of the file, the reference semantics of the graph in float64.
    """
    plain = oracle(path, names, states(schedule))
    held, backend = schedule.request.weights, targets.load(schedule.target)
    if held in (None, backend.formats[0]):
        yield plain, judge_for(schedule, lambda: _load(path, external_root), names, start), None
        return
    graph = in_format(_load(path, external_root), backend, held)
    judge = judge_for(schedule, lambda: graph, names, start)
    with ExitStack() as stack:
        beside: Stepper
        try:
            beside = stack.enter_context(substituted(path, plain, substitutes(graph), f"{held} weights"))
        except SubstitutionError as error:
            from mapper.judge import GraphOracle

            beside = GraphOracle(graph, names, states(schedule), str(error))
        yield beside, judge, plain


def _load(path: Path, external_root: str | Path | None) -> Graph:
    from mapper.frontend.load import load

    return load(path, external_root=external_root)


def substitutes(graph: Graph) -> dict[str, Substitute]:
    """Stored weight -> the array that its products use in its place, of a graph whose weights are in another
    format. Raises SubstitutionError where two products use one weight in different ways."""
    users = _users(graph)
    found: dict[str, Substitute] = {}
    for name in sorted(users):
        symbol = graph.weights[name]
        derivation = symbol.derivation or (symbol.packing and symbol.packing.values.derivation)
        if not derivation:
            continue
        root = symbol.root
        if root.name in found:
            raise SubstitutionError(f"weight {root.name!r} is used by rows and by columns")
        strange = users.get(root.name, set()) - {"embed", "embed_at"}
        if strange:
            raise SubstitutionError(f"weight {root.name!r} is used by {sorted(strange)[0]} too")
        load = partial(_dequantised, symbol, derivation.transposed)
        found[root.name] = Substitute(root.shape, root.file, root.offset, load, root.name in users)
    return found


def _users(graph: Graph) -> dict[str, set[str]]:
    """Weight -> mnemonics of the ops that name it."""
    users: dict[str, set[str]] = {}
    for section in graph.sections():
        for op in section.ops:
            for slot in op.weights().values():
                for name in section.table.get(slot, (slot,)):
                    users.setdefault(name, set()).add(op.mnemonic)
    return users


def _dequantised(symbol: WeightSymbol, turned: bool) -> Array:
    array = symbol.load()
    return array.swapaxes(-1, -2) if turned else array


def judge_for(
    schedule: Schedule, graph: Callable[[], Graph], names: Interface, start: Mapping[Entry, Array]
) -> Judge:
    """The oracle itself for targets that compute in float32; else float64 within their formats' error.

    `graph` gives the model's graph with the weights that the schedule has."""
    arithmetic = dict((schedule.plan or {}).get("arithmetic") or {"matmul": "float32"})
    if arithmetic["matmul"] == "float32":
        return OracleJudge()
    from mapper.forward import Formats
    from mapper.judge import FormatJudge

    return FormatJudge(graph(), names, Formats(**arithmetic), start, states(schedule))


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
