"""Weight symbols: what a weight is called, its type, and where its bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xdsl.ir import Attribute

from mapper.errors import ModelError, WeightsMissingError
from mapper.ir.structure import WeightOp
from mapper.ir.types import TensorType, numpy_dtype, type_of
from mapper.lowbit import Scheme, dequantise, quantise

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Packing:
    """The stored parts of a weight of low-bit integers, each a weight of its own: see `mapper.lowbit`."""

    scheme: Scheme
    values: WeightSymbol
    scales: WeightSymbol
    zeros: WeightSymbol | None = None
    order: WeightSymbol | None = None

    @property
    def parts(self) -> dict[str, WeightSymbol]:
        """Part name -> weight, of those that are there."""
        named = {"values": self.values, "scales": self.scales, "zeros": self.zeros, "order": self.order}
        return {name: part for name, part in named.items() if part is not None}


@dataclass(frozen=True, eq=False)
class Derivation:
    """How a weight is made from another one when it is loaded: of `source`, its last two axes exchanged where
    `transposed`, the part `part` of its quantisation by `scheme`; without a scheme, a cast to the weight's
    type."""

    source: WeightSymbol
    scheme: Scheme | None = None
    part: str = ""
    transposed: bool = False

    def made(self, dtype: str) -> Array:
        """The array, of element type `dtype`. Raises WeightsMissingError; ModelError where the source cannot
        be quantised."""
        array = self.source.load()
        array = array.swapaxes(-1, -2) if self.transposed else array
        if self.scheme is None:
            return array.astype(numpy_dtype(dtype))
        try:
            return quantise(self.scheme, array, (self.part,))[self.part]
        except (ValueError, KeyError) as error:
            raise ModelError(f"weight {self.source.name!r}: {error}") from error


@dataclass(frozen=True, eq=False)
class WeightSymbol:
    """One weight. `bytes` bytes, little-endian in C order, at `offset` of `file` (relative to the model's
    folder); or, where `file` is None, the array `data`, or what `derivation` makes of another weight. 4-bit
    formats hold two elements per byte, the first one low.

    `derived` marks a table that a pass made: no parameter of the model. With `packing`, the weight is
    computed from its parts, `dtype` is the type it is computed in, and `bytes` are those of all parts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str | None = None
    offset: int = 0
    bytes: int = 0
    data: Array | None = None
    folder: Path | None = None
    derived: bool = False
    packing: Packing | None = None
    derivation: Derivation | None = None

    @staticmethod
    def of(name: str, data: Array, derived: bool = False) -> WeightSymbol:
        """A weight that is held as data."""
        kind = type_of(data)
        return WeightSymbol(name, data.shape, kind.dtype, data=data, bytes=data.nbytes, derived=derived)

    @cached_property
    def type(self) -> TensorType:
        """The tensor type."""
        return TensorType.of(self.shape, self.dtype)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.type.elements.value

    @property
    def format(self) -> str:
        """The storage format: its element type, or the name of its packing."""
        return self.dtype if self.packing is None else self.packing.scheme.name

    @property
    def root(self) -> WeightSymbol:
        """The stored weight that this one is made from: of a packed one the integers' own; else itself."""
        if self.derivation is not None:
            return self.derivation.source.root
        return self if self.packing is None else self.packing.values.root

    @property
    def needed(self) -> list[WeightSymbol]:
        """The weights that this one is made from, each after those that it is made from itself."""
        direct = [] if self.packing is None else list(self.packing.parts.values())
        direct += [] if self.derivation is None else [self.derivation.source]
        return [w for one in direct for w in (*one.needed, one)]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for weights that are stored alike: type and packing."""
        if self.packing is None:
            return (self.type,)
        return (self.type, self.packing.scheme, *((n, p.type) for n, p in self.packing.parts.items()))

    def load(self) -> Array:
        """The array, mapped read-only from its file where it has one. Raises WeightsMissingError."""
        if self.packing is not None:
            return self._unpacked(self.packing)
        if self.derivation is not None:
            return self.derivation.made(self.dtype)
        if self.data is not None:
            return self.data
        if self.file is None or self.folder is None:
            raise WeightsMissingError(f"weight {self.name!r} has no data")
        path = self.folder / self.file
        if not path.is_file() or path.stat().st_size < self.offset + self.bytes:
            raise WeightsMissingError(f"weight {self.name!r}: {path} does not hold its {self.bytes} bytes")
        if not self.elements:
            return np.zeros(self.shape, numpy_dtype(self.dtype))
        raw = np.memmap(path, np.uint8, "r", self.offset, (self.bytes,))
        return decode(raw, self.shape, self.dtype)

    def _unpacked(self, packing: Packing) -> Array:
        parts = {name: part.load() for name, part in packing.parts.items()}
        try:
            return dequantise(packing.scheme, self.shape, dtype=numpy_dtype(self.dtype), **parts)
        except ValueError as error:
            raise ModelError(f"weight {self.name!r}: {error}") from error

    def op(self) -> WeightOp:
        """The IR op that declares it."""
        return WeightOp.create(attributes=self._attributes)

    @cached_property
    def _attributes(self) -> dict[str, Attribute]:
        made = WeightOp.create(attributes={})
        values = {"file": self.file, "offset": self.offset, "bytes": self.bytes, "derived": self.derived}
        data = None if self.data is None else encode(self.data)
        made.set_attr("sym_name", self.name)
        if self.packing is not None:
            values |= _scheme_attributes(self.packing.scheme)
            values |= {n: p.name for n, p in self.packing.parts.items()}
        if self.derivation is not None:
            d = self.derivation
            values |= {"source": d.source.name, "part": d.part or None, "turned": d.transposed}
            values |= {} if d.scheme is None else _scheme_attributes(d.scheme)
        for name, value in {**values, "type": self.type, "data": data}.items():
            made.set_attr(name, value)
        return made.attributes

    @staticmethod
    def from_op(
        op: WeightOp, folder: Path | None, others: Mapping[str, WeightSymbol] | None = None
    ) -> WeightSymbol:
        """Inverse of `op`; `others` holds the parts of a packed weight."""
        kind: TensorType = op.attr("type")
        raw = op.attr("data")
        data = None if raw is None else decode(np.frombuffer(raw, np.uint8), kind.ints, kind.dtype)
        where = (op.attr("file"), op.attr("offset"), op.attr("bytes"))
        packing = _packing(op, others or {}) if op.attr("values") is not None else None
        derivation = _derivation(op, others or {}) if op.attr("source") is not None else None
        name, derived = op.attr("sym_name"), op.attr("derived")
        return WeightSymbol(name, kind.ints, kind.dtype, *where, data, folder, derived, packing, derivation)


def _scheme_attributes(scheme: Scheme) -> dict[str, Any]:
    return {n: getattr(scheme, n) for n in ("bits", "block", "axis", "layout", "kind")}


def _scheme(op: WeightOp) -> Scheme:
    return Scheme(*(op.attr(n) for n in ("bits", "block", "axis", "layout", "kind")))


def _derivation(op: WeightOp, others: Mapping[str, WeightSymbol]) -> Derivation:
    name, source, part, kind = (op.attr(n) for n in ("sym_name", "source", "part", "type"))
    if source not in others or len(others[source].needed) > MOST_SOURCES:
        raise ModelError(
            f"weight {name!r}: its source {source!r} is not declared before it, or made of too many"
        )
    made = Derivation(others[source], None if part is None else _scheme(op), part or "", op.attr("turned"))
    shape = others[source].shape
    if len(shape) < 2 and (made.transposed or made.scheme is not None):
        raise ModelError(f"weight {name!r}: its source {source!r} is no matrix")
    turned = (*shape[:-2], shape[-1], shape[-2]) if made.transposed else shape
    parts = {"": (turned, kind.dtype)} if made.scheme is None else made.scheme.parts(turned)
    if parts.get(made.part) != (kind.ints, kind.dtype):
        raise ModelError(f"weight {name!r}: {kind} is not what {source!r} gives")
    return made


MOST_SOURCES = 16
"""Weights that a weight may be made from, one from the other, where a text says so."""


def _packing(op: WeightOp, others: Mapping[str, WeightSymbol]) -> Packing:
    scheme = _scheme(op)
    names = {n: op.attr(n) for n in ("values", "scales", "zeros", "order")}
    missing = [n for n in names.values() if n is not None and n not in others]
    if missing or names["scales"] is None:
        raise ModelError(
            f"weight {op.attr('sym_name')!r}: its parts {missing or ['scales']} are not declared"
        )
    found = {n: others[name] for n, name in names.items() if name is not None}
    return Packing(scheme, **found)


def decode(raw: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: str) -> Array:
    """Bytes as an array. Raises ModelError where their number does not fit."""
    elements = TensorType.of(shape, dtype).elements.value
    if dtype in ("i4", "u4"):
        pairs = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)[:elements]
        signed = (
            np.where(pairs > 7, pairs.astype(np.int8) - 16, pairs.astype(np.int8)) if dtype == "i4" else pairs
        )
        return signed.astype(numpy_dtype(dtype)).reshape(shape)
    kind = numpy_dtype(dtype)
    if raw.nbytes != elements * kind.itemsize:
        raise ModelError(f"{raw.nbytes} bytes for a {dtype} tensor of shape {list(shape)}")
    return raw.view(kind).reshape(shape)


def encode(array: Array) -> bytes:
    """Inverse of `decode` for formats of whole bytes."""
    return np.ascontiguousarray(array).tobytes()
