"""A choice between the graphs of one file, made by the inputs that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapper.ir.types import Array

if TYPE_CHECKING:
    from mapper.ir.graph import Graph


@dataclass(frozen=True, eq=False)
class Switch:
    """Graphs with the same inputs and outputs. `choose` reads the inputs' arrays (by name), names a graph,
    and may raise ModelError; `graph` gives it; `phases` are those names that are "prefill" or "decode"."""

    choose: Callable[[Mapping[str, Array]], str]
    graph: Callable[[str], Graph]
    phases: tuple[str, ...] = ()
