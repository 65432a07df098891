"""A bounded reader of the protobuf wire format.

Source: the public protobuf encoding guide. Nothing here copies field contents: a length-delimited field is
reported as a span of the file, so a scan over a file of many gigabytes of raw weights touches only its tags.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError

VARINT, FIXED64, SPAN, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 1_000_000  # bounds time and memory on files made of millions of empty messages
MAX_TEXT = 1 << 16
MAX_TYPED = 64 << 20  # bytes in memory of all tensors that are not stored raw
MAX_DECODED = 64 << 20  # bytes of all names and attributes together

Field = tuple[int, int, int, int]  # field number, wire type, value or first byte, one past the last byte


@dataclass
class Source:
    """The bytes of one file, and how many fields and decoded bytes may still be read from it."""

    data: mmap.mmap | bytes
    fields_left: int = field(default=MAX_FIELDS)
    bytes_left: int = field(default=MAX_DECODED)
    typed_left: int = field(default=MAX_TYPED)

    def spend(self, fields: int, size: int = 0) -> None:
        """Counts fields (or elements, which cost as much) and decoded bytes. Raises ModelError where there
        are too many."""
        self.fields_left -= fields
        self.bytes_left -= size
        if self.fields_left < 0:
            raise ModelError(f"the file holds more than {MAX_FIELDS} protobuf fields")
        if self.bytes_left < 0:
            raise ModelError(f"the file holds more than {MAX_DECODED} bytes of names and attributes")


def varint(data: mmap.mmap | bytes, at: int, end: int) -> tuple[int, int]:
    """The unsigned 64-bit varint at `at` and the position after it. Raises ModelError past `end`."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise ModelError(f"malformed protobuf: varint longer than 10 bytes at byte {at}")
    raise ModelError(f"truncated protobuf: a varint runs past byte {end}")


def fields(source: Source, start: int, end: int) -> Iterator[Field]:
    """Every field of the message in bytes `start`..`end`, in order. Raises ModelError on malformed bytes."""
    data, at = source.data, start
    while at < end:
        source.fields_left -= 1
        if source.fields_left < 0:
            raise ModelError(f"the file holds more than {MAX_FIELDS} protobuf fields")
        tag = data[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ModelError(f"malformed protobuf: field number 0 at byte {at}")
        if kind == SPAN:
            length, at = varint(data, at, end)
            if length > end - at:
                raise ModelError(
                    f"truncated protobuf: {length} bytes announced at byte {at}, {end - at} there"
                )
            yield number, kind, at, at + length
            at += length
        elif kind == VARINT:
            value, at = varint(data, at, end)
            yield number, kind, value, at
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
            if size > end - at:
                raise ModelError(f"truncated protobuf: fixed-size field at byte {at}")
            yield number, kind, at, at + size
            at += size
        else:
            raise ModelError(f"malformed protobuf: wire type {kind} at byte {at}")


def signed(value: int) -> int:
    """A varint read as two's complement int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def text(source: Source, start: int, end: int) -> str:
    """A UTF-8 string field. Raises ModelError where it is not UTF-8 or longer than 64 KiB."""
    try:
        return chunk(source, start, end, MAX_TEXT).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"a name at byte {start} is not UTF-8") from error


def chunk(source: Source, start: int, end: int, largest: int) -> bytes:
    """The bytes of a name or an attribute. Raises ModelError where there are more than `largest`."""
    if not 0 <= end - start <= largest:
        raise ModelError(f"a name or attribute of {end - start} bytes at byte {start}")
    source.spend(0, end - start)
    return bytes(source.data[start:end])


def packed_varints(raw: bytes) -> npt.NDArray[np.uint64]:
    """All varints of a packed field. Raises ModelError where the last one is cut off or one is too long."""
    data = np.frombuffer(raw, np.uint8)
    last = np.flatnonzero(data < 0x80)
    if data.size and (not last.size or last[-1] != data.size - 1):
        raise ModelError("truncated protobuf: packed integers end inside a number")
    first = np.concatenate([[0], last[:-1] + 1]) if last.size else last
    lengths = last - first + 1
    if lengths.size and int(lengths.max()) > 10:
        raise ModelError("malformed protobuf: packed integer longer than 10 bytes")
    values = np.zeros(last.size, np.uint64)
    for k in range(int(lengths.max()) if lengths.size else 0):
        live = lengths > k
        values[live] |= (data[first[live] + k].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * k)
    return values


def count_packed_varints(raw: bytes | memoryview) -> int:
    """How many varints a packed field holds."""
    return int(np.count_nonzero(np.frombuffer(raw, np.uint8) < 0x80))
