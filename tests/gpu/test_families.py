"""Families of models beside the example's, at toy widths: executed on poisoned memories, equal to
onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapper import driver
from mapper.zoo import families, files
from tests.frontend import tiny
from tests.frontend.corpus import FOLDER
from tests.gpu.common import built, h100

CORPUS = sorted(p for kind in ("bloom__ts17", "gptneox__dyn18") for p in FOLDER.glob(f"{kind}-kv.onnx"))


def toy(name: str, layers: int, folder: Path) -> Path:
    """A model of the zoo at toy widths with random weights."""
    made = families.shortened(families.tiny(families.config(name)), layers)
    path = folder / f"{name}.onnx"
    files.write(made, path, "f32", seed=1)
    return path


def agrees(model: Path, folder: Path, **options: object) -> driver.Compiled:
    done = built(model, prompt=4, context=12, out=folder / "s", **options)
    found = driver.verify(folder / "s", tokens=5)
    assert found.ok, found.failures
    assert found.max_rel_err < 1e-4
    for phase, estimate in done.result.phases.items():
        assert estimate.ratio >= 1, (phase, estimate.bound)
    return done


@pytest.mark.parametrize("chips", [1, 2])
def test_slopes_of_alibi(chips: int, tmp_path: Path) -> None:
    model = tiny.saved(tiny.decoder(tiny.Options(alibi=True)), tmp_path)
    agrees(model, tmp_path, chips=chips)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_norm_that_every_lane_repeats(layers: int, tmp_path: Path) -> None:
    """In a model of one layer no later repetition hides that all lanes of a product start at once."""
    model = toy("qwen3-0.6b", layers, tmp_path)
    done = built(model, batch=2, prompt=3, context=300)
    several = [v for v in done.schedule.plan["fused"].values() if isinstance(v, list)]
    assert several, "no kernel has lanes that share a prologue"


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("megakernel", [False, True])
@pytest.mark.parametrize("model", CORPUS, ids=lambda p: p.stem)
def test_heads_of_one_matrix(model: Path, megakernel: bool, chips: int, tmp_path: Path) -> None:
    """Queries, keys and values whose rows of the weight alternate, head by head. In one of them MLP and
    attention run side by side, so that no collective stands between the last one and the next layer's
    partial sums."""
    agrees(model, tmp_path, chips=chips, machine=h100(megakernel))
