"""Weights by name, mapped from the model's files when they are first asked for."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import MapperError, ModelError, WeightsMissingError
from mapper.schedule.dtypes import HALVES, dtype
from mapper.schedule.tables import Schedule

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mapped_file(path: Path) -> Bytes:
    """A file's bytes, mapped read-only; on huge pages where the file system has them. MapperError where it
    cannot be mapped."""
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise MapperError(f"cannot map {path}: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            whole.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(whole, np.uint8)


class WeightFiles:
    """Reads the weights of a schedule from its model's folder. Callable: name -> array (read-only, mapped).

    A file is checked once: its real path must lie in the folder or in `external_root`, and it must have its
    digest where the schedule knows that.
    """

    def __init__(
        self, schedule: Schedule, folder: str | Path, external_root: str | Path | None = None
    ) -> None:
        self._weights = schedule.weights
        self._digests = schedule.model.files
        self._folder = Path(os.path.realpath(folder))
        self._roots = [Path(os.path.realpath(r)) for r in (folder, external_root) if r is not None]
        self._known: dict[str, Path] = {}
        self._maps: dict[str, Bytes] = {}

    def __call__(self, name: str) -> Array:
        """The weight called `name`. Raises WeightsMissingError where its file is missing or too short,
        ModelError where the file is another one than the schedule was made for."""
        entry = self._weights[name]
        kind, raw, shape = dtype(entry["dtype"]), self.raw(name), tuple(entry["shape"])
        if kind.name in HALVES:
            halves = np.stack([raw << np.uint8(4), raw], axis=-1).reshape(-1)[: math.prod(shape)]
            signed = halves.view(np.int8) if kind.name == "int4" else halves
            return (signed >> 4).astype(kind).reshape(shape)
        array: Array = raw.view(kind).reshape(shape)
        return np.require(array, requirements="A")

    def raw(self, name: str) -> Bytes:
        """The bytes of a weight in its file, mapped; raises as a call does."""
        entry = self._weights[name]
        whole, begin, size = self._mapped(entry["file"]), entry["offset"], entry["bytes"]
        if begin + size > len(whole):
            path = self._file(entry["file"])
            raise WeightsMissingError(f"weight {name}: {path} ends before byte {begin + size}")
        return whole[begin : begin + size]

    def identity(self, name: str) -> list[Any]:
        """What tells a weight from any other that has been on this computer: where its bytes are, and the
        file's real path, size, and time of change in ns."""
        entry = self._weights[name]
        path = self._file(entry["file"])
        facts = path.stat()
        place = [entry[key] for key in ("offset", "bytes", "dtype", "shape")]
        return [str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino, *place]

    def _mapped(self, file: str) -> Bytes:
        if file not in self._maps:
            path = self._file(file)
            empty = path.stat().st_size == 0
            self._maps[file] = np.zeros(0, np.uint8) if empty else mapped_file(path)
        return self._maps[file]

    def _file(self, name: str) -> Path:
        if name not in self._known:
            path = Path(os.path.realpath(self._folder / name))
            if not any(path.is_relative_to(root) for root in self._roots):
                raise ModelError(f"weight file {name} is outside the model's folder {self._folder}")
            if not path.is_file():
                raise WeightsMissingError(f"weight file {name} is not in {self._folder}")
            digest = self._digests.get(name)
            if digest and file_sha256(path) != digest:
                raise ModelError(f"{path} is not the weight file that the schedule was made for")
            self._known[name] = path
        return self._known[name]
