"""Weights and norms as the NumPy front takes them: arrays that were checked once, so that compiled code may
read them by address. Importable without the compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_kernels.formats import FORMATS, Format

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
_VALUES = {"f32": ("float32",), "f16": ("float16",), "bf16": ("bfloat16", "uint16")}
_VALUES |= {"f8e4m3": ("float8_e4m3fn", "uint8")}
_SCALES = {0: (), 1: ("uint8",), 2: ("float16",), 4: ("float32",)}


def checked(name: str, array: Array, kinds: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an array is row-major, in this byte order, of one of the types and of the
    shape."""
    if array.dtype.name not in kinds or not array.dtype.isnative:
        raise ValueError(f"{name} is {array.dtype}; wanted: {' or '.join(kinds)}")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; wanted: {list(shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous in row-major order")


def positive(parts: int) -> int:
    """A number of parts. Raises ValueError below 1."""
    if parts < 1:
        raise ValueError(f"{parts} parts")
    return parts


def scratch_memory(size: int) -> tuple[Array, int]:
    """Memory and the address of its first cache line."""
    memory = np.empty(size + 64, np.uint8)
    return memory, -(-memory.ctypes.data // 64) * 64


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in one of `FORMATS`, as the kernels read it (see `formats`).

    values: [N, K] of the element type (bf16 also as its bits, uint16; f8e4m3 also uint8), or for formats of
    blocks, uint8 [N, bytes of a padded row] or, as in MatMulNBits, [N, blocks, bytes of a block]. scales:
    [N], or [N, blocks], of float16, float32 or (mxfp4) uint8, also flat. zeros: uint8 [N, ceil(blocks / 2)],
    also flat. Raises ValueError where they do not fit, and for codes that no kernel reads: NaN in f8e4m3 and
    in the scales of mxfp4.
    """

    format: str
    values: Array
    shape: tuple[int, int]
    scales: Array | None = None
    zeros: Array | None = None

    def __post_init__(self) -> None:
        layout = self.layout
        n, k = self.shape
        if n < 1 or k < 1:
            raise ValueError(f"a weight of shape {list(self.shape)}")
        blocks = layout.scale_bytes(k) // layout.scale if layout.scale else 0
        _part("values", self._rows(self.values), _VALUES.get(self.format, ("uint8",)), (n, self._columns))
        _part("scales", self.scales, _SCALES[layout.scale], (n, blocks))
        if self.zeros is not None:
            kinds = ("uint8",) if layout.zeros else ()
            _part("zeros", self.zeros, kinds, (n, layout.zero_bytes(k)))
        if self.format == "f8e4m3" and bool(((self.values.view(np.uint8) & 0x7F) == 0x7F).any()):
            raise ValueError("values of f8e4m3 hold NaN")
        if self.format == "mxfp4" and self.scales is not None and bool((self.scales == 0xFF).any()):
            raise ValueError("scales of mxfp4 hold NaN")

    @property
    def layout(self) -> Format:
        """Its format. Raises ValueError for an unknown name."""
        if self.format not in FORMATS:
            raise ValueError(f"unknown weight format {self.format!r}; formats: {', '.join(FORMATS)}")
        return FORMATS[self.format]

    @property
    def _columns(self) -> int:
        return self.layout.value_bytes(self.shape[1]) if self.layout.blocked else self.shape[1]

    def _rows(self, values: Array) -> Array:
        """MatMulNBits gives the blocks of a row an axis of their own."""
        if self.layout.blocked and values.ndim == 3 and values.flags.c_contiguous:
            return values.reshape(len(values), -1)
        return values

    @staticmethod
    def of(w: F32, name: str = "f32") -> Weight:
        """A float32 array [N, K] in a plain format: f32, f16 or bf16, rounded to nearest even. Raises
        ValueError for another format: those are given as arrays."""
        import ml_dtypes

        kinds: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
        if name not in kinds or w.ndim != 2:
            raise ValueError(f"an array of {w.ndim} axes is not made into a weight {name!r}")
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(w, kinds[name])
        return Weight(name, values, (w.shape[0], w.shape[1]))

    def addresses(self) -> list[int]:
        """Of values, scales and zeros, as far as there are any."""
        parts = (self.values, self.scales, self.zeros)
        return [a.ctypes.data for a in parts if a is not None]


def _part(name: str, array: Array | None, kinds: tuple[str, ...], shape: tuple[int, int]) -> None:
    if not kinds:
        if array is not None:
            raise ValueError(f"this format has no {name}")
        return
    if array is None:
        raise ValueError(f"this format needs {name}")
    flat = name != "values" and array.ndim == 1
    checked(name, array, kinds, (shape[0] * shape[1],) if flat else shape)


@dataclass(frozen=True)
class Norm:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) (weight + offset) + bias along K; the mean is 0 unless
    `centred` (layer norm). weight, bias: float32 [K] or None."""

    weight: F32 | None = None
    bias: F32 | None = None
    epsilon: float = 1e-5
    offset: float = 0.0
    centred: bool = False
