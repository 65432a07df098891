"""Machine files: the numbers of one piece of hardware, each with its unit, kind, source and range.

    name = "groq-lpu1"
    target = "lpu"
    summary = "..."
    [constants.mxm_latency]
    value = 32
    unit = "cycles"
    kind = "assumed"
    source = "no source gives it; ..."
    low = 20
    high = 64

Constants are grouped in tables for the reader's sake ([constants.x] or [memory.hbm.bandwidth]); a constant's
key is its dotted path. Decimal units (GB = 1e9 bytes).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mapper.errors import MachineError
from mapper.hints import did_you_mean

Kind = Literal["published", "measured", "derived", "calibrated", "assumed"]


class Constant(BaseModel):
    """One machine constant. low <= value <= high; `source` says where it is from or why it is assumed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    unit: str
    kind: Kind
    source: str
    low: float
    high: float
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _default_range(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            data.setdefault("low", data.get("value"))
            data.setdefault("high", data.get("value"))
        return data

    @model_validator(mode="after")
    def _ordered(self) -> Constant:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"value {self.value} outside its range {self.low}..{self.high}")
        return self


class Machine(BaseModel):
    """A machine: typed, frozen. `text` is the TOML it came from."""

    model_config = ConfigDict(frozen=True)
    name: str
    target: str
    summary: str
    constants: dict[str, Constant]
    text: str = ""

    def get(self, key: str) -> Constant:
        """The constant with dotted key `key`. Raises MachineError naming machine and key."""
        try:
            return self.constants[key]
        except KeyError:
            raise MachineError(f"machine {self.name!r} has no constant {key!r}") from None

    def value(self, key: str) -> float:
        """The value of constant `key`, in its own unit."""
        return self.get(key).value

    def whole(self, key: str) -> int:
        """The value of constant `key` as a whole number. Raises MachineError where it is not one."""
        number = self.value(key)
        if number != round(number):
            raise MachineError(f"machine {self.name!r}: {key} = {number} is not a whole number")
        return round(number)

    def replace(self, values: Mapping[str, float]) -> Machine:
        """The same machine with some constants at other values (ranges widened where needed)."""
        new = dict(self.constants)
        for key, value in values.items():
            old = self.get(key)
            span = {"low": min(old.low, value), "high": max(old.high, value)}
            new[key] = old.model_copy(update={"value": value, **span})
        return self.model_copy(update={"constants": new})

    def ranged(self) -> list[str]:
        """Keys of the constants whose range is not a point: what a band comes from."""
        return [k for k, c in self.constants.items() if c.low < c.high]


def parse(text: str, where: str = "machine file") -> Machine:
    """A machine from TOML text. Raises MachineError with one line that names the key."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MachineError(f"{where}: {error}") from error
    head = {k: data.pop(k, None) for k in ("name", "target", "summary")}
    if not all(isinstance(v, str) for v in head.values()):
        raise MachineError(f"{where}: name, target and summary are required strings")
    flat: dict[str, Any] = {}
    _flatten(data, "", flat, where)
    try:
        return Machine(**head, constants=flat, text=text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise MachineError(f"{where}: {place}: {first['msg']}") from error


def _flatten(data: Mapping[str, Any], prefix: str, out: dict[str, Any], where: str) -> None:
    for key, value in data.items():
        path = f"{prefix}{key}"
        if not isinstance(value, dict):
            raise MachineError(f"{where}: {path} is not a constant (a table with value, unit, kind, source)")
        if "value" in value:
            out[path.removeprefix("constants.")] = value
        else:
            _flatten(value, path + ".", out, where)


def user_folder() -> Path:
    """Where calibrated files go: $MAPPER_CONFIG, else $XDG_CONFIG_HOME/mapper, else ~/.config/mapper."""
    if "MAPPER_CONFIG" in os.environ:
        return Path(os.environ["MAPPER_CONFIG"]) / "machines"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mapper" / "machines"


def read(path: Path) -> Machine:
    """A machine from a file. Raises MachineError."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"machine file {path}: {error}") from error


def find(name: str, shipped: Iterable[Path]) -> Machine:
    """Machine `name`: a path to a TOML file, or the stem of a file in the user's folder or among `shipped`.

    Raises MachineError with near names, listing what there is.
    """
    if name.endswith(".toml") or os.sep in name:
        return read(Path(name))
    files = {p.stem: p for p in shipped}
    folder = user_folder()
    if folder.is_dir():
        files |= {p.stem: p for p in sorted(folder.glob("*.toml"))}
    if name not in files:
        hint, known = did_you_mean(name, sorted(files)) or ";", ", ".join(sorted(files)) or "none"
        raise MachineError(f"unknown machine {name[:60]!r}{hint} known: {known}")
    return read(files[name])
