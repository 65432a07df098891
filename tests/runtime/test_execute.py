"""Sessions on the hand-written schedule: ports, states, poisoned memories, weights from files."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mapper.errors import (
    ExecutionFault,
    MapperError,
    ModelError,
    ScheduleError,
    UsageError,
    WeightsMissingError,
)
from mapper.runtime.execute import Session
from mapper.runtime.memories import POISON, allocate, temporaries
from mapper.runtime.written import require_written
from mapper.schedule.edit import Place, step_at, with_step
from mapper.schedule.tables import ModelRef, Schedule
from tests.schedule import toy

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((3, toy.N)).astype(np.float32)
START = np.array([1, 2, 3, 4], np.float32)
X = RNG.standard_normal(toy.N).astype(np.float32)


def expected() -> np.ndarray[Any, np.dtype[np.float32]]:
    h = X.copy()
    for w in WEIGHTS:
        h = h + h * w
    return h


def model(folder: Path, made: Schedule | None = None) -> Schedule:
    """The weights in a file, and a schedule that knows its digest."""
    (folder / "w.bin").write_bytes(WEIGHTS.tobytes())
    digest = hashlib.sha256(WEIGHTS.tobytes()).hexdigest()
    return replace(made or toy.schedule(), model=ModelRef("m.onnx", "", {"w.bin": digest}))


def test_runs_with_weights_from_the_models_folder(tmp_path: Path) -> None:
    session = Session(model(tmp_path), toy.ToySemantics(), tmp_path)
    assert np.allclose(session.run("decode", {"x": X})["y"], expected())
    assert np.allclose(session.state("acc"), expected() + START)
    session.run("decode", {"x": X})
    assert np.allclose(session.state("acc"), 2 * expected() + START)
    assert (session.runs, session.steps, session.cycles) == (
        2,
        18,
        2 * toy.schedule().programs["decode"].cycles,
    )
    session.reset()
    assert session.state("acc").tolist() == [1, 2, 3, 4]
    session.set_state("acc", np.zeros(4))
    assert session.state("acc").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("x", np.ones(3)), ("x", np.array(["a"] * 4)), ("z", np.ones(4)), ("x", np.ones(4, object))],
)
def test_wrong_inputs_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    session = Session(model(tmp_path), toy.ToySemantics(), tmp_path)
    with pytest.raises(UsageError):
        session.run("decode", {name: value})
    with pytest.raises(UsageError):
        session.run("prefill", {"x": X})
    with pytest.raises(UsageError):
        session.state("y")


def test_missing_short_and_foreign_weight_files(tmp_path: Path) -> None:
    made = model(tmp_path)
    with pytest.raises(WeightsMissingError, match="no folder"):
        Session(made, toy.ToySemantics())
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes()[:-1])
    with pytest.raises(ModelError, match="not the weight file"):
        Session(made, toy.ToySemantics(), tmp_path)
    unknown = replace(made, model=ModelRef("m.onnx", ""))
    with pytest.raises(WeightsMissingError, match="ends before"):
        Session(unknown, toy.ToySemantics(), tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(WeightsMissingError, match="not in"):
        Session(made, toy.ToySemantics(), tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "elsewhere").write_bytes(WEIGHTS.tobytes())
    (tmp_path / "inner/w.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="outside"):
        Session(made, toy.ToySemantics(), tmp_path / "inner")


def test_what_a_run_leaves_behind_cannot_be_read_by_the_next(tmp_path: Path) -> None:
    made = model(tmp_path)
    whole = Session(made, toy.ToySemantics(), tmp_path)
    whole.run("decode", {"x": X})
    # the same schedule without the step that writes h: a first run would have left its bytes there
    broken = with_step(made, Place("decode", 0, 0), None)
    whole.schedule = broken
    with pytest.raises(ExecutionFault):
        whole.run("decode", {"x": X})


def test_memories_start_poisoned_and_know_what_lasts() -> None:
    made = toy.schedule()
    memories = allocate(made)
    assert len(memories.data(0)) == 320 + 64 * 2 + 16
    assert (memories.data(0) == POISON).all() and not memories.written(0)[:].any()
    with pytest.raises(ExecutionFault, match="byte 0"):
        require_written(memories.written(0), 0, 4, "a step")
    assert temporaries(made) == [(0, 0, 16), (0, 64, 80), (0, 128, 144), (0, 256, 272)]
    overlapping = made.buffers.to_pylist()
    overlapping[toy.T]["offset"] = 184
    moved = replace(made, buffers=pa.Table.from_pylist(overlapping, schema=made.buffers.schema))
    assert (0, 184, 192) in temporaries(moved), "the state's bytes are not cleared"


def test_more_memory_than_there_is_is_refused() -> None:
    made = toy.schedule()
    rows = made.buffers.to_pylist()
    rows[toy.T]["offset"] = 1 << 50
    huge = replace(
        made, buffers=pa.Table.from_pylist(rows, schema=made.buffers.schema), memories=(("mem", 1 << 51),)
    )
    with pytest.raises(ScheduleError, match="this computer"):
        allocate(huge)


def test_an_ill_formed_schedule_is_never_loaded() -> None:
    made = toy.schedule()
    place = Place("decode", 0, 0)
    wild = with_step(made, place, {**step_at(made, place), "opcode": 99})
    with pytest.raises(MapperError, match="opcode"):
        Session(wild, toy.ToySemantics(), weights=lambda _: WEIGHTS[0])
