"""The cache of benchmark models, and the float32 weights in it. Needs NumPy alone: peers read it too."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.shapes import PROBE_TOKENS, Shape

F32 = npt.NDArray[np.float32]
Matrix = Callable[[str], F32]
"""Name of a weight -> its array: [outputs, inputs] for products, [vocab, hidden] for the embedding."""
EMBEDDING = "model.embed_tokens.weight"


def cache_folder() -> Path:
    """$MAPPER_BENCH_CACHE, or ~/.cache/mapper-bench."""
    return Path(os.environ.get("MAPPER_BENCH_CACHE") or Path.home() / ".cache" / "mapper-bench")


def folder(shape: Shape) -> Path:
    """The folder of a shape's models."""
    return cache_folder() / shape.name


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` once all in it is written; nothing is left of a failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield made
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@dataclass(frozen=True)
class Weights:
    """Weights of a shape as drawn, mapped from the ONNX model's data file."""

    file: Path
    table: Mapping[str, Any]
    """Name -> {"offset", "shape"}; products are stored [inputs, outputs]."""

    @classmethod
    def of(cls, shape: Shape) -> Weights:
        """Raises FileNotFoundError where `benchmarks.models` has not made them."""
        base = folder(shape) / "onnx"
        return cls(base / "model.onnx.data", json.loads((base / "weights.json").read_text(encoding="utf-8")))

    def __call__(self, name: str) -> F32:
        row = self.table[name]
        found: F32 = np.memmap(self.file, np.float32, "r", row["offset"], tuple(row["shape"]))
        return found if found.ndim == 1 or name == EMBEDDING else found.T


def probe_tokens(shape: Shape) -> list[int]:
    """The fixed sequence whose logits are compared."""
    return [int(i) for i in np.random.default_rng(7).integers(0, shape.vocab, PROBE_TOKENS)]


def prompt(shape: Shape, length: int) -> list[int]:
    """A fixed prompt of `length` tokens, for peers whose cache is filled by a prefill."""
    return [int(i) for i in np.random.default_rng(11).integers(0, shape.vocab, length)]
