"""Who may import what, beyond what import-linter's layers say: heavy packages stay where they belong."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = tuple(f"mapper/{name}.py" for name in ("cli", "cli_quantise", "cli_run", "cli_serving", "cli_zoo"))
ALLOWED = {
    "numba": ("kernels/", "targets/", "mapper/runtime/", "mapper/schedule/"),
    "llvmlite": ("kernels/", "targets/"),
    "onnx": ("mapper/frontend/", "mapper/zoo/", "mapper/runtime/oracle.py"),
    "onnx_ir": ("mapper/frontend/", "mapper/zoo/"),
    "onnxscript": ("mapper/frontend/", "mapper/zoo/"),
    "onnxruntime": ("mapper/runtime/oracle.py",),
    "mapper_kernels": ("kernels/", "targets/", "mapper/runtime/"),
    "rich": ("mapper/report/terminal.py", "mapper/report/live.py", "mapper/report/spinner.py", *COMMANDS),
    "typer": (*COMMANDS, "mapper/exits.py"),
    "jinja2": ("mapper/report/html.py", "targets/"),
    "tokenizers": ("mapper/tokens.py",),
    "torch": ("targets/mapper_gpu/",),
    "triton": ("targets/mapper_gpu/",),
}
SOURCES = sorted(p for top in ("mapper", "kernels", "targets") for p in (ROOT / top).rglob("*.py"))


@cache
def imported(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_heavy_packages_stay_where_they_belong(package: str) -> None:
    strays = [
        where
        for path in SOURCES
        if package in imported(path)
        and not (where := path.relative_to(ROOT).as_posix()).startswith(ALLOWED[package])
    ]
    assert strays == []


def test_no_target_imports_another_and_kernels_import_nothing_of_ours() -> None:
    targets = {p.name for p in (ROOT / "targets").iterdir() if p.is_dir() and p.name.startswith("mapper_")}
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        others = targets - {parts[1]}
        found = imported(path)
        assert not found & others, path
        if parts[0] == "kernels":
            assert not found & {"mapper"}, path
        if parts[0] == "mapper":
            assert not found & targets, path


def test_every_target_is_declared() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    points = declared["project"]["entry-points"]["mapper.targets"]
    packages = declared["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    linted = declared["tool"]["importlinter"]["root_packages"]
    for folder in (ROOT / "targets").iterdir():
        if (folder / "__init__.py").exists():
            assert f"{folder.name}:BACKEND" in points.values()
            assert f"targets/{folder.name}" in packages
            assert folder.name in linted
