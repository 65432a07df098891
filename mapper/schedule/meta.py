"""`schedule.json`: everything of a Schedule that is not a table, as a strict, typed document.

Reading is strict (pydantic, no conversions, unknown keys refused), because the file may come from anywhere.
Printing is stable: sorted keys, no time, host name or path of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mapper.errors import ScheduleError
from mapper.schedule.tables import Block, ModelRef, Phase, Port, PortKind, Program, Request, Schedule

FORMAT = "mapper-schedule"
VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class BlockMeta(_Strict):
    """A block without its steps."""

    name: str
    start: int
    repeat: int
    period: int
    bindings: bool


class ProgramMeta(_Strict):
    """A program without its tables."""

    phase: Phase
    blocks: list[BlockMeta]
    cycles: int
    sequence: int


class PortMeta(_Strict):
    """A port."""

    name: str
    kind: PortKind
    dtype: str
    shape: list[int]
    buffers: list[int]
    layout: Any
    source: Any
    programs: list[str]


class RequestMeta(_Strict):
    """What the user asked for."""

    phases: list[Phase]
    batch: int
    context: int
    prompt: int
    weights: str | None
    chips: int | None
    speculative: int
    parallel: str = ""


class ModelMeta(_Strict):
    """Which model the schedule belongs to."""

    path: str
    sha256: str
    files: dict[str, str]
    params: int
    layers: int


class ConstantMeta(_Strict):
    """Where an array lies in constants.bin."""

    dtype: str
    shape: list[int]
    offset: int
    bytes: int


class Meta(_Strict):
    """The document. `files` lists every other file of the folder."""

    format: Literal["mapper-schedule"]
    version: Literal[1]
    files: list[str]
    target: str
    machine: str
    machine_toml: str
    chips: int
    request: RequestMeta
    model: ModelMeta
    clock_hz: float
    units: list[str]
    memories: list[tuple[str, int]]
    opcodes: list[str]
    programs: list[ProgramMeta]
    ports: list[PortMeta]
    weights: dict[str, dict[str, Any]]
    constants: dict[str, ConstantMeta]
    roles: Any
    plan: Any
    provenance: Any


def describe(schedule: Schedule, constants: dict[str, Any], files: Iterable[str]) -> str:
    """The text of schedule.json. Raises ScheduleError where it holds what JSON cannot."""
    request, model = schedule.request, schedule.model
    document = {
        "format": FORMAT,
        "version": VERSION,
        "files": sorted(files),
        **{k: getattr(schedule, k) for k in ("target", "machine", "machine_toml", "chips", "clock_hz")},
        **{k: getattr(schedule, k) for k in ("units", "memories", "opcodes", "roles", "plan", "provenance")},
        "request": {k: getattr(request, k) for k in RequestMeta.model_fields},
        "model": {k: getattr(model, k) for k in ModelMeta.model_fields},
        "programs": [_program(p) for p in schedule.programs.values()],
        "ports": [{k: getattr(port, k) for k in PortMeta.model_fields} for port in schedule.ports],
        "weights": schedule.weights,
        "constants": constants,
    }  # fmt: skip
    try:
        plain = _plain(document, "schedule")
        return (
            json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
            + "\n"
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ScheduleError(f"the schedule cannot be written as JSON: {error}") from error


def _program(program: Program) -> dict[str, Any]:
    blocks = [_block(b) for b in program.blocks]
    return {"phase": program.phase, "cycles": program.cycles, "sequence": program.sequence, "blocks": blocks}


def _block(block: Block) -> dict[str, Any]:
    fields = {k: getattr(block, k) for k in ("name", "start", "repeat", "period")}
    return {**fields, "bindings": block.bindings is not None}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, dict) or hasattr(value, "items"):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which is not a string")
        return {k: _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist(), where)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{where} holds a {type(value).__name__}")


def read(text: bytes) -> Meta:
    """The document in `text`. Raises ScheduleError with one line that names the first wrong key."""
    try:
        return Meta.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(p) for p in first["loc"]) or "document"
        raise ScheduleError(f"schedule.json: {place}: {first['msg']}") from error


def request(meta: RequestMeta) -> Request:
    """The Request it stands for."""
    fields = {k: getattr(meta, k) for k in RequestMeta.model_fields}
    return Request(**{**fields, "phases": tuple(meta.phases)})


def model(meta: ModelMeta) -> ModelRef:
    """The ModelRef it stands for."""
    return ModelRef(**{k: getattr(meta, k) for k in ModelMeta.model_fields})


def port(meta: PortMeta) -> Port:
    """The Port it stands for."""
    return Port(
        meta.name, meta.kind, meta.dtype, tuple(meta.shape), tuple(meta.buffers), meta.layout, meta.source,
        tuple(meta.programs),
    )  # fmt: skip
