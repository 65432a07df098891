"""Runs and compiles emitted kernels for the tests, in processes of their own: kernels that ran under Triton's
interpreter in a process cannot be compiled in it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mapper
from mapper.schedule.store import load
from mapper.schedule.tables import Schedule
from tests.gpu.common import EXAMPLE, ROOT

needs_triton = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("triton")),
    reason="torch and triton are not installed (extra 'gpu')",
)
VERIFY = """
import json, sys
from pathlib import Path
from mapper.schedule.store import load
from mapper_gpu.triton_cli import verify
found = [verify(load(folder), Path(folder), None, 1) for folder in sys.argv[1:]]
print(json.dumps([[x.ok, x.tokens, x.max_rel_err] for x in found]))
"""
COMPILE = """
import json, sys
from pathlib import Path
from benchmarks.gpu_resources import rows
print(json.dumps([list(rows("h100-sxm", Path(folder))) for folder in sys.argv[1:]]))
"""


def told(script: str, *arguments: str, interpret: bool, cache: Path | None = None) -> Any:
    """What a script prints as JSON in its last line. `cache` is where compiled kernels go."""
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "targets"))
    # the interpreter's many small products only wait for each other's threads
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1",
           "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           **({"TRITON_CACHE_DIR": str(cache)} if cache else {})}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=env, capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def compiled(folder: Path, model: Path | str = EXAMPLE, **request: Any) -> Schedule:
    """A schedule in a folder."""
    mapper.compile(model, target="gpu", out=folder, **request)
    return load(folder)


def kernels(blocks: Any) -> list[Any]:
    """The records of all kernels of a phase."""
    return [k for block in blocks for k in block["kernels"]]
