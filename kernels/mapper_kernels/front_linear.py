"""Products for callers with NumPy arrays: see `api`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_kernels import fused
from mapper_kernels.jit import entry
from mapper_kernels.names import ACTIVATIONS
from mapper_kernels.sizes import project_scratch
from mapper_kernels.weight import F32, I64, Norm, Weight, checked, positive, scratch_memory


@entry()
def project_parts(r: Any, a: Any, f: Any, scratch: int, first: int, last: int, parts: int) -> None:
    """`fused.project`, parts first..last - 1 of `parts`."""
    for part in range(first, last):
        fused.project(r, a, f, scratch, part, parts)


def project_arguments(
    x: F32, weights: Sequence[tuple[Weight, F32 | None]], norm: Norm | None, kind: int, activation: str
) -> tuple[list[int], I64, npt.NDArray[np.float64]]:
    """Arguments of `fused.project`: addresses up to the matrices', and what it takes as `a` and `f`."""
    if x.ndim != 2:
        raise ValueError(f"x has {x.ndim} axes; wanted: [M, K]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    m, k = x.shape
    n = weights[0][0].shape[0]
    given = norm or Norm()
    kind_of_norm = fused.NO_NORM if norm is None else fused.LAYER_NORM if norm.centred else fused.RMS_NORM
    checked("x", x, ("float32",), (m, k))
    head = [m, k, kind_of_norm, given.weight is not None, given.bias is not None, 0, 0, kind]
    a, r = [*head, ACTIVATIONS[activation], len(weights)], [x.ctypes.data]
    for name, vector in (("norm weight", given.weight), ("norm bias", given.bias)):
        if vector is not None:
            checked(name, vector, ("float32",), (k,))
            r.append(vector.ctypes.data)
    for weight, bias in weights:
        if weight.shape != (n, k):
            raise ValueError(f"a weight {list(weight.shape)} for x {list(x.shape)}; wanted: {[n, k]}")
        if bias is not None:
            checked("bias", bias, ("float32",), (n,))
        a += [n, weight.layout.code, weight.zeros is not None, bias is not None]
        r += weight.addresses() + ([] if bias is None else [bias.ctypes.data])
    f = np.zeros(len(a))
    f[5], f[6] = given.epsilon, given.offset
    return r, np.array(a, np.int64), f


def _project(
    x: F32, weights: Sequence[tuple[Weight, F32 | None]], norm: Norm | None, residual: F32 | None, kind: int,
    activation: str, parts: int,
) -> F32:  # fmt: skip
    r, a, f = project_arguments(x, weights, norm, kind, activation)
    m, n = x.shape[0], weights[0][0].shape[0]
    if residual is not None:
        checked("residual", residual, ("float32",), (m, n))
        r.append(residual.ctypes.data)
    y = np.empty((m, n), np.float32)
    memory, scratch = scratch_memory(project_scratch(m, x.shape[1], n, len(weights)))
    project_parts(np.array([*r, y.ctypes.data], np.int64), a, f, scratch, 0, positive(parts), parts)
    del memory
    return y


def linear(
    x: F32,
    weight: Weight,
    bias: F32 | None = None,
    norm: Norm | None = None,
    residual: F32 | None = None,
    activation: str | None = None,
    parts: int = 1,
) -> F32:
    """y [M, N] = activation(norm(x) W^T + bias) or norm(x) W^T + bias + residual; x [M, K], residual [M, N].

    `parts`: cut N into as many shares, one after the other. The result does not depend on it but for
    rounding.
    """
    if residual is not None and activation is not None:
        raise ValueError("either a residual or an activation follows a product")
    kind = fused.RESIDUAL if residual is not None else fused.ACTIVATION if activation else fused.PLAIN
    return _project(x, [(weight, bias)], norm, residual, kind, activation or "identity", parts)


def gated(
    x: F32,
    gate: Weight,
    up_weight: Weight,
    activation: str = "silu",
    gate_bias: F32 | None = None,
    up_bias: F32 | None = None,
    norm: Norm | None = None,
    parts: int = 1,
) -> F32:
    """y [M, N] = activation(norm(x) G^T + gate_bias) (norm(x) U^T + up_bias); x [M, K], G and U [N, K]."""
    both = [(gate, gate_bias), (up_weight, up_bias)]
    return _project(x, both, norm, None, fused.GATE, activation, parts)
