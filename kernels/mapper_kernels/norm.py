"""Normalisation over the last axis, in float32 with float64 sums (the sums are exact enough to be
order-free)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mapper_kernels.jit import fast
from mapper_kernels.split import share


@fast
def norm(
    x: Any, weight: Any, bias: Any, y: Any, centred: bool, eps: float, offset: float, part: int, parts: int
) -> None:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * (weight + offset) + bias, row by row; float32.

    x, y [R, D]; weight, bias [D] or of length 0 (factor 1, nothing added). The mean is taken as 0 where
    `centred` is false (RMS norm). Shares rows.
    """
    rows, d = x.shape
    low, high = share(rows, 1, part, parts)
    for r in range(low, high):
        mean = np.float32(0)
        if centred:
            total = 0.0
            for i in range(d):
                total += x[r, i]
            mean = np.float32(total / d)
        square = 0.0
        for i in range(d):
            v = x[r, i] - mean
            square += v * v
        factor = np.float32(1.0 / np.sqrt(square / d + eps))
        for i in range(d):
            y[r, i] = (x[r, i] - mean) * factor
        if weight.shape[0] == d:
            add = np.float32(offset)
            for i in range(d):
                y[r, i] *= weight[i] + add
        if bias.shape[0] == d:
            for i in range(d):
                y[r, i] += bias[i]
