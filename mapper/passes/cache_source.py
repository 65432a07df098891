"""Which cache an append of a graph adds to: its input, and its place in it where that is a stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdsl.ir import SSAValue

from mapper.ir.op import DataflowOp, tensor_type

APPENDS = ("kv_append", "kv_update")
_VIEWS = ("reshape", "transpose", "squeeze", "unsqueeze", "cast", "slice", "gather", "select", "concat")
_DEPTH = 24
Slot = tuple[int, ...]


def cache_names(roles: Mapping[str, Any]) -> dict[tuple[str, Slot], str]:
    """(input, slot) of every cache -> its name, such as "key.3"; from a graph's roles."""
    table = roles.get("caches")
    if table:
        return {(t["input"], read_slot(t["slot"])): name for name, t in table.items()}
    past = {n: r.removeprefix("past.") for n, r in roles["inputs"].items() if r.startswith("past.")}
    return {(n, ()): what for n, what in past.items()}


def read_slot(text: str) -> Slot:
    """The indices of a slot that is written "1,0"."""
    return tuple(int(part) for part in text.split(",") if part)


def source(value: SSAValue, inputs: Mapping[SSAValue, str]) -> tuple[str, Slot] | None:
    """The input that a value is a view of, and its slot; None where it is something else.

    A choice of sequences (a gather) is passed through: in the serving form every sequence is its own."""
    slot: list[int] = []
    for _ in range(_DEPTH):
        if value in inputs:
            return inputs[value], tuple(reversed(slot))
        op = value.owner
        if not isinstance(op, DataflowOp) or op.mnemonic not in _VIEWS:
            return None
        inner = op.operands[0]
        if op.mnemonic == "select":
            inner = next((v for v in op.operands[1:] if not _is_constant(v)), inner)
        elif op.mnemonic == "slice":
            axes, starts = op.attr("axes"), op.attr("starts")
            before, after = tensor_type(inner).shape, tensor_type(value).shape
            if len(axes) != 1 or starts is None or not before[axes[0]].is_const or after[axes[0]].value != 1:
                return None
            slot.append(starts[0].value)
        value = inner
    return None


def _is_constant(value: SSAValue) -> bool:
    return isinstance(value.owner, DataflowOp) and value.owner.mnemonic in ("constant", "expand", "fill")
