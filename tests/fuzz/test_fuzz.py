"""A few hundred mutants of the fuzz target (`make fuzz` runs 20,000), and the cases that were once wrong."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.frontend.test_experts import mixture
from tests.fuzz import wire_tree
from tests.fuzz.case import Outcome, isolated, outcome
from tests.fuzz.run import fuzz
from tests.fuzz.seeds import small


def test_mutants_are_loaded_or_refused() -> None:
    summary = fuzz(small(), range(150))
    assert summary.kinds.total() == 150 and not summary.wrong, summary.line()
    assert summary.kinds["ModelError"] and summary.kinds["loaded"] + summary.kinds["computed"], summary.line()


@pytest.mark.parametrize("index", range(len(small())))
def test_unchanged_seeds_are_computed(index: int, tmp_path: Path) -> None:
    assert outcome(small()[index], tmp_path / "model.onnx").kind == "computed"


def test_experts_for_absurdly_many_tokens_are_not_drawn(tmp_path: Path) -> None:
    model = mixture()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1 << 32
    assert outcome(model.SerializeToString(), tmp_path / "model.onnx").kind == "loaded"


def test_bytes_survive_the_tree() -> None:
    for data in small():
        assert wire_tree.write(wire_tree.parse(data, onnx.ModelProto.DESCRIPTOR)) == data


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("while True: pass", "hang"),
        ("bytearray(1 << 32)", "memory"),
        ("os._exit(3)", "crash"),
        ("{}['x']", "traceback"),
        ("raise ModelError('')", "message"),
    ],
)
def test_defects_are_noticed(code: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fuzz import case

    def broken(path: Path) -> None:
        exec(f"import os\nfrom mapper.errors import ModelError\n{code}")

    monkeypatch.setattr(case, "load", broken)
    monkeypatch.setattr(case, "MAX_CPU", 1)
    found: Outcome = isolated(small(), 1, tmp_path)
    assert found.kind == kind and found.wrong, found
