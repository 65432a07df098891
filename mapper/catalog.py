"""What is installed: targets, the machines they ship, and the machine files of the user's own folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from mapper import backend as targets
from mapper.backend import Backend
from mapper.errors import MachineError, MapperError, UsageError
from mapper.files import write_whole
from mapper.machine import Machine, find, parse, read, user_folder


@runtime_checkable
class Calibrates(Protocol):
    """What a backend offers beside the Backend protocol where its machine can be measured here and now."""

    def calibrate(self) -> str:
        """Measure this computer; the text of a machine file."""


def machine_files(target: str | None = None) -> Iterator[Path]:
    """Machine files that installed targets ship, or `target` alone does. Broken targets are left out."""
    for name in [target] if target is not None else targets.discover():
        try:
            yield from sorted(targets.load(name).machine_files())
        except MapperError:
            if target is not None:
                raise


def machines(target: str | None = None) -> list[Machine]:
    """All machines, sorted by target and name; a user's file stands before a shipped one of its name."""
    files = {p.stem: p for p in machine_files(target)}
    if user_folder().is_dir():
        files |= {p.stem: p for p in sorted(user_folder().glob("*.toml"))}
    found = [read(path) for path in files.values()]
    return sorted((m for m in found if target in (None, m.target)), key=lambda m: (m.target, m.name))


def machine(name: str) -> Machine:
    """The machine called `name`, or in file `name`. Raises MachineError listing what there is."""
    return find(name, machine_files())


def machine_for(backend: Backend, wanted: str | Path | Machine | None = None) -> Machine:
    """The machine asked for; else the user's calibrated one (named like the target), else the default.

    Raises MachineError, and UsageError where the machine is another target's.
    """
    if wanted is None:
        calibrated = user_folder() / f"{backend.name}.toml"
        wanted = calibrated if calibrated.is_file() else backend.default_machine
    found = wanted if isinstance(wanted, Machine) else find(str(wanted), backend.machine_files())
    if found.target != backend.name:
        raise UsageError(f"machine {found.name!r} is for target {found.target!r}, not {backend.name!r}")
    return found


def calibrate(target: str) -> tuple[Machine, Path]:
    """Measure this computer for `target`, write a machine file to the user's folder; machine and file."""
    found = targets.load(target)
    if not isinstance(found, Calibrates):
        raise UsageError(f"target {target!r} cannot be calibrated: its machine is not this computer")
    text = found.calibrate()
    measured = parse(text, f"calibration of {target}")
    path = user_folder() / f"{measured.name}.toml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
    write_whole(path, text)
    return measured, path
