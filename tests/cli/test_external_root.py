"""Weights behind links out of the model's folder, as in a model hub's cache: only where that is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import mapper
from mapper.errors import ModelError
from mapper.frontend.load import load
from tests.command import inside


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, example_model: Path) -> Path:
    """blobs/<digest> hold the bytes, snapshots/main/ links to them; gives the linked model file."""
    root = tmp_path_factory.mktemp("hub")
    blobs, snapshot = root / "blobs", root / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = onnx.load(example_model)
    onnx.save(model, blobs / "graph", save_as_external_data=True, location="model.onnx.data")
    (blobs / "model.onnx.data").rename(blobs / "weights")
    (snapshot / "model.onnx").symlink_to("../../blobs/graph")
    (snapshot / "model.onnx.data").symlink_to("../../blobs/weights")
    return snapshot / "model.onnx"


def test_links_out_need_the_option(hub: Path, tmp_path: Path) -> None:
    blobs = str(hub.parents[2] / "blobs")
    for command in (["inspect", str(hub)], ["opt", str(hub)]):
        refused = inside(*command)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "outside the model's folder" in refused.stderr and refused.stderr.count("\n") == 1
        assert inside(*command, "--external-root", blobs).returncode == 0
        elsewhere = inside(*command, "--external-root", str(tmp_path))
        assert elsewhere.returncode == 2 and "outside the model's folder and" in elsewhere.stderr


def test_a_linked_model_runs_from_its_schedule(hub: Path, example_model: Path, tmp_path: Path) -> None:
    blobs, out = str(hub.parents[2] / "blobs"), str(tmp_path / "out")
    ids = {"input_ids": np.array([[3, 1, 4, 1]]), "past_length": np.array(0)}
    sizes = ["--context", "16", "--prompt", "4"]
    plain = ["compile", str(hub), "--target", "host", *sizes, "--out", out]
    assert inside(*plain).returncode == 2 and not os.path.exists(out)
    assert inside(*plain, "--external-root", blobs).returncode == 0
    refused = inside("verify", out, "--tokens", "2")
    assert refused.returncode == 2 and "outside" in refused.stderr
    assert inside("verify", out, "--tokens", "2", "--external-root", blobs).returncode == 0
    words = ["run", str(hub), "--ids", "3,1,4,1", "--tokens", "2", "--json"]
    assert inside(*words).returncode == 2
    assert inside(*words, "--external-root", blobs).returncode == 0
    with pytest.raises(ModelError, match="outside"):
        mapper.execute(out, ids)


def test_the_linked_weights_are_those_of_the_model(hub: Path, example_model: Path) -> None:
    linked, plain = load(hub, external_root=hub.parents[2] / "blobs"), load(example_model)
    name = next(n for n, w in linked.weights.items() if w.file == "model.onnx.data")
    assert np.array_equal(linked.weights[name].load(), plain.weights[name].load())
