"""Where the open corpus is, and how one of its files is compared with the outputs stored beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("MAPPER_CORPUS", ROOT.parent / "shared" / "corpus"))


def entries(*expect: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The manifest's entries with one of the given expectations; none where there is no corpus."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return []
    models: list[dict[str, Any]] = json.loads(manifest.read_text())["models"]
    return [m for m in models if m["expect"] in expect]


def runs(path: Path) -> dict[str, dict[str, dict[str, Array]]]:
    """Run -> {"in": ..., "ort": ..., "compare_mask": ...} of the npz beside a model."""
    out: dict[str, dict[str, dict[str, Array]]] = {}
    with np.load(path.with_suffix(".npz")) as stored:
        for key in stored.files:
            run, kind, *name = key.split("/", 2)
            out.setdefault(run, {}).setdefault(kind, {})["".join(name)] = stored[key]
    return out


def worst(graph: Graph, path: Path) -> float:
    """The largest difference over all runs and outputs, relative to max(1, largest expected magnitude)."""
    out = 0.0
    for run in runs(path).values():
        got = evaluate(graph, {name: run["in"][name] for name, _ in graph.inputs})
        for name, expected in run["ort"].items():
            out = max(out, difference(got[name], expected, run.get("compare_mask", {}).get("")))
    return out


def difference(got: Array, expected: Array, mask: Array | None) -> float:
    """The largest difference of finite values at the positions to compare, relative to the reference."""
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    if not finite.any():
        return 0.0
    scale = max(1.0, float(np.abs(expected[finite]).max()))
    apart = np.where(finite, np.abs(got.astype(np.float64) - np.where(finite, expected, 0.0)), 0.0)
    if mask is not None and expected.ndim == 3:
        apart = apart[mask]
    return float(np.nan_to_num(apart, nan=np.inf).max()) / scale
