"""Types and data attributes of the `dataflow` dialect: `!dataflow.tensor<[batch x 64], f32>` and friends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from xdsl.ir import Data, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer

from mapper.errors import ModelError
from mapper.ir.dims import Dim

Array = npt.NDArray[Any]
DimLike = int | str | Dim

BITS: dict[str, int] = {
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "f8e5m2": 8,
    "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4,
    "u64": 64, "u32": 32, "u16": 16, "u8": 8, "u4": 4, "bool": 8,
}  # fmt: skip
"""Storage bits of one element, per dtype name."""

_NUMPY = {
    "f64": "float64", "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "i16": "int16",
    "i8": "int8", "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "bool": "bool",
}  # fmt: skip
_ML_DTYPES = {
    "bf16": "bfloat16", "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "i4": "int4", "u4": "uint4",
}  # fmt: skip
_NAMES = {v: k for k, v in (_NUMPY | _ML_DTYPES).items()}


def is_float(dtype: str) -> bool:
    """Whether the dtype name is a floating-point format."""
    return dtype.startswith(("f", "bf"))


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype name (bf16, f8 and 4-bit formats through ml_dtypes). Raises ModelError."""
    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype])
    if dtype in _ML_DTYPES:
        import ml_dtypes  # lazy: only formats that NumPy lacks

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype]))
        return found
    raise ModelError(f"unknown element type {dtype!r}")


def dtype_name(dtype: Any) -> str:
    """The dtype name of anything that NumPy accepts as a dtype. Raises ModelError for a foreign one."""
    name = np.dtype(dtype).name
    if name not in _NAMES:
        raise ModelError(f"element type {name} has no counterpart")
    return _NAMES[name]


@dataclass(frozen=True)
class TensorInfo:
    """The parameters of a tensor type."""

    shape: tuple[Dim, ...]
    dtype: str


def parse_shape(parser: AttrParser) -> tuple[Dim, ...]:
    """`[2 x batch x "past + 1"]`, each dimension a number, a symbol, or a quoted expression."""
    dims: list[Dim] = []
    parser.parse_punctuation("[")
    while parser.parse_optional_punctuation("]") is None:
        if dims:
            parser.parse_keyword("x")
        number = parser.parse_optional_integer(allow_boolean=False)
        if number is not None:
            dims.append(Dim.of(number))
        elif (name := parser.parse_optional_identifier()) is not None:
            dims.append(Dim.symbol(name))
        else:
            dims.append(Dim.parse(parser.parse_str_literal("dimension")))
    return tuple(dims)


def print_shape(printer: Printer, shape: Iterable[Dim]) -> None:
    """Inverse of `parse_shape`."""
    printer.print_string("[")
    for index, dim in enumerate(shape):
        if index:
            printer.print_string(" x ")
        text = str(dim)
        if dim.is_const or (text.isidentifier() and text.isascii()):
            printer.print_string(text)
        else:
            printer.print_string_literal(text)
    printer.print_string("]")


@irdl_attr_definition
class TensorType(Data[TensorInfo], TypeAttribute):
    """A dense tensor: shape (tuple of Dim, any of them symbolic) and dtype name. Make one with
    `TensorType.of`."""

    name = "dataflow.tensor"

    @staticmethod
    def of(shape: Sequence[DimLike], dtype: str) -> TensorType:
        """`TensorType.of(["batch", "past + 1", 64], "f32")`. Raises ModelError for an unknown dtype."""
        if dtype not in BITS:
            raise ModelError(f"unknown element type {dtype!r}")
        return TensorType(TensorInfo(tuple(Dim.of(d) for d in shape), dtype))

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The dimensions."""
        return self.data.shape

    @property
    def dtype(self) -> str:
        """Name of the element type, a key of BITS."""
        return self.data.dtype

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.data.shape)

    @property
    def is_static(self) -> bool:
        """Whether every dimension is a number."""
        return all(d.is_const for d in self.data.shape)

    @property
    def ints(self) -> tuple[int, ...]:
        """The dimensions as numbers. Raises ModelError where one is symbolic."""
        return tuple(d.value for d in self.data.shape)

    @property
    def elements(self) -> Dim:
        """Number of elements."""
        total = Dim.of(1)
        for dim in self.data.shape:
            total = total * dim
        return total

    @property
    def bytes(self) -> Dim:
        """Storage size in bytes; 4-bit formats round up."""
        bits = self.elements * BITS[self.dtype]
        return (bits + 7) // 8 if BITS[self.dtype] % 8 else bits // 8

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype."""
        return numpy_dtype(self.dtype)

    def __str__(self) -> str:
        """Short form for messages: `f32[batch x 64]`."""
        return f"{self.dtype}[{' x '.join(map(str, self.shape))}]"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> TensorInfo:
        """`<[2 x batch], f32>`."""
        with parser.in_angle_brackets():
            shape = parse_shape(parser)
            parser.parse_punctuation(",")
            dtype = parser.parse_identifier("element type")
            if dtype not in BITS:
                parser.raise_error(f"unknown element type {dtype!r}")
        return TensorInfo(shape, dtype)

    def print_parameter(self, printer: Printer) -> None:
        """Inverse of `parse_parameter`."""
        with printer.in_angle_brackets():
            print_shape(printer, self.shape)
            printer.print_string(f", {self.dtype}")


@irdl_attr_definition
class DimsAttr(Data[tuple[Dim, ...]]):
    """A tuple of dimensions as an attribute (the target of a reshape)."""

    name = "dataflow.dims"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[Dim, ...]:
        """`<[2 x batch]>`."""
        with parser.in_angle_brackets():
            return parse_shape(parser)

    def print_parameter(self, printer: Printer) -> None:
        """Inverse of `parse_parameter`."""
        with printer.in_angle_brackets():
            print_shape(printer, self.data)


@irdl_attr_definition
class BytesAttr(Data[bytes]):
    """Raw little-endian, C-order element bytes, printed as hexadecimal."""

    name = "dataflow.bytes"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> bytes:
        """`<"00ff">`."""
        with parser.in_angle_brackets():
            text = parser.parse_str_literal("hexadecimal bytes")
            try:
                return bytes.fromhex(text)
            except ValueError:
                parser.raise_error("bytes are not hexadecimal")

    def print_parameter(self, printer: Printer) -> None:
        """Inverse of `parse_parameter`."""
        with printer.in_angle_brackets():
            printer.print_string(f'"{self.data.hex()}"')  # nothing to escape


def type_of(array: Array) -> TensorType:
    """The tensor type of a NumPy array."""
    return TensorType.of(array.shape, dtype_name(array.dtype))
