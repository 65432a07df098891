"""Low-bit integer weights: unpacking and dequantisation in NumPy, for all that read stored weights.

A weight is (q - zero) scale, the scale and zero shared by a run of `block` elements along one axis (0: by
the whole axis). Two layouts are known. `rows`: unsigned integers packed within each row, low bits first, each
row padded to whole blocks, zeros packed alike (the layout of onnxruntime's MatMulNBits and QMoE operators,
whose documentation is the source; without zeros the middle of the range is zero). `plain`: one integer per
element in the weight's own shape, scales and zeros as ONNX's DequantizeLinear takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LAYOUTS = ("rows", "plain")


@dataclass(frozen=True)
class Scheme:
    """How integers stand for a weight: bits of each, elements per scale along `axis`, and the layout."""

    bits: int
    block: int = 0
    axis: int = -1
    layout: str = "rows"

    @property
    def name(self) -> str:
        """The usual short name: int4b32, int8."""
        return f"int{self.bits}" + (f"b{self.block}" if self.block else "")


def unpack(packed: Array, bits: int) -> Array:
    """u8 [..., n] -> u8 [..., n * 8 / bits], low bits first. Raises ValueError unless bits is 2, 4 or 8."""
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits}-bit integers")
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def dequantise(
    scheme: Scheme,
    shape: tuple[int, ...],
    values: Array,
    scales: Array,
    zeros: Array | None = None,
    order: Array | None = None,
    dtype: Any = np.float32,
) -> Array:
    """The weight of `shape`. `order` [K] gives the block of each column in place of its position.

    Raises ValueError where the parts do not fit."""
    if scheme.layout == "plain":
        return _plain(scheme, values, scales, zeros).astype(dtype)
    lead, columns = shape[:-1], shape[-1]
    q = unpack(values.reshape(*lead, -1), scheme.bits)
    factor = scales.reshape(*lead, -1).astype(np.float32)
    blocks = factor.shape[-1]
    middle = np.float32(1 << (scheme.bits - 1))
    offset = np.full(factor.shape, middle, np.float32)
    if zeros is not None and zeros.dtype == np.uint8 and not scheme.block and scheme.bits < 8:
        flat = zeros.reshape(*lead[:-1], -1)  # one per row: packed along the rows
        offset = unpack(flat, scheme.bits)[..., : lead[-1], None].astype(np.float32)
    elif zeros is not None and zeros.dtype == np.uint8:
        offset = unpack(zeros.reshape(*lead, -1), scheme.bits)[..., :blocks].astype(np.float32)
    elif zeros is not None:
        offset = zeros.reshape(*lead, -1).astype(np.float32)
    size = scheme.block or columns
    column = np.arange(columns) // size if order is None else order.astype(np.int64)
    if q.shape[-1] < columns or int(column.max(initial=0)) >= blocks or int(column.min(initial=0)) < 0:
        raise ValueError(f"{q.shape[-1]} integers and {blocks} scales for rows of {columns}")
    made = (q[..., :columns].astype(np.float32) - offset[..., column]) * factor[..., column]
    return np.asarray(made, dtype)


def _plain(scheme: Scheme, values: Array, scales: Array, zeros: Array | None) -> Array:
    axis = scheme.axis % max(values.ndim, 1)

    def spread(part: Array) -> Array:
        part = part.astype(np.float32)
        if part.size == 1:
            return part.reshape(())
        if part.ndim == 1 and not scheme.block:
            return part.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        return np.repeat(part, scheme.block, axis).take(np.arange(values.shape[axis]), axis)

    q = values.astype(np.float32)
    return (q if zeros is None else q - spread(zeros)) * spread(scales)
