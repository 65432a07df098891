"""Serving software: how it makes up iterations, and the host time that it adds to each.

A stack is a file in `stacks/`, in the form of a machine file: each constant with unit, kind, source and
range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mapper.machine import Machine, read
from mapper.serving.phases import Policy, Stack

FOLDER = Path(__file__).parent / "stacks"
KERNELS = Path(__file__).parent / "software.toml"


@dataclass(frozen=True)
class Host:
    """Seconds that the host adds to an iteration, and for each sequence in it."""

    iteration: float = 0.0
    sequence: float = 0.0


@cache
def files() -> dict[str, Machine]:
    """Stack name -> its constants."""
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.toml"))}


def stacks() -> tuple[Stack, ...]:
    """All stacks, with their policies."""
    return tuple(_stack(file) for file in files().values())


@cache
def kernels() -> Machine:
    """What the kernels of serving software achieve, on any GPU."""
    return read(KERNELS)


def host(name: str) -> Host:
    """The host times of a stack. Raises KeyError for an unknown name."""
    file = files()[name]
    return Host(file.value("host.iteration"), file.value("host.sequence"))


def _stack(file: Machine) -> Stack:
    policy = Policy(
        tokens=file.whole("policy.tokens"),
        sequences=file.whole("policy.sequences"),
        mixed=bool(file.whole("policy.mixed")),
        chunked=bool(file.whole("policy.chunked")),
        reserve=bool(file.whole("policy.reserve")),
    )
    framework = file.summary.split(",")[0]
    return Stack(file.name, file.summary, framework, file.whole("since"), file.whole("until"), policy)
