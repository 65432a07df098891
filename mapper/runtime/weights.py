"""Weights by name, mapped from the model's files when they are first asked for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.errors import ModelError, WeightsMissingError
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import Schedule

Array = npt.NDArray[Any]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    def __call__(self, name: str) -> Array:
        """The weight called `name`. Raises WeightsMissingError where its file is missing or too short,
        ModelError where the file is another one than the schedule was made for."""
        entry = self._weights[name]
        path = self._file(entry["file"])
        begin, size, shape = entry["offset"], entry["bytes"], tuple(entry["shape"])
        if begin + size > path.stat().st_size:
            raise WeightsMissingError(f"weight {name}: {path} ends before byte {begin + size}")
        if size == 0:
            return np.zeros(shape, dtype(entry["dtype"]))
        raw = np.memmap(path, np.uint8, "r", begin, (size,))
        array: Array = np.asarray(raw).view(dtype(entry["dtype"])).reshape(shape)
        return np.require(array, requirements="A")

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
