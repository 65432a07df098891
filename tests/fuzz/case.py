"""One fuzz case in a process of its own: load, inspect and (where that is small) compute, under limits."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mapper.errors import MapperError
from mapper.frontend.inspect import inspect
from mapper.frontend.load import load
from mapper.ir.graph import Graph
from mapper.ir.op import tensor_type
from mapper.ir.reference import evaluate
from mapper.ir.structure import RepeatOp
from tests.fuzz.mutate import mutant

MAX_CPU = 5  # seconds
MAX_MEMORY = 500 << 20  # bytes above what the process had
MAX_COMPUTED = 1 << 20  # elements of a value in a graph that is computed
SIZES = {"batch": 1, "sequence": 3, "past": 2}


@dataclass(frozen=True)
class Outcome:
    """What came of a case: `kind` is loaded, computed, the name of a MapperError, or what went wrong (crash,
    hang, memory, message, traceback). Seconds of CPU; peak bytes above the start."""

    kind: str
    seconds: float = 0.0
    memory: int = 0
    text: str = ""

    @property
    def wrong(self) -> bool:
        """Whether this is a defect."""
        return self.kind in ("crash", "hang", "memory", "message", "traceback")


def case_bytes(seeds: Sequence[bytes], number: int) -> bytes:
    """The file of case `number`."""
    return mutant(seeds, random.Random(number))


def isolated(seeds: Sequence[bytes], number: int, folder: Path) -> Outcome:
    """The case in a child process with limits on CPU time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            data = case_bytes(seeds, number)
            _limit()
            os.write(writer, json.dumps(asdict(outcome(data, folder / f"{os.getpid()}.onnx"))).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    _, status, _ = os.wait4(child, 0)
    (folder / f"{child}.onnx").unlink(missing_ok=True)
    if said:
        return Outcome(**json.loads(said))
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Outcome("hang" if ended in (signal.SIGXCPU, signal.SIGKILL) else "crash", text=f"signal {ended}")


def outcome(data: bytes, path: Path) -> Outcome:
    """What comes of a file, in this process."""
    path.write_bytes(data)
    before, start = _peak(), time.process_time()
    kind, text = _tried(path)
    path.unlink(missing_ok=True)
    return Outcome(kind, time.process_time() - start, _peak() - before, text)


def _tried(path: Path) -> tuple[str, str]:
    try:
        graph = load(path)
        json.dumps(inspect(graph), allow_nan=False)
        if not _small(graph):
            return "loaded", ""
        evaluate(graph, _inputs(graph))
        return "computed", ""
    except MapperError as error:
        said = str(error)
        fine = said.isprintable() and 0 < len(said) < 1000
        return (type(error).__name__ if fine else "message"), said[:2000]
    except MemoryError:
        return "memory", traceback.format_exc(limit=-6)
    except BaseException:
        return "traceback", traceback.format_exc(limit=-8)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU, MAX_CPU + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY, used + MAX_MEMORY))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _symbols(graph: Graph) -> dict[str, int]:
    names = {s for _, kind in graph.inputs for d in kind.shape for s in d.symbols}
    return {name: SIZES.get(name, 2) for name in names}


def _small(graph: Graph) -> bool:
    """Whether every value and weight is small and every weight there, so that computing it is quick."""
    env = _symbols(graph)
    sizes = [d.evaluate(env) for _, kind in graph.inputs for d in kind.shape]
    if sizes and not 0 <= min(sizes) <= max(sizes) <= MAX_COMPUTED:
        return False
    if any(math.prod(d.evaluate(env) for d in kind.shape) > MAX_COMPUTED for _, kind in graph.inputs):
        return False
    for op in graph.ops():
        if isinstance(op, RepeatOp) and op.attr("count") > 100:
            return False
        for value in (*op.operands, *op.results):
            kind = tensor_type(value)
            if any(not d.symbols <= env.keys() for d in kind.shape):
                return False
            if abs(math.prod(d.evaluate(env) for d in kind.shape)) > MAX_COMPUTED:
                return False
    there = all((graph.path or Path()).with_name(name).is_file() for name in graph.files)
    return there and all(w.elements <= MAX_COMPUTED for w in graph.weights.values())


def _inputs(graph: Graph) -> dict[str, np.ndarray]:
    env = _symbols(graph)
    made = {}
    for name, kind in graph.inputs:
        made[name] = np.ones([d.evaluate(env) for d in kind.shape], kind.numpy)
    return made
