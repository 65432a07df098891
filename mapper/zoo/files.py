"""Skeletons on disk: cached ones for `zoo:NAME`, and files with or without random weights on request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mapper import files
from mapper.errors import UsageError
from mapper.files import writing

if TYPE_CHECKING:
    from mapper.zoo.config import Config
    from mapper.zoo.writer import Weight, Writer

PREFIX = "zoo:"
DTYPES = ("bf16", "f16", "f32")
CHUNK = 1 << 22
"""Elements that are drawn and written at once."""
Progress = Callable[[int], None]


def is_name(path: str | Path) -> bool:
    """Whether a model path names a model of the zoo."""
    return str(path).startswith(PREFIX)


def skeleton(path: str | Path) -> Path:
    """The file of the model that `zoo:NAME` names, made once per version of the zoo; bf16, weights absent.

    Raises UsageError for an unknown name, MapperError where the cache folder cannot be written.
    """
    from mapper.zoo.families import config

    name = str(path).removeprefix(PREFIX)
    config(name)
    folder = cache_folder() / _version()
    file = folder / f"{name}.onnx"
    if not file.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {folder}: {error.strerror}") from error
        write(config(name), file, "bf16", None, force=True)
    return file


def cache_folder() -> Path:
    """Where skeletons are kept."""
    return files.cache_folder() / "zoo"


@cache
def _version() -> str:
    """A digest of what skeletons are made from."""
    folder, found = Path(__file__).parent, hashlib.sha256()
    for file in sorted([*folder.glob("*.py"), folder / "configs.json"]):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def write(
    made: Config,
    file: Path,
    dtype: str,
    seed: int | None,
    force: bool = False,
    progress: Progress | None = None,
) -> Writer:
    """Writes a model; with `seed`, random weights beside it in FILE.data. Files appear whole or not at all.

    Raises UsageError where a file exists already, MapperError where one cannot be written.
    """
    from mapper.zoo.build import decoder

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    data = file.with_name(file.name + ".data")
    for path in (file, data) if seed is not None else (file,):
        if path.exists() and not force:
            raise UsageError(f"{path} exists; --force replaces it")
    if seed is not None and seed < 0:
        raise UsageError(f"the seed must not be negative, and is {seed}")
    writer = decoder(made, dtype, data.name)
    if seed is not None:
        with writing(data) as stream:
            _fill(writer, stream, seed, progress)
    with writing(file) as stream:
        stream.write(writer.model().SerializeToString(deterministic=True))
    return writer


def _fill(writer: Writer, stream: IO[bytes], seed: int, progress: Progress | None) -> None:
    """Draws and writes all weights in order, each from a stream of its own."""
    import numpy as np

    for number, weight in enumerate(writer.weights.values()):
        stream.seek(weight.offset)
        rng = np.random.default_rng([seed, number])
        for first in range(0, weight.elements, CHUNK):
            count = min(CHUNK, weight.elements - first)
            stream.write(_drawn(rng, weight, count, writer.dtype))
            if progress is not None:
                progress(count)
    stream.truncate(max(writer.end, 1))


def _drawn(rng: object, weight: Weight, count: int, dtype: str) -> bytes:
    import ml_dtypes
    import numpy as np

    assert isinstance(rng, np.random.Generator)
    values = rng.standard_normal(count, np.float32)
    values = values * np.float32(weight.gain / np.sqrt(weight.fan_in)) + np.float32(weight.mean)
    kinds = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
    return values.astype(kinds[dtype]).tobytes()


def params(made: Config) -> int:
    """Number of parameters: elements of all weights that the graph declares."""
    from mapper.zoo.build import decoder

    return sum(w.elements for w in decoder(made, "bf16", "none").weights.values())
