"""Which machine is taken: the one asked for, the user's calibrated one, the target's default."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapper import backend, catalog
from mapper.errors import MachineError, UsageError
from mapper.machine import user_folder
from mapper.tokens import Tokens
from tests.sample import MACHINE


def calibrated(name: str = "host") -> Path:
    path = user_folder() / f"{name}.toml"
    path.parent.mkdir(parents=True)
    path.write_text(MACHINE.replace('"toy"', f'"{name}"'))
    return path


def test_the_calibrated_machine_stands_before_the_default() -> None:
    host = backend.load("host")
    assert catalog.machine_for(host).name == host.default_machine
    calibrated()
    assert catalog.machine_for(host).name == "host"
    assert catalog.machine_for(host, host.default_machine).name == host.default_machine
    assert "host" in [m.name for m in catalog.machines("host")]


def test_a_machine_of_another_target_is_refused() -> None:
    with pytest.raises(UsageError, match="is for target 'lpu'"):
        catalog.machine_for(backend.load("host"), catalog.machine("groq-lpu1"))


def test_unknown_machines_are_listed() -> None:
    with pytest.raises(MachineError, match="host-generic"):
        catalog.machine("abacus")


def test_every_constant_of_every_machine_says_where_it_is_from() -> None:
    for machine in catalog.machines():
        for key, constant in machine.constants.items():
            assert constant.source.strip(), f"{machine.name}: {key}"
            assert constant.unit.strip(), f"{machine.name}: {key}"


def test_only_what_is_this_computer_can_be_calibrated() -> None:
    with pytest.raises(UsageError, match="cannot be calibrated"):
        catalog.calibrate("lpu")


def test_text_needs_a_tokenizer_and_holds_back_broken_characters(example_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        Tokens.beside(tmp_path / "model.onnx")
    words = Tokens.beside(example_model)
    ids = words.encode("caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    assert words.text(ids) == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert words.text(ids[:-1]) in ("caf", "ca")
    with pytest.raises(UsageError, match="empty"):
        words.encode("")
