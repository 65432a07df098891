"""Where a tensor's bytes are, checked against its shape; reading of the small ones.

Nothing is read by `locate`: sizes are compared as Python integers, so no dimension product can overflow.
"""

from __future__ import annotations

import math
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError, UnsupportedModelError, WeightsMissingError
from mapper.frontend.proto import TensorRecord
from mapper.frontend.wire import (
    FIXED32,
    FIXED64,
    SPAN,
    VARINT,
    Source,
    count_packed_varints,
    packed_varints,
)

Array = npt.NDArray[Any]

# ONNX data type code -> (our name, bits per element). Source: onnx.proto, TensorProto.DataType.
DTYPES: dict[int, tuple[str, int]] = {
    1: ("f32", 32), 2: ("u8", 8), 3: ("i8", 8), 4: ("u16", 16), 5: ("i16", 16), 6: ("i32", 32),
    7: ("i64", 64), 9: ("bool", 8), 10: ("f16", 16), 11: ("f64", 64), 12: ("u32", 32), 13: ("u64", 64),
    16: ("bf16", 16),
    17: ("f8e4m3", 8), 19: ("f8e5m2", 8), 21: ("u4", 4), 22: ("i4", 4),
}  # fmt: skip
NUMPY: dict[str, str] = {
    "f32": "<f4", "u8": "u1", "i8": "i1", "u16": "<u2", "i16": "<i2", "i32": "<i4", "i64": "<i8", "bool": "?",
    "f16": "<f2", "f64": "<f8", "u32": "<u4", "u64": "<u8", "bf16": "bfloat16",
}  # fmt: skip
# typed field of TensorProto -> what it may hold
_TYPED = {
    4: {"f32"},
    5: {"i32", "i16", "i8", "u8", "u16", "bool", "f16", "bf16", "f8e4m3", "f8e5m2", "u4", "i4"},
}
_TYPED |= {7: {"i64"}, 10: {"f64"}, 11: {"u32", "u64"}}
_WIRE = {4: (FIXED32, SPAN), 10: (FIXED64, SPAN)}  # how the elements of a typed field are written
MAX_ELEMENTS = 1 << 60
MAX_LOCATION = 1024  # characters of an external file's path
MAX_FILES = 10_000  # external files of one model


@dataclass(frozen=True)
class ExternalFiles:
    """The files outside of the model file that hold tensors: in `folder`, the model's, or in `root`. Each is
    looked at once; `sizes` are their bytes, None where a file is not there."""

    folder: Path
    root: Path | None = None
    sizes: dict[str, int | None] = field(default_factory=dict)

    def size(self, location: str, where: str) -> int | None:
        """Bytes of the file at `location`. Raises ModelError where it is none that may be read."""
        if location not in self.sizes:
            if len(self.sizes) >= MAX_FILES:
                raise ModelError(f"{where}: external data in more than {MAX_FILES} files")
            self.sizes[location] = _file_size(
                inside(self.folder, self.root, location, where), location, where
            )
        return self.sizes[location]


@dataclass(frozen=True)
class Location:
    """`bytes` bytes at `offset` of `file`, relative to the model's folder; None: typed data in the model."""

    file: str | None
    offset: int
    bytes: int


def dtype_name(code: int, where: str) -> str:
    """Our name of an ONNX data type. Raises UnsupportedModelError for strings, complex and unknown codes."""
    if code not in DTYPES:
        raise UnsupportedModelError(f"{where} has data type code {code}, which is not supported")
    return DTYPES[code][0]


def elements(dims: list[int], where: str) -> int:
    """The product of `dims`. Raises ModelError where a dimension is negative or the product is absurd."""
    if any(d < 0 for d in dims):
        raise ModelError(f"{where} has a negative dimension: {dims}")
    product = math.prod(dims)
    if product > MAX_ELEMENTS:
        raise ModelError(
            f"{where} has dims {dims[:8]}, whose product of {product.bit_length()} bits overflows any file"
        )
    return product


def byte_length(count: int, code: int) -> int:
    """Bytes of `count` elements; 4-bit types are packed two to a byte."""
    return -(-count * DTYPES[code][1] // 8)


def locate(
    tensor: TensorRecord, source: Source, model_file: Path, owner: str, others: ExternalFiles
) -> Location:
    """Where the data of `tensor` lies. Raises ModelError where length, offset or path cannot be right."""
    where = f"{owner} {tensor.name[:80]!r}"
    name = dtype_name(tensor.dtype, where)
    need = byte_length(elements(tensor.dims, where), tensor.dtype)
    if tensor.is_external:
        return _external(tensor, need, others, where)
    if tensor.raw is not None:
        if tensor.typed:
            raise ModelError(f"{where} holds both raw and typed data")
        have = tensor.raw[1] - tensor.raw[0]
        if have != need:
            raise ModelError(f"{where} of shape {tensor.dims[:8]} needs {need} bytes, its data has {have}")
        return Location(model_file.name, tensor.raw[0], need)
    _check_typed(tensor, source, name, where)
    return Location(None, 0, need)


def _check_typed(tensor: TensorRecord, source: Source, name: str, where: str) -> None:
    have = 0
    spans = [(n, b - a) for n, kind, a, b in tensor.typed if kind == SPAN]
    source.typed_left -= sum(size if n in _WIRE else 8 * size for n, size in spans)
    if source.typed_left < 0:
        raise UnsupportedModelError(f"{where}: too much data in the file that is neither raw nor external")
    for number, kind, a, b in tensor.typed:
        if kind not in _WIRE.get(number, (VARINT, SPAN)):
            raise ModelError(f"malformed protobuf: {where} has data of wire type {kind}")
        if number not in _TYPED or name not in _TYPED[number]:
            raise ModelError(f"{where} of type {name} keeps data in field {number} of another type")
        if kind != 2:
            have += 1
        elif number in (4, 10):
            size = 4 if number == 4 else 8
            have += (b - a) // size if (b - a) % size == 0 else -1
        else:
            have += count_packed_varints(bytes(source.data[a:b]))
    count = elements(tensor.dims, where)
    need = -(-count // 2) if name in ("u4", "i4") else count
    if have != need:
        raise ModelError(f"{where} of shape {tensor.dims[:8]} needs {need} elements, its data has {have}")


def _number(text: str, key: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ModelError(f"{where} has external data with {key} {text[:40]!r}")
    return int(text)


def _external(tensor: TensorRecord, need: int, others: ExternalFiles, where: str) -> Location:
    entries = tensor.external
    location = entries.get("location", "")
    offset = _number(entries.get("offset", "0"), "offset", where)
    length = _number(entries["length"], "length", where) if "length" in entries else need
    if length != need:
        raise ModelError(
            f"{where} of shape {tensor.dims[:8]} needs {need} bytes, its external data has {length}"
        )
    size = others.size(location, where)
    if size is not None and offset + need > size:
        raise ModelError(
            f"{where}: external data ends at byte {offset + need} of {location[:80]!r}, of {size}"
        )
    return Location(location, offset, need)


def _file_size(path: Path, location: str, where: str) -> int | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(
            f"{where}: external file {location[:80]!r} cannot be read: {error.strerror}"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{where}: external data {location[:80]!r} is not a regular file")
    return found.st_size


def inside(folder: Path, external_root: Path | None, location: str, where: str) -> Path:
    """The real path of `location`. Raises ModelError where it leads out of `folder` and of `external_root`,
    also by links."""
    if len(location) > MAX_LOCATION:
        raise ModelError(f"{where} has external data at a path of {len(location)} characters")
    if not location or "\0" in location or "\\" in location or Path(location).is_absolute():
        raise ModelError(f"{where} has external data at {location[:80]!r}, which is no relative path")
    try:
        roots = [r.resolve() for r in (folder, external_root) if r is not None]
        real = (roots[0] / location).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{where}: external data path {location[:80]!r} cannot be resolved") from error
    if real in roots or not any(real.is_relative_to(r) for r in roots):
        allowed = "the model's folder" if external_root is None else f"the model's folder and {external_root}"
        raise ModelError(f"{where} has external data at {location[:80]!r}, outside {allowed}")
    return real


def read(tensor: TensorRecord, source: Source, location: Location, folder: Path) -> Array:
    """The tensor's elements in its shape. Raises WeightsMissingError where the external file is absent."""
    name = DTYPES[tensor.dtype][0]
    if name not in NUMPY:
        raise UnsupportedModelError(f"tensor {tensor.name[:80]!r} of type {name} is needed as a constant")
    dtype = _numpy(NUMPY[name])
    if location.file is None:
        return _typed(tensor, source, dtype).reshape(tensor.dims)
    if not tensor.is_external:
        raw = bytes(source.data[location.offset : location.offset + location.bytes])
    else:
        try:
            with (folder / location.file).open("rb") as file:
                file.seek(location.offset)
                raw = file.read(location.bytes)
        except OSError as error:
            raise WeightsMissingError(
                f"tensor {tensor.name[:80]!r}: {location.file} cannot be read"
            ) from error
    return np.frombuffer(raw, dtype).reshape(tensor.dims)


def _numpy(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    kind: np.dtype[Any] = np.dtype(name)
    return kind


def _typed(tensor: TensorRecord, source: Source, dtype: np.dtype[Any]) -> Array:
    parts: list[Array] = []
    for number, kind, a, b in tensor.typed:
        if number == 4:
            parts.append(np.frombuffer(bytes(source.data[a:b]), "<f4"))
        elif number == 10:
            parts.append(np.frombuffer(bytes(source.data[a:b]), "<f8"))
        elif kind == 0:
            parts.append(np.frombuffer(struct.pack("<Q", a), "<u8"))
        else:
            parts.append(packed_varints(bytes(source.data[a:b])))
    whole = np.concatenate(parts) if parts else np.zeros(0, dtype)
    if whole.dtype == np.uint64 and dtype.itemsize == 2 and dtype.kind not in "iu":  # bits of a half
        return whole.astype("<u2").view(dtype)
    return whole.astype(dtype)
