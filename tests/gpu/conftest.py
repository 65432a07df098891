"""The target's serving view as an installed target, whatever else of the target is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import mapper_gpu
from mapper import backend as targets
from mapper.published import evaluate
from mapper_gpu.serving import ServingView


class Serving(ServingView):
    """Only what `mapper serve` and `mapper published` ask of a backend."""

    name = "gpu"
    summary = "GPUs"
    default_machine = "h100-sxm"

    def machine_files(self) -> Sequence[Path]:
        return sorted((Path(mapper_gpu.__file__).parent / "machines").glob("*.toml"))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """The target `gpu`, beside those that are installed."""
    made, load, discover = Serving(), targets.load, targets.discover
    monkeypatch.setattr(targets, "load", lambda name: made if name == "gpu" else load(name))
    monkeypatch.setattr(targets, "discover", lambda: {**discover(), "gpu": "here"})
    evaluate._modelled.cache_clear()
    evaluate._phases.cache_clear()
    yield made
    evaluate._modelled.cache_clear()
    evaluate._phases.cache_clear()
