"""Functions that one factory makes stay apart in compiled code that different processes left on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mapper_kernels import cached, linear

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import sys
from pathlib import Path
import numba, numpy as np
from mapper_kernels.front_linear import scratch_memory
from mapper_kernels.jit import entry
from mapper_kernels.linear import prepare_rows

@entry(Path(__file__))
def left(code, x, k, out):
    prepare_rows(code, x, 4 * k, 1, k, out)

@entry(Path(__file__))
def right(code, x, k, out):
    prepare_rows(code, x, 4 * k, 1, k, out)

for n in range(int(sys.argv[1])):
    numba.njit(lambda x: x + n)(1)
x = np.arange(544, dtype=np.float32)
for name in sys.argv[2:]:
    for code in range(10):
        memory, address = scratch_memory(4096)
        memory[:] = 0
        globals()[name](code, x.ctypes.data, len(x), address)
        print(code, memory[address - memory.ctypes.data :][:4096].tobytes().hex())
"""


def test_factories_give_names_of_their_own() -> None:
    made = [*linear._ROWS, *linear._PREPARE, cached._scores_f32, cached._scores_f16, cached._weigh_f32]
    assert len({(f.__module__, f.__qualname__) for f in made}) == len(made)


@pytest.mark.parametrize("first", ["left", "right"])
def test_code_that_two_processes_cached(tmp_path: Path, first: str) -> None:
    """Numba numbers functions as they are compiled; the second process has compiled others before."""
    (tmp_path / "twice.py").write_text(MODULE)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}

    def run(shift: int, *names: str) -> str:
        command = [sys.executable, str(tmp_path / "twice.py"), str(shift), *names]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    second = "right" if first == "left" else "left"
    expected = run(0, first)
    assert run(2, second) == expected
    assert run(0, first, second) == expected * 2
    assert run(0, second, first) == expected * 2
