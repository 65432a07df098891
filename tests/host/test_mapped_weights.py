"""Weights backed by files: the same results, no copy, one conversion, and nothing that can go wrong later."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mapper.errors import ExecutionFault, MapperError
from mapper.frontend.load import load
from mapper.runtime import image
from mapper.runtime.execute import Session
from mapper.runtime.image import Images
from mapper.schedule.edit import Place, step_at, with_step
from mapper.schedule.tables import Request, Schedule
from mapper_host import BACKEND
from tests.host.graphs import lowered

NONE = Images(None, 1 << 60)
"""Nothing is mapped: the way it is for small models."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example model."""
    made = tmp_path_factory.mktemp("model")
    for file in (Path(__file__).resolve().parents[2] / "examples").glob("tiny-llama*"):
        shutil.copy(file, made)
    return made


@pytest.fixture(scope="module")
def schedule(folder: Path) -> Schedule:
    return lowered(load(folder / "tiny-llama-op18.onnx"), Request(prompt=5, context=12))


def session(schedule: Schedule, folder: Path, images: Images) -> Session:
    return Session(schedule, BACKEND.semantics(), folder, images=images)


def outputs(session: Session) -> list[Any]:
    ids = np.random.default_rng(0).integers(0, 2000, (1, 6))
    first = session.run("prefill", {"input_ids": ids[:, :5], "past_length": np.array(0)})["logits"]
    then = session.run("decode", {"input_ids": ids[:, 5:], "past_length": np.array(5)})["logits"]
    return [first, then, *(session.state(p.name) for p in session.ports("state"))]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def buffers(made: Session) -> dict[str, Any]:
    ports = [p for p in made.schedule.ports if p.kind in ("weight", "constant")]
    return {p.name: made._memories.bytes_of(p.buffers[0]) for p in ports}


def test_mapped_weights_are_the_weights(schedule: Schedule, folder: Path, tmp_path: Path) -> None:
    copied = session(schedule, folder, NONE)
    wanted, bytes_ = outputs(copied), buffers(copied)
    for images in (Images(tmp_path / "i", 1, 0.0), Images(tmp_path / "i", 1, 0.0), Images(None, 1)):
        mapped = session(schedule, folder, images)
        found = buffers(mapped)
        assert all(np.array_equal(found[name], raw) for name, raw in bytes_.items())
        assert not any(raw.flags.writeable for raw in found.values())
        assert all(np.array_equal(a, b) for a, b in zip(outputs(mapped), wanted, strict=True))
    (file,) = (tmp_path / "i").iterdir()
    assert 0 < file.stat().st_size < sum(len(b) for b in bytes_.values())


def test_a_weight_stored_as_wanted_is_not_copied(schedule: Schedule, folder: Path, tmp_path: Path) -> None:
    """The bytes lie in the file's own mapping, and no image has them."""
    mapped = session(schedule, folder, Images(tmp_path / "i", 1, 0.0))
    places = {b.ctypes.data: name for name, b in buffers(mapped).items()}
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(x, 16) for x in line[0].split("-")] for line in lines if line[-1].startswith(str(folder))]
    inside = {name for at, name in places.items() if any(low <= at < high for low, high in ranges)}
    direct = {p.name for p in schedule.ports if p.source is not None and p.source[0] == "weight"}
    assert direct
    assert inside == direct
    (file,) = (tmp_path / "i").iterdir()
    sizes = {name: len(b) for name, b in buffers(mapped).items() if name not in direct}
    assert file.stat().st_size <= sum(-(-s // 64) * 64 for s in sizes.values())


def test_weights_are_converted_once(
    schedule: Schedule, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = image._write

    def counted(path: Path, *rest: Any) -> None:
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(image, "_write", counted)
    images = Images(tmp_path / "i", 1, 0.0)
    for _ in range(2):
        session(schedule, folder, images)
    assert len(written) == 1
    weights = folder / "tiny-llama.weights.bin"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000))
    session(schedule, folder, images)
    assert len(set(written)) == 2, "a file that was changed is another one"
    written[-1].write_bytes(b"short")
    again = session(schedule, folder, images)
    assert len(written) == 3, "an image of another length is made again"
    assert np.array_equal(outputs(again)[0], outputs(session(schedule, folder, NONE))[0])


def test_a_full_disk_is_an_error_and_leaves_nothing(schedule: Schedule, folder: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(MapperError, match=r"cannot write.*MAPPER_WEIGHT_IMAGES"):
        session(schedule, folder, Images(tmp_path / "i", 1, 0.0))
    assert not list((tmp_path / "i").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(MapperError, match=r"cannot make.*MAPPER_WEIGHT_IMAGES"):
        session(schedule, folder, Images(tmp_path / "file" / "i", 1, 0.0))


def test_a_step_that_writes_a_weight_never_meets_mapped_bytes(
    schedule: Schedule, folder: Path, tmp_path: Path
) -> None:
    port = next(p for p in schedule.ports if p.kind == "weight")
    size = schedule.buffers.column("bytes")[port.buffers[0]].as_py()
    place, row = next(
        (place, row)
        for n in range(len(schedule.programs["decode"].blocks))
        for i in range(len(schedule.programs["decode"].blocks[n].steps))
        for place in [Place("decode", n, i)]
        for row in [step_at(schedule, place)]
        if row["writes"][0]["bytes"] <= size
    )
    writes = [{**row["writes"][0], "buffer": port.buffers[0], "offset": 0}, *row["writes"][1:]]
    broken = with_step(schedule, place, {**row, "writes": writes})
    given = {"input_ids": np.array([[1]]), "past_length": np.array(0)}
    late = session(schedule, folder, Images(tmp_path / "i", 1, 0.0))
    late.schedule = broken
    with pytest.raises(ExecutionFault, match="holds weights of a file"):
        late.run("decode", given)
    assert all(
        b.flags.writeable for b in buffers(session(broken, folder, Images(tmp_path / "i", 1, 0.0))).values()
    )


def test_where_images_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAPPER_WEIGHT_IMAGES", "off")
    assert Images.default().folder is None
    monkeypatch.setenv("MAPPER_WEIGHT_IMAGES", str(tmp_path))
    assert Images.default().folder == tmp_path
    monkeypatch.delenv("MAPPER_WEIGHT_IMAGES")
    monkeypatch.setenv("MAPPER_CACHE", str(tmp_path / "c"))
    assert Images.default().folder == tmp_path / "c" / "weights"


def test_weights_that_share_bytes_are_not_mapped(schedule: Schedule, folder: Path, tmp_path: Path) -> None:
    """Of two at one place the last is what both read, as the schedule says."""
    one, other = [p.buffers[0] for p in schedule.ports if p.kind == "weight"][:2]
    rows = schedule.buffers.to_pylist()
    rows[other]["offset"] = rows[one]["offset"]
    odd = replace(schedule, buffers=pa.Table.from_pylist(rows, schema=schedule.buffers.schema))
    made = session(odd, folder, Images(tmp_path / "i", 1, 0.0))
    assert all(b.flags.writeable for b in buffers(made).values())
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_bytes_of_views_are_those_of_their_copies(dtype: str) -> None:
    a = np.random.default_rng(0).integers(0, 250, (5, 130, 67)).astype(dtype)
    views = (
        a,
        a[0].T,
        a.transpose(0, 2, 1),
        a.transpose(2, 1, 0),
        a[:, ::2, 1:],
        a[0, :, :1].T,
        a[:0],
        a[0, 0],
    )
    for view in views:
        assert image._bytes(view).tobytes() == view.tobytes()
