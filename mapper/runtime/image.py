"""Weights backed by files: mapped where they lie if they are stored as a schedule wants them, else from an
image that is converted once and kept.

Mapped bytes are read from disk when a step first needs them, and the system may drop them again, so that a
model larger than free memory starts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mapper import lowbit
from mapper.errors import MapperError
from mapper.files import cache_folder, writing
from mapper.runtime.free_memory import available_memory
from mapper.runtime.memories import empty
from mapper.runtime.weights import Bytes, WeightFiles, mapped_file
from mapper.schedule import dtypes, values
from mapper.schedule.tables import Int, Port, Schedule
from mapper.schedule.values import leaves

ALIGN = 64
"""Alignment of a weight in an image, in bytes: a cache line, and the widest vector."""
_CHUNK = 16 << 20
"""Bytes written at a time, from multiples of it: file systems keep such runs on huge pages."""
_STRIP = 64
"""Elements."""
Convert = Callable[[Port], npt.NDArray[Any]]


@dataclass(frozen=True)
class Images:
    """Where images are kept, None: nowhere, weights are converted in memory at each start. Memories and
    images of less than `least` bytes are not worth a file. Weights in the model's own files are copied if
    they are no more than `share` of the free memory."""

    folder: Path | None
    least: int = 64 << 20
    share: float = 0.5

    @staticmethod
    def default() -> Images:
        """$MAPPER_WEIGHT_IMAGES: a folder, or "off"; else `weights` in the cache folder. $MAPPER_WEIGHTS:
        "mapped" leaves all weights in files."""
        own = os.environ.get("MAPPER_WEIGHT_IMAGES")
        share = 0.0 if os.environ.get("MAPPER_WEIGHTS") == "mapped" else Images.share
        if own == "off":
            return Images(None, share=share)
        return Images(Path(own) if own else cache_folder() / "weights", share=share)


def mapped_weights(
    schedule: Schedule,
    plain: Callable[[Schedule, Port], bool],
    files: WeightFiles,
    convert: Convert,
    images: Images,
) -> dict[int, Bytes]:
    """The read-only bytes, by buffer number, of all memories of a schedule that can be backed by files.

    Those hold `images.least` bytes or more, all of them weights and constants in `plain` ports, which no step
    writes. `convert` makes a port's array. Raises MapperError where an image cannot be written, and what
    `files` and `convert` raise.
    """
    found: dict[int, Bytes] = {}
    converted: list[Port] = []
    held: list[Port] = []
    for ports in _memories(schedule, plain, images.least):
        for port in ports:
            raw = _as_stored(schedule, port, files)
            if raw is not None:
                found[port.buffers[0]] = raw
            elif any(kind == "weight" for kind, _ in leaves(port.source)):
                converted.append(port)
            else:  # tables that depend on the context's length would make another image for each
                held.append(port)
    places, size = _layout(schedule, converted)
    if size < images.least or images.folder is None:
        held, converted = [*converted, *held], []
    if converted and images.folder is not None:
        whole = _image(images.folder, schedule, converted, places, size, files, convert)
        found |= {b: whole[low:high] for b, (low, high) in places.items()}
    return _settled(found, images.share) | _held(schedule, held, convert)


def _settled(mapped: dict[int, Bytes], share: float) -> dict[int, Bytes]:
    """Mapped bytes copied to huge pages of the process's own, if that is no more than a share of the free
    memory. Whether the system keeps a file on huge pages depends on who wrote or read it last, and small ones
    cost a seventh of the read rate (6.6 against 7.6 tokens/s of the 1.1b model in f32)."""
    if sum(map(len, mapped.values())) > share * available_memory():
        return mapped
    places: dict[tuple[int, int], int] = {}  # a weight that two buffers share is copied once
    end = 0
    for raw in mapped.values():
        if (raw.ctypes.data, len(raw)) not in places:
            places[raw.ctypes.data, len(raw)] = end
            end = -(-(end + len(raw)) // ALIGN) * ALIGN
    whole = empty(end)
    copied = {}
    for raw in mapped.values():
        low = places[raw.ctypes.data, len(raw)]
        if low not in copied:
            copied[low] = whole[low : low + len(raw)]
            copied[low][:] = raw
            copied[low].flags.writeable = False
    return {b: copied[places[raw.ctypes.data, len(raw)]] for b, raw in mapped.items()}


def _memories(
    schedule: Schedule, plain: Callable[[Schedule, Port], bool], least: int
) -> Iterator[Sequence[Port]]:
    """The ports of each memory that can be backed by files."""
    memory, low, size = (
        np.asarray(schedule.buffers.column(c).to_numpy(), np.int64) for c in ("memory", "offset", "bytes")
    )
    owners: dict[int, list[Port]] = {}
    for port in schedule.ports:
        for b in port.buffers:
            owners.setdefault(b, []).append(port)
    changed = _written(schedule)
    for number in range(len(schedule.memories)):
        mine = np.flatnonzero(memory == number)
        if size[mine].sum() < least or not _apart(low[mine], size[mine]) or changed & set(mine.tolist()):
            continue
        ports = [p for b in mine.tolist() for p in owners.get(b, ())]
        lasting = all(p.kind in ("weight", "constant") and p.source is not None for p in ports)
        if lasting and len(ports) == len(mine) and all(plain(schedule, p) for p in ports):
            yield ports


def _apart(low: Int, size: Int) -> bool:
    order = np.argsort(low, kind="stable")
    return bool((low[order][1:] >= (low + size)[order][:-1]).all())


def _written(schedule: Schedule) -> set[int]:
    """Buffers that some step writes."""
    found: set[int] = set()
    for program in schedule.programs.values():
        for block in program.blocks:
            written = {int(b) for b in block.steps.slices("writes")[1]}
            found |= written
            if block.bindings is not None:
                columns = (block.bindings.column(k).to_pylist() for k in range(3))
                found |= {int(b or 0) for slot, _, b in zip(*columns, strict=True) if slot in written}
    return found


def _as_stored(schedule: Schedule, port: Port, files: WeightFiles) -> Bytes | None:
    """The port's bytes in the model's file, where they are the weight as stored and aligned to elements."""
    if port.source[0] != "weight":
        return None
    entry, wanted = schedule.weights[port.source[1]], dtypes.dtype(port.dtype)
    if dtypes.dtype(entry["dtype"]) != wanted or tuple(entry["shape"]) != tuple(port.shape):
        return None
    raw = files.raw(port.source[1])
    whole = len(raw) == math.prod(port.shape) * wanted.itemsize
    return raw if whole and raw.ctypes.data % wanted.itemsize == 0 else None


def _layout(schedule: Schedule, ports: Sequence[Port]) -> tuple[dict[int, tuple[int, int]], int]:
    """First byte and end of each port's buffer in an image, and the image's size."""
    places, end = {}, 0
    for port in ports:
        size = int(schedule.buffers.column("bytes")[port.buffers[0]].as_py())
        places[port.buffers[0]] = (end, end + size)
        end = -(-(end + size) // ALIGN) * ALIGN
    return places, end


def _held(schedule: Schedule, ports: Sequence[Port], convert: Convert) -> dict[int, Bytes]:
    places, size = _layout(schedule, ports)
    whole = empty(size)
    for port in ports:
        low, high = places[port.buffers[0]]
        whole[low:high] = _bytes(convert(port))
    whole.flags.writeable = False
    return {b: whole[low:high] for b, (low, high) in places.items()}


def _bytes(array: npt.NDArray[Any]) -> Bytes:
    """The array's bytes in C order. A transposed one is copied in strips of a few cache lines, several times
    as fast as NumPy does it row by row."""
    if array.ndim > 1 and not array.flags.c_contiguous and array.strides[-2] < array.strides[-1]:
        turned = np.empty(array.shape, array.dtype)
        for i in range(0, array.shape[-1], _STRIP):
            turned[..., i : i + _STRIP] = array[..., i : i + _STRIP]
        array = turned
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _image(
    folder: Path,
    schedule: Schedule,
    ports: Sequence[Port],
    places: Mapping[int, tuple[int, int]],
    size: int,
    files: WeightFiles,
    convert: Convert,
) -> Bytes:
    path = folder / f"{_key(schedule, ports, files)}.weights"
    if not path.is_file() or path.stat().st_size != size:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise MapperError(f"cannot make {folder}: {error.strerror}{_HINT}") from error
        try:
            _write(path, ports, places, size, convert)
        except MapperError as error:
            hint = _HINT if isinstance(error.__cause__, OSError) else ""
            raise type(error)(f"{error}{hint}") from error
    return mapped_file(path)


_HINT = "; MAPPER_WEIGHT_IMAGES=FOLDER keeps converted weights elsewhere, MAPPER_WEIGHT_IMAGES=off in memory"


def _key(schedule: Schedule, ports: Sequence[Port], files: WeightFiles) -> str:
    names = sorted({leaf for port in ports for leaf in leaves(port.source)})
    read = [
        [n, files.identity(n) if kind == "weight" else _digest(schedule.constants[n])] for kind, n in names
    ]
    made = [[port.source, port.dtype, list(port.shape)] for port in ports]
    text = json.dumps([_version(), schedule.model.sha256, read, made])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(array: npt.NDArray[Any]) -> str:
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


@cache
def _version() -> str:
    """A digest of the code that converts."""
    found = hashlib.sha256(f"{np.__version__} {ml_dtypes.__version__}".encode())
    for file in (__file__, values.__file__, lowbit.__file__):
        found.update(Path(str(file)).read_bytes())
    return found.hexdigest()


def _write(
    path: Path, ports: Sequence[Port], places: Mapping[int, tuple[int, int]], size: int, convert: Convert
) -> None:
    """The image, weight by weight: at most one converted weight is held."""
    with writing(path) as stream, _chunks(stream) as write:
        done = 0
        for port in ports:
            low, high = places[port.buffers[0]]
            write(np.zeros(low - done, np.uint8))
            write(_bytes(convert(port)))
            done = high
        write(np.zeros(size - done, np.uint8))


@contextmanager
def _chunks(stream: IO[bytes]) -> Iterator[Callable[[Bytes], None]]:
    """Gathers what is written into whole chunks."""
    chunk, filled = np.empty(_CHUNK, np.uint8), 0

    def write(raw: Bytes) -> None:
        nonlocal filled
        at = 0
        while at < len(raw):
            count = min(len(raw) - at, _CHUNK - filled)
            chunk[filled : filled + count] = raw[at : at + count]
            at, filled = at + count, filled + count
            if filled == _CHUNK:
                stream.write(chunk.data)
                filled = 0

    yield write
    stream.write(chunk[:filled].data)
