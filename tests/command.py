"""The command `mapper` in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys


def mapper(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it with some arguments and extra environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "mapper", *args], capture_output=True, text=True, timeout=300,
        env=os.environ | {"COLUMNS": "200"} | env, check=False,
    )  # fmt: skip
