"""mapper's own decode: compiled for the host, run from a cache of random content."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.models import onnx_model
from benchmarks.shapes import SHAPES, Shape
from benchmarks.weights import EMBEDDING, F32, Matrix, Weights, probe_tokens

if TYPE_CHECKING:
    from mapper.runtime.execute import Session

HOST = "host"
WARM_UP = 3


def opened(shape: Shape, weights: str, context: int, threads: int) -> Session:
    """A session whose cache has room for `context` positions. Raises MapperError."""
    from mapper import driver, execution

    model: Path = onnx_model(shape)
    done = driver.build(model, HOST, context=context, weights=weights, phase="decode")
    done.report.raise_first()
    return execution.session(done.schedule, model, threads=threads)


def step(session: Session, token: int, past: int) -> Any:
    """Logits [vocab] of one token at position `past`."""
    inputs = {"input_ids": np.array([[token]]), "past_length": np.array(past)}
    return session.run("decode", inputs)["logits"].reshape(-1)


def timed(name: str, weights: str, context: int, tokens: int, threads: int) -> dict[str, Any]:
    """Tokens per second (the inverse of the median greedy step, at about the context); bytes a step reads."""
    shape = SHAPES[name]
    session = opened(shape, weights, context + WARM_UP + tokens, threads)
    rng = np.random.default_rng(3)
    for port in session.ports("state"):
        session.set_state(port.name, rng.standard_normal(port.shape, np.float32))
    token, times = 1, list[float]()
    for past in range(context, context + WARM_UP + tokens):
        began = time.perf_counter()
        token = int(np.argmax(step(session, token, past)))
        times.append(time.perf_counter() - began)
    median = statistics.median(times[WARM_UP:])
    middle = context + WARM_UP + tokens // 2
    kinds = {port.dtype for port in session.ports("state")}
    kv = kinds.pop() if len(kinds) == 1 else "/".join(sorted(kinds))
    return {
        "tokens_per_s": 1 / median,
        "bytes_per_token": bytes_per_token(shape, weights, middle, kv),
        "kv": kv,
        "precision": f"{weights} weights",
        "versions": versions(),
    }


def bytes_per_token(shape: Shape, weights: str, context: int, kv: str) -> int:
    """Bytes that a step must read: products' weights as stored; keys and values of `context` positions."""
    from mapper.lowbit import FORMATS, Scheme
    from mapper.schedule.dtypes import dtype

    found, held = shape.cache_bytes(context, dtype(kv).itemsize), FORMATS[weights]
    for _, rows, columns in shape.products():
        if isinstance(held, Scheme):
            parts = held.parts((rows, columns)).values()
            found += sum(int(np.prod(dims)) * dtype(kind).itemsize for dims, kind in parts)
        else:
            found += rows * columns * dtype(held).itemsize
    return found


def stored(shape: Shape, weights: str) -> Matrix:
    """The weights that the products take, dequantised."""
    from mapper.lowbit import FORMATS, Scheme, dequantise, quantise
    from mapper.schedule.dtypes import dtype

    source, held = Weights.of(shape), FORMATS[weights]

    def weight(name: str) -> F32:
        array = np.ascontiguousarray(source(name))
        if array.ndim == 1 or name == EMBEDDING:
            return array
        if not isinstance(held, Scheme):
            return np.asarray(array.astype(dtype(held)), np.float32)
        parts = quantise(held, array)
        made = dequantise(held, array.shape, parts["values"], parts["scales"], parts.get("zeros"))
        return np.asarray(made, np.float32)

    return weight


def quality(name: str, weights: str, threads: int) -> dict[str, float]:
    """Relative L2 errors of the probe's logits, against float64 on the weights as stored and as drawn."""
    from benchmarks.reference import cached_logits, relative_error

    shape = SHAPES[name]
    sequence = probe_tokens(shape)
    session = opened(shape, weights, len(sequence), threads)
    logits = np.stack([np.array(step(session, t, i)) for i, t in enumerate(sequence)])
    found = {"error_original": relative_error(logits, cached_logits(shape, "original"))}
    if weights != "f32":
        expected = cached_logits(shape, f"mapper-{weights}", stored(shape, weights))
        found["error_dequantised"] = relative_error(logits, expected)
    return found


def versions() -> dict[str, str]:
    """Of mapper and of what compiles its kernels."""
    from importlib.metadata import version

    return {name: version(name) for name in ("inference-mapper", "numba", "llvmlite", "numpy")}
