"""Element types that a schedule may name. An allow-list: a schedule file must not name Python objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper.errors import ScheduleError

_WIDTHS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}
_NUMPY = frozenset({"bool", *(f"{kind}{bits}" for kind, widths in _WIDTHS.items() for bits in widths)})
_EXTENDED = frozenset(("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"))
HALVES = ("int4", "uint4")
"""Types of which files hold two elements per byte, the first one low; arrays have a byte for each."""
_ALIASES = {f"{k[0]}{b}": f"{k}{b}" for k, w in _WIDTHS.items() for b in w} | {"bf16": "bfloat16"}


def dtype(name: Any) -> np.dtype[Any]:
    """The NumPy type called `name` ("float32", "f32", "bfloat16"...). Raises ScheduleError for others."""
    if isinstance(name, str):
        full = _ALIASES.get(name, name)
        if full in _NUMPY:
            return np.dtype(full)
        if full in _EXTENDED:
            import ml_dtypes  # NumPy knows these names only once the package is loaded

            found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, full))
            return found
    raise ScheduleError(f"{str(name)[:40]!r} is not an element type of a schedule")
