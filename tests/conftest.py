"""Fixtures that all tests share: where the example model is, and an empty configuration folder."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_user_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not see machine files that whoever runs them has calibrated, nor leave weights behind."""
    monkeypatch.setenv("MAPPER_CONFIG", str(tmp_path / "no-config"))
    monkeypatch.setenv("MAPPER_WEIGHT_IMAGES", str(tmp_path / "images"))


@pytest.fixture(scope="session")
def example_model() -> Path:
    """The trained example model, opset 18."""
    return ROOT / "examples" / "tiny-llama-op18.onnx"
