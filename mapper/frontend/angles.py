"""What rotary angles say of themselves: base frequency, and how it was stretched for longer contexts.

Read off the angles of position 1. Sources of the forms: RoFormer (base), position interpolation (linear), the
YaRN paper section 3.2 (a ramp over the pair's number), Llama 3.1's published scaling (a ramp over the
frequency).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import MapperError
from mapper.frontend.agree import MAX_ELEMENTS, volume
from mapper.ir.graph import Graph
from mapper.ir.reference import evaluate_values

Array = npt.NDArray[np.float64]
_CLOSE = 2e-3  # tables in half precision have such errors


@dataclass(frozen=True)
class Angles:
    """theta^(-2i/width), stretched: `scaling` is none, linear, llama3, yarn, or unknown; `stretch` the factor
    of the slowest pair; `magnitude` that of cosines and sines. None where it cannot be read."""

    theta: float | None = None
    magnitude: float | None = None
    scaling: str = "unknown"
    stretch: float | None = None


def rounded(number: float, digits: int = 7) -> float:
    """`number` with so many significant digits."""
    return float(f"{number:.{digits}g}")


def angles(graph: Graph, cos: Any, sin: Any, style: str, width: int) -> Angles:
    """What the tables of a rotary embedding of `width` columns are."""
    try:
        c, s = evaluate_values(graph, _one_token(graph), [cos, sin], "f64")
    except MapperError:
        return Angles()
    if not c.size or c.shape != s.shape or not (np.isfinite(c).all() and np.isfinite(s).all()):
        return Angles()
    c, s = (a.reshape(-1, a.shape[-1])[-1].astype(np.float64) for a in (c, s))
    half = width // 2
    if len(c) == width:
        c, s = (c[:half], s[:half]) if style == "half" else (c[0::2], s[0::2])
    magnitude = rounded(float(np.hypot(c[0], s[0])))
    angle = np.arctan2(s, c)
    if half < 2 or not bool(np.all(angle > 0)):
        return Angles(None, magnitude)
    with np.errstate(all="ignore"):
        found = _stretched(angle, magnitude)
    numbers = (n for n in (found.theta, found.stretch) if n is not None)
    return found if all(map(np.isfinite, numbers)) else Angles(None, magnitude)


def _stretched(angle: Array, magnitude: float) -> Angles:
    """The form of the angles of all pairs. The fastest pairs tell theta, or where they are changed the
    slowest do."""
    half, number = len(angle), np.arange(len(angle))
    for a, b in ((0, 1), (half - 2, half - 1)):
        theta = float((angle[b] / angle[a]) ** -half)
        ratio = angle / theta ** (-number / half)
        if np.allclose(ratio, ratio[0], rtol=_CLOSE):
            stretch = 1.0 / ratio[0]
            base = _base(angle, number)
            if abs(stretch - 1.0) < _CLOSE:
                return Angles(base, magnitude, "none", 1.0)
            return Angles(base, magnitude, "linear", rounded(stretch, 4))
        falls = bool(np.all(np.diff(ratio) <= _CLOSE * ratio[:-1]))
        if falls and abs(ratio[0] - 1.0) < _CLOSE and ratio[-1] < 1.0:
            kind = _ramp(ratio, theta ** (-number / half), magnitude)
            ends = [np.flatnonzero(np.isclose(ratio, r, rtol=_CLOSE)) for r in (ratio[0], ratio[-1])]
            flat = max(ends, key=len)
            return Angles(_base(angle[flat], flat, half), magnitude, kind, rounded(1.0 / ratio[-1], 4))
    return Angles(None, magnitude)


def _base(angle: Array, number: npt.NDArray[np.int64], half: int = 0) -> float:
    """theta of the angles of some pairs that fall evenly, by least squares of their logarithms."""
    slope = float(np.polyfit(number, np.log(angle), 1)[0])
    return rounded(float(np.exp(-slope * (half or len(angle)))), 5)


def _ramp(ratio: Array, frequency: Array, magnitude: float) -> str:
    """Whether the ratio falls linearly in the pair's number (yarn) or in its frequency (llama3)."""
    inside = np.flatnonzero((ratio < ratio[0] * (1 - _CLOSE)) & (ratio > ratio[-1] * (1 + _CLOSE)))
    if len(inside) < 3:
        return "yarn" if abs(magnitude - 1.0) > _CLOSE else "llama3"
    misfits = []
    for x in (inside.astype(np.float64), frequency[inside]):
        line = np.polyval(np.polyfit(x, ratio[inside], 1), x)
        misfits.append(float(np.abs(line - ratio[inside]).max()))
    if min(misfits) > 5 * _CLOSE:
        return "unknown"
    return "yarn" if misfits[0] < misfits[1] else "llama3"


def _one_token(graph: Graph) -> dict[str, Any]:
    """Inputs for one token at position 1."""
    sizes = {"batch": 1, "sequence": 1, "past": 1}
    given: dict[str, Any] = {}
    for name, kind in graph.inputs:
        if all(d.symbols <= set(sizes) for d in kind.shape):
            shape = [d.evaluate(sizes) for d in kind.shape]
            if volume(shape) > MAX_ELEMENTS:
                continue
            given[name] = np.ones(shape, kind.numpy)
    return given
