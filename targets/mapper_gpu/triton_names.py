"""Names in emitted source: parameters of a kernel, readable, apart from the templates' own variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOCALS = frozenset((
    "above", "acc", "at", "b", "band", "base", "best", "block", "byte", "c", "c0", "cached", "centre",
    "choice", "codes", "column", "counts", "d", "e", "empty", "ends", "expert", "factor", "first", "group",
    "grouped", "head", "here", "high", "index", "inside", "j", "j0", "k", "k0", "kept", "kv_head", "low",
    "m", "mine", "n", "n0", "others", "p0", "pair", "part_top", "part_total", "past", "picked", "picks",
    "piece", "place", "r", "rank", "row", "run", "scores", "seen", "sequence", "share", "shares", "sink",
    "slope", "split", "starts", "step", "t0", "theirs", "tile", "tl", "token", "top", "total", "triton",
    "used", "v", "values", "w",
))  # fmt: skip
"""Names that the templates use for themselves."""


@dataclass
class Parameters:
    """The pointers that a kernel takes: (value, chip, format) by name, in order of first use."""

    known: dict[tuple[str, int], str] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)

    def name(self, operand: Mapping[str, Any]) -> str:
        """The parameter of an operand."""
        key = (operand["value"], int(operand["chip"]))
        if key not in self.known:
            base = readable(key[0]) + (f"_chip{key[1]}" if key[1] >= 0 else "")
            taken, made, number = set(self.known.values()), base, 1
            while made in taken:
                number += 1
                made = f"{base}_{number}"
            self.known[key], self.formats[made] = made, operand["dtype"]
        return self.known[key]


def readable(value: str) -> str:
    """An identifier from a value's name: without its program, its layer, and what every name has."""
    partial = re.search(r"\.k\d+\.\d+(\.\d+|\.sum|\.stats)$", value)
    if partial:
        return "partial" + ("_stats" if partial[1] == ".stats" else "")
    parts = re.split(r"[^A-Za-z0-9]+", re.sub(r"\[\d+:\]", "", value))
    drop = {"model", "layers", "MatMul", "decode", "prefill", "transformer", "h", ""}
    kept = [p for p in parts if p not in drop and not p.isdigit()]
    name = "_".join(kept) or "value"
    return f"{name}_" if name in LOCALS else f"v_{name}" if name[0].isdigit() else name
