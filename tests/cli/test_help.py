"""`mapper --help` stays quick because it imports nothing heavy; usage errors are one line and exit with 2."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from tests.command import fresh, inside

HEAVY = [
    "numpy",
    "pyarrow",
    "numba",
    "llvmlite",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "xdsl",
    "pydantic",
    "tokenizers",
    "jinja2",
    "torch",
    "pandas",
    "rich",
    "mapper.driver",
    "mapper.backend",
    "mapper.schedule.tables",
]
COMMANDS = ["compile", "verify", "check", "inspect", "run", "opt", "explain", "report", "targets", "machines"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mapper.cli import main; sys.argv = ['mapper', '--help']\n"
        "try: main()\nexcept SystemExit as e: code = e.code\n"
        f"print('LOADED', code, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED 0 []"
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_help_is_quick() -> None:
    """At most 0.4 s cold; counted in CPU time, which a busy machine does not stretch as much."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert fresh("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    once()  # byte code of a fresh checkout is compiled here
    assert min(once() for _ in range(4)) <= 0.4


def test_import_of_the_package_is_light() -> None:
    code = f"import sys, mapper; assert mapper.MapperError; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    from importlib.metadata import version

    assert fresh("--version").stdout.strip() == f"mapper {version('inference-mapper')}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = inside(command, "--help")
    assert done.returncode == 0
    assert f"mapper {command}" in done.stdout
    assert "Example: mapper" in done.stdout or command == "machines"


USAGE = {
    "no such command": ["frobnicate"],
    "no such option": ["compile", "x.onnx", "--target", "host", "--frobnicate"],
    "no model": ["compile", "--target", "host"],
    "no target": ["compile", "x.onnx"],
    "unknown target": ["compile", "x.onnx", "--target", "abacus"],
    "unknown machine": ["compile", "x.onnx", "--target", "host", "--machine", "abacus"],
    "word for a number": ["compile", "x.onnx", "--target", "host", "--batch", "two"],
    "zero batch": ["compile", "x.onnx", "--target", "host", "--batch", "0"],
    "no chips": ["compile", "x.onnx", "--target", "host", "--chips", "many"],
    "prompt beyond context": ["compile", "x.onnx", "--target", "host", "--prompt", "9", "--context", "8"],
    "no such phase": ["compile", "x.onnx", "--target", "host", "--phase", "reverse"],
    "no such schedule": ["check", "nowhere"],
    "neither prompt nor ids": ["run", "x.onnx"],
    "ids that are words": ["run", "x.onnx", "--ids", "a,b"],
    "calibrate without target": ["machines", "calibrate"],
    "calibrate what cannot be": ["machines", "calibrate", "lpu"],
    "no such machine": ["machines", "show", "abacus"],
}


@pytest.mark.parametrize("args", USAGE.values(), ids=USAGE.keys())
def test_usage_errors_are_one_line_and_exit_2(args: list[str]) -> None:
    done = inside(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mapper: ")


ZOO = "zoo:llama-3.1-8b"
NEAR = {
    "the start of a machine's name": (["compile", ZOO, "--target", "gpu", "--machine", "h200"], "h200-sxm"),
    "two machines": (["machines", "show", "A100"], "a100-80g-sxm, a100-40g-sxm"),
    "a slip in a machine's name": (
        ["serve", ZOO, "--target", "gpu", "--machine", "h100_smx"], "h100-sxm"
    ),
    "a slip in a target's name": (["compile", ZOO, "--target", "gpuu"], "gpu"),
    "a target in capitals": (["compile", ZOO, "--target", "LPU"], "lpu"),
    "a target to calibrate": (["machines", "calibrate", "hots"], "host"),
    "a model": (["inspect", "zoo:deepseekv3"], "deepseek-v3"),
    "the start of a model's name": (["inspect", "zoo:Mixtral"], "mixtral-8x7b, mixtral-8x22b"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "names"), NEAR.values(), ids=NEAR.keys())
def test_a_name_that_is_nearly_known_is_hinted_at(args: list[str], names: str) -> None:
    done = inside(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert re.search(f"; did you mean {re.escape(names)}[,?]", done.stderr)


@pytest.mark.parametrize(
    "args",
    [
        ["compile", ZOO, "--target", "abacus"],
        ["compile", ZOO, "--target", "gpu", "--machine", "zx81"],
        ["machines", "show", ""],
        ["machines", "show", "h" * 100_000],
        ["inspect", "zoo:abacus"],
    ],
)
def test_a_name_like_no_other_has_no_hint(args: list[str]) -> None:
    done = inside(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean" not in done.stderr
    assert any(
        words in done.stderr for words in ("; known: ", "; installed targets: ", "; see `mapper zoo list`")
    )


def test_no_arguments_prints_help() -> None:
    assert fresh().stdout == fresh("--help").stdout


def test_a_bug_is_one_line_and_exits_70() -> None:
    code = (
        "import sys, mapper.cli as c\n"
        "c.app.registered_commands.clear()\n"
        "@c.app.command('boom')\ndef boom():\n    raise ZeroDivisionError('two\\nlines')\n"
        "sys.argv = ['mapper', 'boom']; c.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 70
    assert len(done.stderr.splitlines()) == 1
    assert "bug: ZeroDivisionError: two lines" in done.stderr
    debug = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"MAPPER_DEBUG": "1"},
    )  # fmt: skip
    assert "Traceback" in debug.stderr


def test_interrupt_exits_130() -> None:
    code = (
        "import sys, mapper.cli as c\n"
        "@c.app.command('wait')\ndef wait():\n    raise KeyboardInterrupt\n"
        "sys.argv = ['mapper', 'wait']; c.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "mapper: interrupted\n")


def test_broken_pipe_is_silent() -> None:
    done = subprocess.run(
        f"{sys.executable} -m mapper compile --help | true; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", str(128 + signal.SIGPIPE))
