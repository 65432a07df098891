"""The contract test runs over every target that is found: the shipped ones and the example plugin.

The plugin is found through the `*.dist-info` in its folder, as an installed distribution is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[1] / "plugin"
sys.path.insert(0, str(PLUGIN))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise every test that takes `target` over the targets found."""
    if "target" in metafunc.fixturenames:
        from mapper.backend import discover

        metafunc.parametrize("target", sorted(discover()), scope="session")
