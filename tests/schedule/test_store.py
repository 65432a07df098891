"""Schedules on disk: exact round trip, byte-identical, all or nothing, hostile files refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mapper.errors import MapperError, ScheduleError, UsageError
from mapper.runtime.execute import Session
from mapper.schedule import store
from mapper.schedule.checks import run_checks
from mapper.schedule.tables import Schedule, StepTable
from tests.schedule import toy


@dataclass(frozen=True)
class Text:
    """An artifact."""

    name: str
    data: bytes = b"text"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    made = toy.schedule()
    store.save(made, tmp_path / "s", [Text("listing/queue.txt", b"NOP 3")])
    read = store.load(tmp_path / "s")
    for name in (
        "target",
        "machine_toml",
        "request",
        "model",
        "clock_hz",
        "units",
        "memories",
        "opcodes",
        "ports",
    ):
        assert getattr(read, name) == getattr(made, name), name
    assert read.buffers.equals(made.buffers) and read.ops.equals(made.ops)
    for a, b in zip(read.programs["decode"].blocks, made.programs["decode"].blocks, strict=True):
        assert a.steps.table.equals(b.steps.table)
        assert (a.name, a.start, a.repeat, a.period) == (b.name, b.start, b.repeat, b.period)
        assert (a.bindings is None) == (b.bindings is None)
    assert np.array_equal(read.constants["start"], made.constants["start"])
    assert (tmp_path / "s/listing/queue.txt").read_bytes() == b"NOP 3"


def test_equal_schedules_give_equal_bytes_however_their_tables_are_chunked(tmp_path: Path) -> None:
    made = toy.schedule()
    whole = made.buffers
    pieces = pa.concat_tables([whole.slice(0, 3), whole.slice(3)]).replace_schema_metadata({"pandas": "x"})
    store.save(made, tmp_path / "a")
    store.save(replace(toy.schedule(), buffers=pieces.replace_schema_metadata(None)), tmp_path / "b")
    store.save(store.load(tmp_path / "a"), tmp_path / "c")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_replaces_an_older_schedule_and_nothing_else(tmp_path: Path) -> None:
    store.save(toy.schedule(), tmp_path / "s", [Text("old.txt")])
    store.save(toy.schedule(2), tmp_path / "s")
    assert "old.txt" not in files(tmp_path / "s")
    assert store.load(tmp_path / "s").model.layers == 2
    assert os.listdir(tmp_path) == ["s"]

    (tmp_path / "s/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        store.save(toy.schedule(), tmp_path / "s")
    assert (tmp_path / "s/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "working directory"])
def test_refuses_to_replace_what_is_no_schedule(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    if kind == "working directory":
        monkeypatch.chdir(out)
    with pytest.raises(UsageError):
        store.save(toy.schedule(), out)
    assert "mine" in {p.read_text() for p in (tmp_path.rglob("*")) if p.is_file()}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    store.save(toy.schedule(), tmp_path / "old")
    before = files(tmp_path)
    monkeypatch.setattr(pq, "write_table", full)
    for name in ("old", "new/deeper"):
        with pytest.raises(MapperError, match="No space left"):
            store.save(toy.schedule(), tmp_path / name)
    assert files(tmp_path) == before
    assert os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize(
    "name", ["../escape", "/abs", "schedule.json", "a/../../b", "C:/x", "constants.bin", ""]
)
def test_artifacts_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ScheduleError):
        store.save(toy.schedule(), tmp_path / "s", [Text(name)])
    assert not list(tmp_path.iterdir())


def test_every_truncation_of_every_file_is_refused(tmp_path: Path) -> None:
    store.save(toy.schedule(), tmp_path / "s")
    for name, data in files(tmp_path / "s").items():
        for keep in sorted({0, 1, len(data) // 3, len(data) // 2, len(data) - 5}):
            (tmp_path / "s" / name).write_bytes(data[:keep])
            with pytest.raises(ScheduleError) as caught:
                store.load(tmp_path / "s")
            assert "\n" not in str(caught.value)
        (tmp_path / "s" / name).unlink()
        with pytest.raises(ScheduleError):
            store.load(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(data)
    store.load(tmp_path / "s")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "schedule.json"
    document = json.loads(path.read_text())
    for dotted, value in changes.items():
        *way, last = dotted.split("__")
        at = document
        for key in way:
            at = at[int(key) if key.isdigit() else key]
        at[last] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "other"},
        {"surprise": 1},
        {"chips": "1"},
        {"clock_hz": -1.0},
        {"memories": [["mem", 10**30]]},
        {"memories": []},
        {"memories": [["mem", 4096], ["mem", 4096]]},
        {"units": ["alu0"]},
        {"opcodes": ["copy"]},
        {"programs__0__cycles": -1},
        {"programs__0__blocks": 7},
        {"programs__0__blocks": [{"name": "a", "start": 0, "repeat": 2**40, "period": 1, "bindings": False}]},
        {"programs": [{"phase": "idle", "blocks": [], "cycles": 0, "sequence": 1}]},
        {"programs": [{"phase": "decode", "blocks": [], "cycles": 0, "sequence": 1}] * 2},
        {"ports__0__dtype": "object"},
        {"ports__0__shape": [-4]},
        {"ports__0__buffers": [99]},
        {"ports__0__kind": "gift"},
        {"ports__0__name": "y"},
        {"ports__3__source": ["weight", "nothing"]},
        {"ports__3__source": [["weight"]]},
        {"weights__w0__file": "../../etc/passwd"},
        {"weights__w0__file": "/etc/passwd"},
        {"weights__w0__offset": -4},
        {"weights__w0__bytes": 2**70},
        {"weights__w0__shape": [3]},
        {"weights__w0__dtype": "O"},
        {"constants__start__offset": 1 << 50},
        {"constants__start__bytes": 8},
        {"constants": {}},
        {"plan": []},
        {"plan": {"fused": {"0": 99}}},
        {"plan": {"fused": {"x": 0}}},
        {"plan": {"fused": [1]}},
        {"plan": {"gather": "copy"}},
        {"plan": {"access_timing": {"copy": [1]}}},
        {"plan": {"access_timing": {"copy": [1, 1e9]}}},
        {"plan": {"arithmetic": {"matmul": "object"}}},
        {"plan": {"arithmetic": {"surprise": "float16"}}},
    ],
)
def test_hostile_documents_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store.save(toy.schedule(), tmp_path / "s")
    edit(tmp_path / "s", **change)
    with pytest.raises(ScheduleError) as caught:
        store.load(tmp_path / "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"nonsense", b'{"format": "mapper-schedule"}', b"\xff\xfe", b""]
)
def test_no_document_at_all(tmp_path: Path, text: bytes) -> None:
    store.save(toy.schedule(), tmp_path / "s")
    (tmp_path / "s/schedule.json").write_bytes(text)
    with pytest.raises(ScheduleError):
        store.load(tmp_path / "s")


def with_column(made: Schedule, name: str, values: Any) -> Schedule:
    program = made.programs["decode"]
    table = program.blocks[0].steps.table
    index = table.schema.get_field_index(name)
    table = table.set_column(
        index, table.schema.field(index), pa.array(values, table.schema.field(index).type)
    )
    block = replace(program.blocks[0], steps=StepTable(table))
    return replace(made, programs={"decode": replace(program, blocks=(block, *program.blocks[1:]))})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", 2**60),
        ("duration", -1),
        ("unit", 2),
        ("unit", -1),
        ("opcode", 3),
        ("op", 5),
        ("op", -2),
        ("bytes", -1),
        ("start", None),
        ("reads", [{"buffer": 8, "offset": 0, "bytes": 16}]),
        ("reads", [{"buffer": 0, "offset": -1, "bytes": 16}]),
        ("reads", [{"buffer": 0, "offset": 1, "bytes": 16}]),
        ("writes", [{"buffer": None, "offset": 0, "bytes": 16}]),
        ("args", [None]),
    ],
)
def test_numbers_that_refer_to_nothing_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ScheduleError):
        store.save(with_column(toy.schedule(), name, [value]), tmp_path / "s")


def test_links_and_other_tables_are_refused(tmp_path: Path) -> None:
    store.save(toy.schedule(), tmp_path / "s")
    target = tmp_path / "s/ops.parquet"
    shutil.copy(target, tmp_path / "elsewhere")
    target.unlink()
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ScheduleError, match="regular"):
        store.load(tmp_path / "s")
    target.unlink()
    pq.write_table(pa.table({"id": [1]}), target)
    with pytest.raises(ScheduleError, match="columns"):
        store.load(tmp_path / "s")


@pytest.mark.parametrize("plan", [{1: 2}, {"a": float("nan")}, {"a": object()}])
def test_a_plan_that_json_cannot_hold_is_refused(tmp_path: Path, plan: Any) -> None:
    with pytest.raises(ScheduleError):
        store.save(replace(toy.schedule(), plan=plan), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_table_that_claims_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(toy.schedule(), tmp_path / "s")
    monkeypatch.setattr(store, "MAX_BYTES", 30)
    with pytest.raises(ScheduleError, match="more than 30 bytes"):
        store.load(tmp_path / "s")


def test_plans_and_programs_keep_their_order_and_extended_types_are_kept(tmp_path: Path) -> None:
    made = toy.schedule()
    both = {"prefill": replace(made.programs["decode"], phase="prefill"), "decode": made.programs["decode"]}
    half = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    constants = {**made.constants, "half": half, "none": np.zeros((0, 4)), "one": np.array(3)}
    store.save(replace(made, programs=both, constants=constants), tmp_path / "s")
    read = store.load(tmp_path / "s")
    assert list(read.programs) == ["prefill", "decode"]
    for name, array in constants.items():
        assert read.constants[name].dtype == array.dtype and np.array_equal(read.constants[name], array)


def test_flipped_bytes_never_give_more_than_one_line(tmp_path: Path) -> None:
    store.save(toy.schedule(), tmp_path / "s")
    whole = files(tmp_path / "s")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        name = sorted(whole)[rng.integers(len(whole))]
        broken = bytearray(whole[name])
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        (tmp_path / "s" / name).write_bytes(broken)
        try:
            made = store.load(tmp_path / "s")
            refused += any(run_checks(made).values())
            Session(made, toy.ToySemantics(), weights=lambda _: np.ones(4, np.float32)).run(
                "decode", {"x": np.ones(4)}
            )
        except MapperError as error:
            refused += 1
            assert "\n" not in str(error)
        (tmp_path / "s" / name).write_bytes(whole[name])
    assert refused > 100
