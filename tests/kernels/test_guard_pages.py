"""Kernels touch no byte outside of their operands: every operand lies next to a page that may not be
touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX's")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels"))
    command = [sys.executable, "-m", "tests.kernels.guard_pages", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def test_kernels_stay_inside() -> None:
    found = run()
    assert found.returncode == 0 and found.stdout.endswith("done\n"), found.stdout + found.stderr


def test_the_guard_bites() -> None:
    assert run("overread").returncode in (-signal.SIGSEGV, -signal.SIGBUS)
