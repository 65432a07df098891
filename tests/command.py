"""The command `mapper`, in a fresh process and in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock


@dataclass(frozen=True)
class Done:
    """How a command ended and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def fresh(*args: str, **env: str) -> Done:
    """Run it as its own process, with some arguments and extra environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "mapper", *args], capture_output=True, text=True, timeout=300,
        env=os.environ | {"COLUMNS": "200"} | env, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def inside(*args: str, stdin: str = "") -> Done:
    """Run it in this process: quicker, for what does not depend on a fresh one."""
    from mapper.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.object(sys, "argv", ["mapper", *args]),
        mock.patch("signal.signal"),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())
