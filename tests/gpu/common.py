"""Machines and compiled schedules that the tests of this target share."""

from __future__ import annotations

import re
from pathlib import Path

from mapper import driver
from mapper.machine import Machine, parse, read
from mapper.zoo import families, files

ROOT = Path(__file__).resolve().parents[2]
MACHINES = ROOT / "targets" / "mapper_gpu" / "machines"
EXAMPLE = ROOT / "examples" / "tiny-llama-op18.onnx"


def h100(megakernel: bool = False, **values: float) -> Machine:
    """The H100's machine in a style, with some constants changed (dots as double underscores)."""
    machine = read(MACHINES / "h100-sxm.toml")
    text = machine.text
    if megakernel:
        text = text.replace("megakernel = { value = 0", "megakernel = { value = 1")
    return parse(text).replace({k.replace("__", "."): v for k, v in values.items()})


def domains(size: int) -> Machine:
    """An H100 with link domains of some chips."""
    text, many = re.subn(r"domain = \{ value = \d+", f"domain = {{ value = {size}", h100().text)
    assert many == 1
    return parse(text)


def built(model: Path | str = EXAMPLE, **options: object) -> driver.Compiled:
    """A compiled model whose checks all hold."""
    done = driver.build(model, "gpu", **options)  # type: ignore[arg-type]
    assert {k: v[0].message for k, v in done.report.violations.items() if v} == {}
    return done


def toy(name: str, layers: int, folder: Path) -> Path:
    """A model of the zoo at toy widths with random weights."""
    made = families.shortened(families.tiny(families.config(name)), layers)
    path = folder / f"{name}.onnx"
    files.write(made, path, "f32", seed=1)
    return path
