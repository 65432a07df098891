"""Commands that cannot write all they should: one line, exit code 2, and nothing half-written is left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command import inside


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file that this process writes may become larger than `size` bytes: writing more fails as on a full
    disk (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def compiled(model: Path, out: Path) -> list[str]:
    """A command that writes a schedule."""
    sizes = ["--context", "16", "--prompt", "4"]
    return ["compile", str(model), "--target", "host", *sizes, "--out", str(out)]


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_no_part_of_a_schedule_is_left(size: int, example_model: Path, tmp_path: Path) -> None:
    with largest_file(size):
        done = inside(*compiled(example_model, tmp_path / "new" / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_older_schedule_stays(example_model: Path, tmp_path: Path) -> None:
    command = compiled(example_model, tmp_path / "out")
    assert inside(*command).returncode == 0
    before = everything(tmp_path)
    with largest_file(1000):
        assert inside(*command).returncode == 2
    assert everything(tmp_path) == before


def test_text_is_written_whole_or_not_at_all(example_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "ir.mlir"
    command = ["opt", str(example_model), "-o", str(out)]
    with largest_file(1000):
        done = inside(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr
    assert not list(tmp_path.iterdir())
    out.write_text("older")
    with largest_file(1000):
        assert inside(*command).returncode == 2
    assert everything(tmp_path) == {"ir.mlir": b"older"}
    assert inside(*command).returncode == 0 and inside("opt", str(out)).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["ir.mlir"]


def test_a_place_that_cannot_be_written(example_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", tmp_path / "absent" / "x", tmp_path, Path("/dev/full")):
        done = inside("opt", str(example_model), "-o", str(place))
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_output_to_a_full_device_is_an_error(example_model: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mapper", "inspect", str(example_model)], stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
