"""Which published rows a calibration may see. The rule knows configurations, never values."""

from __future__ import annotations

import hashlib

from mapper.published.points import Point

SHARE = 0.25  # of the configurations


def configuration(point: Point) -> str:
    """What is deployed, without load and lengths: rows of one configuration are never on both sides."""
    row = point.row
    parts = (point.framework, point.load, row.system, row.model, row.weights, point.tensor, point.experts)
    return "|".join(str(p) for p in (*parts, point.replicas))


def calibrates(point: Point) -> bool:
    """Whether the row belongs to the calibration subset: a quarter of the configurations, by a hash."""
    digest = hashlib.sha256(configuration(point).encode()).digest()
    return int.from_bytes(digest[:4], "big") < SHARE * 2**32
