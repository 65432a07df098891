"""Pass pipelines: the registry, and the text form `fold,dce,serve{phase=decode,context=64}`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

from mapper.errors import ModelError, UsageError
from mapper.ir.graph import Graph


@runtime_checkable
class Pass(Protocol):
    """A pass: a frozen dataclass whose fields are its options, with the `name` that the command line uses."""

    name: str

    def apply(self, graph: Graph) -> Graph:
        """The transformed graph; the given one stays as it is."""


@cache
def registry() -> dict[str, type[Any]]:
    """Every pass class by name."""
    from mapper.passes.cse import Cse
    from mapper.passes.dce import Dce
    from mapper.passes.fold import Fold
    from mapper.passes.quantise import Quantise
    from mapper.passes.repeat import Repeat
    from mapper.passes.serve import Serve
    from mapper.passes.specialise import Specialise
    from mapper.passes.unflatten import Unflatten
    from mapper.passes.unroll import Unroll

    return {cls.name: cls for cls in (Cse, Dce, Fold, Quantise, Repeat, Serve, Specialise, Unflatten, Unroll)}


def parse(text: str) -> list[Pass]:
    """The passes of a pipeline in text. Raises UsageError for an unknown pass or option."""
    passes: list[Pass] = []
    rest = text.strip()
    while rest:
        match = re.match(r"\s*([a-z_]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)", rest)
        if match is None:
            raise UsageError(f"pipeline {text!r}: cannot read {rest[:30]!r}")
        passes.append(_make(match.group(1), match.group(2) or ""))
        rest = rest[match.end() :]
    if not passes:
        raise UsageError("an empty pipeline")
    return passes


def run(graph: Graph, passes: Sequence[Pass] | str) -> Graph:
    """Applies passes in order, verifying the IR after each. Raises ModelError naming the pass at fault."""
    for one in parse(passes) if isinstance(passes, str) else passes:
        graph = one.apply(graph)
        try:
            graph.verify()
        except ModelError as error:
            raise ModelError(f"after pass {one.name}: {error}") from error
    return graph


def _make(name: str, options: str) -> Pass:
    known = registry()
    if name not in known:
        raise UsageError(f"unknown pass {name!r}; passes: {', '.join(known)}")
    cls = known[name]
    given: dict[str, Any] = {}
    for option in filter(None, (o.strip() for o in options.split(","))):
        key, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"pass {name}: option {option!r} is not key=value")
        given[key.strip()] = value.strip()
    made: Pass = cls(**_typed(name, cls, given))
    return made


def _typed(name: str, cls: type[Any], given: dict[str, str]) -> dict[str, Any]:
    """Options as the types of the dataclass's fields; a field `bindings` takes all the names that are no
    field."""
    assert is_dataclass(cls)
    declared = {f.name: f.default for f in fields(cls)}
    typed: dict[str, Any] = {}
    bindings: list[tuple[str, Any]] = []
    for key, value in given.items():
        if key in declared and key != "bindings":
            typed[key] = _value(name, key, value, declared[key])
        elif "bindings" in declared:
            bindings.append((key, _shape(name, key, value)))
        else:
            raise UsageError(f"pass {name} has no option {key!r}; options: {', '.join(declared) or 'none'}")
    return {**typed, "bindings": tuple(bindings)} if bindings else typed


def _value(name: str, key: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value not in ("true", "false", "1", "0"):
            raise UsageError(f"pass {name}: {key}={value} is neither true nor false")
        return value in ("true", "1")
    if isinstance(default, int):
        return _int(name, key, value)
    return value


def _int(name: str, key: str, value: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        raise UsageError(f"pass {name}: {key}={value} is not a number")
    return int(value)


def _shape(name: str, key: str, value: str) -> Any:
    """`4`, or a whole shape as `2x16`."""
    sizes = [_int(name, key, v) for v in value.split("x")]
    return sizes[0] if len(sizes) == 1 else tuple(sizes)
