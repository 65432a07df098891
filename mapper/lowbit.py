"""Low-bit weights: quantising, packing and dequantising in NumPy, for all that make or read stored weights.

A weight is (q - zero) scale, the scale and zero shared by a run of `block` elements along one axis (0: by
the whole axis). Two layouts are known. `rows`: unsigned integers packed within each row, low bits first, each
row padded to whole blocks, zeros packed alike (the layout of onnxruntime's MatMulNBits and QMoE operators,
whose documentation is the source; without zeros the middle of the range is zero). `plain`: one integer per
element in the weight's own shape, scales and zeros as ONNX's DequantizeLinear takes them.

The q of kind `int` are integers. Those of kind `e4m3` and `e2m1` are floats of 8 and 4 bits without zeros, as
the OCP 8-bit floating point (v1.0) and microscaling (MX, v1.0) specifications define them; a u8 scale is MX's
E8M0: 2 to the power of (scale - 127).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LAYOUTS = ("rows", "plain")
KINDS = ("int", "e4m3", "e2m1")
PARTS = ("values", "scales", "zeros", "order")
"""The stored parts of a weight, in the order in which `dequantise` takes them."""

BLOCK = 32
"""Elements per scale in the formats of FORMATS that have blocks; MX fixes it for mxfp4."""
_CHUNK = 1 << 22
"""Elements that are worked on at a time, so that temporaries stay small beside the weight."""
_E4M3_MAX, _E2M1_MAX, _E2M1_EXPONENT = 448.0, 6.0, 2
_E8M0_BIAS = 127
_MOST = 1 << 16
"""Elements of a block; rows are padded to whole ones."""
_BITS = {"int": (2, 4, 8), "e4m3": (8,), "e2m1": (4,)}


@dataclass(frozen=True)
class Scheme:
    """How low-bit elements stand for a weight: bits of each, elements per scale along `axis`, the layout,
    and what kind of number an element is."""

    bits: int
    block: int = 0
    axis: int = -1
    layout: str = "rows"
    kind: str = "int"

    @property
    def name(self) -> str:
        """The usual short name: int4b32, int8, f8e4m3, mxfp4 (e2m1 with any other block: e2m1b64)."""
        if self.kind == "e2m1" and self.block == BLOCK:
            return "mxfp4"
        stem = {"int": f"int{self.bits}", "e4m3": "f8e4m3", "e2m1": "e2m1"}[self.kind]
        return stem + (f"b{self.block}" if self.block else "")

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Part -> (shape, element type) of a weight [..., N, K] that `quantise` makes: values u8 [..., N,
        bytes of a padded row], scales [..., N, blocks], zeros u8 [..., N, ceil(blocks / 2)] (int4)."""
        *lead, columns = shape
        blocks = -(-columns // self.block) if self.block else 1
        padded = blocks * self.block if self.block else columns
        scale = "u8" if self.kind == "e2m1" else "f16" if self.block else "f32"
        found = {
            "values": ((*lead, -(-padded * self.bits // 8)), "u8"),
            "scales": ((*lead, blocks), scale),
        }
        if self.has_zeros:
            found["zeros"] = ((*lead, -(-blocks * self.bits // 8)), "u8")
        return found

    @property
    def has_zeros(self) -> bool:
        """Whether `quantise` gives zero points: for integers below 8 bits, where symmetry costs a code."""
        return self.kind == "int" and self.bits < 8


FORMATS: dict[str, Scheme | str] = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "bf16",
    "int8": Scheme(8, BLOCK),
    "int8row": Scheme(8),
    "int4": Scheme(4, BLOCK),
    "f8e4m3": Scheme(8, kind="e4m3"),
    "mxfp4": Scheme(4, BLOCK, kind="e2m1"),
}
"""Weight formats by the name that users give: an element type that weights are cast to, or a scheme."""
_ALIASES = {
    "fp32": "f32",
    "float32": "f32",
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp8": "f8e4m3",
}


def format_name(name: str) -> str:
    """The canonical name of a weight format (`fp16` is f16). Raises ValueError listing the formats."""
    found = _ALIASES.get(name, name)
    if found not in FORMATS:
        raise ValueError(f"unknown weight format {name!r}; formats: {', '.join(FORMATS)}")
    return found


def unpack(packed: Array, bits: int) -> Array:
    """u8 [..., n] -> u8 [..., n * 8 / bits], low bits first. Raises ValueError unless bits is 2, 4 or 8."""
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits}-bit integers")
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def pack(values: Array, bits: int) -> Array:
    """Inverse of `unpack`; a last byte that is not full is filled with zeros."""
    if bits == 8:
        return values
    each = 8 // bits
    short = -values.shape[-1] % each
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)]) if short else values
    grouped = padded.reshape(*padded.shape[:-1], -1, each)
    packed = np.zeros(grouped.shape[:-1], np.uint8)
    for place in range(each):
        packed |= grouped[..., place] << np.uint8(place * bits)
    return packed


# quantising ------------------------------------------------------------------------------------------------


def quantise(scheme: Scheme, weight: Array, parts: Sequence[str] = PARTS[:3]) -> dict[str, Array]:
    """The asked parts of a weight [..., N, K] in layout `rows`, of the shapes and types of `scheme.parts`.

    Elements are rounded to nearest, ties to even. Integers: the scale is the range of a block (with zero in
    it) over the number of steps, rounded up to its stored type, so that no element is clipped: an element
    is off by at most half a scale. Symmetric ones use -127..127, offset by 128. e4m3: the largest magnitude
    becomes 448. e2m1: the scale is 2 to the floor of log2(largest magnitude) - 2, and what exceeds 6
    saturates (MX v1.0, section 6.3). Raises ValueError for another layout, for elements that are not finite,
    and where a scale is beyond its stored type.
    """
    odd = scheme.layout != "rows" or scheme.axis != -1 or not 0 <= scheme.block <= _MOST
    odd = odd or (scheme.has_zeros and not scheme.block)
    if odd or scheme.bits not in _BITS.get(scheme.kind, ()) or weight.ndim < 2 or set(parts) - {*PARTS[:3]}:
        raise ValueError(f"quantising {weight.ndim} axes to {', '.join(parts)} of {scheme} is not known")
    declared = scheme.parts(weight.shape)
    types = {"u8": np.uint8, "f16": np.float16, "f32": np.float32}
    made = {
        name: np.zeros(shape, types[kind])
        for name, (shape, kind) in declared.items()
        if name in parts and name in declared
    }
    for where, rows in _row_blocks(weight):
        found = _quantise_rows(scheme, rows, "values" in parts)
        for name, array in made.items():
            array[where] = found[name].reshape(array[where].shape)
    return made


def _row_blocks(weight: Array) -> Iterator[tuple[tuple[Any, ...], Array]]:
    """(index, float32 rows [n, K]) of a weight [..., N, K], some rows at a time."""
    rows, columns = weight.shape[-2:]
    step = max(1, _CHUNK // max(columns, 1))
    for lead in np.ndindex(*weight.shape[:-2]):
        for first in range(0, rows, step):
            where = (*lead, slice(first, min(first + step, rows)))
            yield where, np.ascontiguousarray(weight[where], np.float32)


def _quantise_rows(scheme: Scheme, rows: Array, wanted: bool) -> dict[str, Array]:
    """All parts of rows [n, K], the values only where `wanted`."""
    size = scheme.block or rows.shape[-1]
    short = -rows.shape[-1] % max(size, 1)
    padded = np.pad(rows, [(0, 0), (0, short)]) if short else rows
    blocks = padded.reshape(len(rows), -1, size) if size else padded.reshape(len(rows), 1, 0)
    low, high = blocks.min(-1, initial=0.0), blocks.max(-1, initial=0.0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("elements that are not finite cannot be quantised")
    if scheme.kind == "int" and scheme.has_zeros:
        return _asymmetric(scheme, blocks, low, high, wanted)
    return _symmetric(scheme, blocks, np.maximum(-low, high), wanted)


def _asymmetric(scheme: Scheme, blocks: Array, low: Array, high: Array, wanted: bool) -> dict[str, Array]:
    most = (1 << scheme.bits) - 1
    scales = _rounded_up((high.astype(np.float64) - low) / most, np.float16)
    factor = scales.astype(np.float64)
    zeros = np.rint(np.divide(-low, factor, out=np.zeros_like(factor), where=factor > 0))
    found = {"scales": scales, "zeros": pack(np.clip(zeros, 0, most).astype(np.uint8), scheme.bits)}
    if wanted:
        q = _steps(blocks, scales)
        q += zeros[..., None].astype(np.float32)
        found["values"] = _packed(scheme, np.clip(q, 0, most, out=q))
    return found


def _symmetric(scheme: Scheme, blocks: Array, largest: Array, wanted: bool) -> dict[str, Array]:
    if scheme.kind == "e2m1":
        return _microscaled(scheme, blocks, largest, wanted)
    most = _E4M3_MAX if scheme.kind == "e4m3" else float((1 << (scheme.bits - 1)) - 1)
    scales = _rounded_up(largest.astype(np.float64) / most, np.float16 if scheme.block else np.float32)
    found = {"scales": scales}
    if wanted and scheme.kind == "e4m3":
        import ml_dtypes

        narrow = np.clip(_ratio(blocks, scales), -most, most).astype(ml_dtypes.float8_e4m3fn)
        found["values"] = narrow.view(np.uint8)
    elif wanted:
        q = _steps(blocks, scales)
        found["values"] = _packed(scheme, np.clip(q, -most, most, out=q) + np.float32(most + 1))
    return found


def _microscaled(scheme: Scheme, blocks: Array, largest: Array, wanted: bool) -> dict[str, Array]:
    exponent = np.frexp(largest)[1] - 1 - _E2M1_EXPONENT  # frexp's mantissa is below 1
    scales = np.clip(np.where(largest > 0, exponent + _E8M0_BIAS, 0), 0, 254).astype(np.uint8)
    found = {"scales": scales}
    if wanted:
        import ml_dtypes

        scaled = np.ldexp(blocks, _E8M0_BIAS - scales[..., None].astype(np.int32))
        narrow = np.clip(scaled, -_E2M1_MAX, _E2M1_MAX).astype(ml_dtypes.float4_e2m1fn)
        found["values"] = _packed(scheme, narrow.view(np.uint8) & np.uint8(15))
    return found


def _rounded_up(exact: Array, kind: Any) -> Array:
    """float64 scales as the next `kind` that is not below them. Raises ValueError beyond its range."""
    limit = float(np.finfo(kind).max)
    if exact.size and float(exact.max()) > limit:
        raise ValueError(f"a scale of {float(exact.max()):.4g} is beyond {np.dtype(kind).name}")
    stored = exact.astype(kind)
    return np.where(stored.astype(np.float64) < exact, np.nextafter(stored, kind(np.inf)), stored).astype(
        kind
    )


def _ratio(blocks: Array, scales: Array) -> Array:
    """Elements over their block's scale in float32; 0 where the scale is 0."""
    factor = scales[..., None].astype(np.float32)
    return np.divide(blocks, factor, out=np.zeros_like(blocks), where=factor > 0)


def _steps(blocks: Array, scales: Array) -> Array:
    ratio = _ratio(blocks, scales)
    return np.asarray(np.rint(ratio, out=ratio))


def _packed(scheme: Scheme, q: Array) -> Array:
    """Integers [n, blocks, size] as packed rows."""
    return pack(q.astype(np.uint8).reshape(len(q), -1), scheme.bits)


# dequantising ----------------------------------------------------------------------------------------------


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
    if scheme.bits not in _BITS.get(scheme.kind, ()):
        raise ValueError(f"{scheme.kind} elements of {scheme.bits} bits")
    if scheme.layout == "plain":
        return _plain(scheme, values, scales, zeros).astype(dtype)
    lead, columns = shape[:-1], shape[-1]
    stored = values.reshape(*lead, -1)
    factor = _factors(scheme, scales).reshape(*lead, -1)
    offset = _offsets(scheme, lead, factor.shape, zeros)
    blocks = factor.shape[-1]
    size = scheme.block or columns
    column = np.arange(columns) // max(size, 1) if order is None else order.astype(np.int64)
    held = stored.shape[-1] * 8 // scheme.bits
    if held < columns or int(column.max(initial=0)) >= blocks or int(column.min(initial=0)) < 0:
        raise ValueError(f"{held} integers and {blocks} scales for rows of {columns}")
    stored, factor = stored.reshape(-1, stored.shape[-1]), factor.reshape(-1, blocks)
    offset = None if offset is None else offset.reshape(-1, blocks)
    made = np.empty((len(stored), columns), dtype)
    even = order is None and held >= blocks * size
    step = max(1, _CHUNK // max(columns, 1))
    for first in range(0, len(stored), step):
        rows = slice(first, first + step)
        q = _elements(scheme, unpack(stored[rows], scheme.bits))
        if even:
            q = q[:, : blocks * size].reshape(-1, blocks, size)
            q = q if offset is None else np.subtract(q, offset[rows, :, None], out=q)
            q = np.multiply(q, factor[rows, :, None], out=q).reshape(len(q), -1)
            made[rows] = q[:, :columns]
            continue
        q = q[:, :columns]
        q = q if offset is None else q - offset[rows][:, column]
        made[rows] = q * factor[rows][:, column]
    return made.reshape(shape)


def _elements(scheme: Scheme, codes: Array) -> Array:
    return codes.astype(np.float32) if scheme.kind == "int" else _decoded(scheme.kind)[codes]


@cache
def _decoded(kind: str) -> Array:
    """Code -> float32."""
    import ml_dtypes

    if kind == "e4m3":
        return np.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn), np.float32)
    return np.asarray(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn), np.float32)


def _factors(scheme: Scheme, scales: Array) -> Array:
    if scheme.kind == "e2m1" and scales.dtype == np.uint8:
        return np.ldexp(np.float32(1), scales.astype(np.int32) - _E8M0_BIAS)
    return scales.astype(np.float32)


def _offsets(
    scheme: Scheme, lead: tuple[int, ...], shape: tuple[int, ...], zeros: Array | None
) -> Array | None:
    """The zero point of every block; None where there is none."""
    if scheme.kind != "int":
        return None
    if zeros is None:
        return np.full(shape, 1 << (scheme.bits - 1), np.float32)
    if zeros.dtype == np.uint8 and not scheme.block and scheme.bits < 8:
        flat = zeros.reshape(*lead[:-1], -1)  # one per row: packed along the rows
        return unpack(flat, scheme.bits)[..., : lead[-1], None].astype(np.float32)
    if zeros.dtype == np.uint8:
        return unpack(zeros.reshape(*lead, -1), scheme.bits)[..., : shape[-1]].astype(np.float32)
    return zeros.reshape(*lead, -1).astype(np.float32)


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
