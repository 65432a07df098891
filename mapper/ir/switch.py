"""A choice between two graphs of one file, made by the inputs that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapper.ir.types import Array

if TYPE_CHECKING:
    from mapper.ir.graph import Graph


@dataclass(frozen=True, eq=False)
class Switch:
    """Two graphs with the same inputs and outputs. `holds` reads the inputs' arrays (by name) and may raise
    ModelError; `graph` gives the graph for either answer; `phases` names answers ("prefill", "decode")."""

    holds: Callable[[Mapping[str, Array]], bool]
    graph: Callable[[bool], Graph]
    phases: Mapping[str, bool] = field(default_factory=dict)
