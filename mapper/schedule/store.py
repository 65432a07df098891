"""A schedule on disk: one folder, written whole or not at all, byte-identical for equal schedules.

schedule.json            everything but the tables (see meta.py)
buffers.parquet ops.parquet
steps.<phase>.<block>.parquet   bindings.<phase>.<block>.parquet
constants.bin            arrays, each aligned to 64 bytes
<artifacts>              files generated from the schedule
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mapper.errors import MapperError, ScheduleError, UsageError
from mapper.schedule import meta as documents
from mapper.schedule.dtypes import dtype
from mapper.schedule.tables import (
    BINDING_SCHEMA,
    BUFFER_SCHEMA,
    OP_SCHEMA,
    STEP_SCHEMA,
    Block,
    Program,
    Schedule,
    StepTable,
)
from mapper.schedule.validate import array_bytes, inside, validate

ALIGN = 64
MAX_JSON = 256 << 20
MAX_BYTES = 1 << 34
"""Most bytes of one table that is read from disk, expanded."""
BATCH = 1 << 16


class Artifact(Protocol):
    """A file to store beside the schedule: a relative name and its bytes."""

    @property
    def name(self) -> str:
        """Relative path, with forward slashes."""

    @property
    def data(self) -> bytes:
        """The file's bytes."""


def save(schedule: Schedule, folder: str | Path, artifacts: Sequence[Artifact] = ()) -> None:
    """Write the schedule into `folder`, replacing an older schedule there.

    Raises UsageError where `folder` is something else than a schedule, ScheduleError where the schedule is
    not well formed, MapperError where the disk is full or not writable. In each case nothing is left behind.
    """
    validate(schedule)
    final = Path(os.path.realpath(folder))
    _replaceable(final)
    made = _make_parents(final.parent)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        _write(schedule, temporary, artifacts)
        _swap(temporary, final)
    except OSError as error:
        raise MapperError(f"cannot write schedule {folder}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not final.exists():
            for parent in made:
                parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_parents(parent: Path) -> list[Path]:
    """Create `parent`; the folders that were made, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for path in reversed(missing):
        try:
            path.mkdir()
        except OSError as error:
            raise UsageError(f"cannot create folder {path}: {error.strerror}") from error
    return missing


def _replaceable(folder: Path) -> None:
    """Raises UsageError unless `folder` is absent, empty, or holds a schedule and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder for a schedule")
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise UsageError(f"{folder} is the working directory or above it; give a folder inside it")
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    if not there:
        return
    if "schedule.json" not in there:
        raise UsageError(f"{folder} exists and is not a schedule; it is left as it is")
    try:
        known = {"schedule.json", *_read_meta(folder).files}
    except ScheduleError as error:
        raise UsageError(
            f"{folder} exists and holds no readable schedule ({error}); it is left as it is"
        ) from error
    if there - known:
        raise UsageError(
            f"{folder} holds {min(there - known)}, which is no part of a schedule; it is left as it is"
        )


def _swap(new: Path, final: Path) -> None:
    """Rename `new` to `final`; an older folder there is moved away first and put back if that fails."""
    if not final.exists():
        os.rename(new, final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        os.rename(final, old / "old")
        try:
            os.rename(new, final)
        except OSError:
            os.rename(old / "old", final)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write(schedule: Schedule, folder: Path, artifacts: Sequence[Artifact]) -> None:
    tables = {"buffers.parquet": schedule.buffers, "ops.parquet": schedule.ops}
    for phase, program in schedule.programs.items():
        for number, block in enumerate(program.blocks):
            tables[f"steps.{phase}.{number}.parquet"] = block.steps.table
            if block.bindings is not None:
                tables[f"bindings.{phase}.{number}.parquet"] = block.bindings
    files = {*tables, "constants.bin"}
    for artifact in artifacts:
        if not inside(artifact.name) or artifact.name in files or artifact.name == "schedule.json":
            raise ScheduleError(f"artifact {artifact.name!r} is no name of a file inside the schedule")
        files.add(artifact.name)
        path = folder / artifact.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(artifact.data)
    for name, table in tables.items():
        _write_table(table, folder / name)
    index = _write_constants(schedule, folder / "constants.bin")
    (folder / "schedule.json").write_text(documents.describe(schedule, index, files), encoding="ascii")


def _write_table(table: pa.Table, path: Path) -> None:
    # one chunk and no metadata, so that equal tables give equal bytes however they were built
    plain = table.combine_chunks().replace_schema_metadata(None)
    with path.open("wb") as file:
        pq.write_table(plain, file, compression="zstd", row_group_size=1 << 20, write_statistics=False)


def _write_constants(schedule: Schedule, path: Path) -> dict[str, Any]:
    index: dict[str, Any] = {}
    with path.open("wb") as file:
        for name in sorted(schedule.constants):
            array = np.ascontiguousarray(schedule.constants[name])
            file.write(b"\0" * (-file.tell() % ALIGN))
            index[name] = {
                "dtype": dtype(array.dtype.name).name,
                "shape": list(schedule.constants[name].shape),
                "offset": file.tell(),
                "bytes": array.nbytes,
            }
            file.write(array.reshape(-1).view(np.uint8).data)
    return index


def load(folder: str | Path) -> Schedule:
    """The schedule in `folder`, validated. Constants are mapped, not read. Raises ScheduleError."""
    root = Path(folder)
    if not root.is_dir():
        raise ScheduleError(f"{folder} is not a schedule folder")
    document = _read_meta(root)
    programs: dict[str, Program] = {p.phase: _load_program(root, p) for p in document.programs}
    if len(programs) < len(document.programs):
        raise ScheduleError("schedule.json: a phase has two programs")
    schedule = Schedule(
        target=document.target,
        machine=document.machine,
        machine_toml=document.machine_toml,
        chips=document.chips,
        request=documents.request(document.request),
        model=documents.model(document.model),
        clock_hz=document.clock_hz,
        units=tuple(document.units),
        memories=tuple(document.memories),
        opcodes=tuple(document.opcodes),
        programs=programs,
        buffers=_read_table(root, "buffers.parquet", BUFFER_SCHEMA),
        ops=_read_table(root, "ops.parquet", OP_SCHEMA),
        ports=tuple(documents.port(p) for p in document.ports),
        weights=document.weights,
        constants=_read_constants(root, document.constants),
        roles=document.roles,
        plan=document.plan,
        provenance=document.provenance,
    )
    validate(schedule)
    return schedule


def _regular(path: Path) -> int:
    """Size of the regular file at `path`; no link, device or pipe is opened. Raises ScheduleError."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ScheduleError(f"schedule file {path}: {error.strerror}") from error
    if not os.path.isfile(path) or path.is_symlink():
        raise ScheduleError(f"schedule file {path}: not a regular file")
    return status.st_size


def _read_meta(root: Path) -> documents.Meta:
    path = root / "schedule.json"
    if _regular(path) > MAX_JSON:
        raise ScheduleError(f"schedule file {path}: larger than {MAX_JSON} bytes")
    try:
        return documents.read(path.read_bytes())
    except OSError as error:
        raise ScheduleError(f"schedule file {path}: {error.strerror}") from error


def _load_program(root: Path, meta: documents.ProgramMeta) -> Program:
    blocks = []
    for number, b in enumerate(meta.blocks):
        steps = StepTable(_read_table(root, f"steps.{meta.phase}.{number}.parquet", STEP_SCHEMA))
        bindings = (
            _read_table(root, f"bindings.{meta.phase}.{number}.parquet", BINDING_SCHEMA)
            if b.bindings
            else None
        )
        blocks.append(Block(b.name, steps, b.start, b.repeat, b.period, bindings))
    return Program(meta.phase, tuple(blocks), meta.cycles, meta.sequence)


def _read_table(root: Path, name: str, schema: pa.Schema) -> pa.Table:
    path = root / name
    _regular(path)
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            if not file.schema_arrow.remove_metadata().equals(schema):
                raise ScheduleError(f"{name}: the table's columns are not those of this version")
            return _batches(file, name).cast(schema).replace_schema_metadata(None)
    except (pa.ArrowException, OSError, ValueError, MemoryError, UnicodeDecodeError) as error:
        raise ScheduleError(f"schedule file {path}: {error}") from error


def _batches(file: pq.ParquetFile, name: str) -> pa.Table:
    """The whole table, read in pieces: a few compressed bytes may claim any number of values.

    Row groups' own metadata is not asked: on a damaged footer that ends the process instead of raising.
    """
    size, pieces = 0, []
    for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
        size += batch.nbytes
        if size > MAX_BYTES:
            raise ScheduleError(f"{name}: holds more than {MAX_BYTES} bytes")
        pieces.append(batch)
    return pa.Table.from_batches(pieces, schema=file.schema_arrow).combine_chunks()


def _read_constants(root: Path, index: dict[str, documents.ConstantMeta]) -> dict[str, Any]:
    path = root / "constants.bin"
    size = _regular(path)
    out: dict[str, Any] = {}
    mapped = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    for name, entry in sorted(index.items()):
        shape = tuple(entry.shape)
        if (
            array_bytes(shape, entry.dtype) != entry.bytes
            or entry.offset < 0
            or entry.offset + entry.bytes > size
        ):
            raise ScheduleError(f"constant {name}: not inside constants.bin of {size} bytes")
        piece = mapped[entry.offset : entry.offset + entry.bytes]
        out[name] = (
            piece.view(dtype(entry.dtype)).reshape(shape)
            if entry.bytes
            else np.zeros(shape, dtype(entry.dtype))
        )
    end = max((e.offset + e.bytes for e in index.values()), default=0)
    if end != size:
        raise ScheduleError(f"constants.bin has {size} bytes, and its index accounts for {end}")
    return out
