"""What has Triton source: instructions, formats and places that the templates know; the rest is refused."""

from __future__ import annotations

from mapper.errors import LoweringError
from mapper_gpu.triton_code import ACTIVATIONS, POINTS, TYPES, Json

OPERANDS = {
    "read": 2, "embed": 3, "positions": 5, "norm": 8, "rope": 9, "point": 4, "gate": 4, "append": 5,
    "columns": 2, "matmul": 4, "sum": 2, "concat": 2, "attend": 13, "finish": 4, "merge": 4, "write": 2,
}  # fmt: skip
"""Instruction -> how many operands it has. One more or less means another thing than the templates emit."""
ROWS = ("m", "n", "all", "cache")
KEYS = {"value", "dtype", "rows", "width", "panel", "r", "c", "chip"}
COLUMNS = ("k", "n", "q", "all", "keys", "heads", "stats", "groups")


def refuse_unknown(program: Json) -> None:
    """Raises LoweringError that names what has no Triton source in a program, if anything."""
    for op, *operands in program["code"]:
        if OPERANDS.get(op) != len(operands):
            raise _refusal(
                program, f"{op!r}" if op not in OPERANDS else f"{op!r} of {len(operands)} operands"
            )
        if op == "matmul" and operands[3] not in TYPES:
            raise _refusal(program, f"products in {operands[3]}")
        if op == "gate" and operands[1] not in ACTIVATIONS:
            raise _refusal(program, f"the activation {operands[1]!r}")
        if op == "point" and not _known(operands[1]):
            raise _refusal(program, f"{operands[1]!r}")
    for operand in (*program["reads"], *program["writes"]):
        if odd := sorted(operand.keys() - KEYS):
            raise _refusal(program, f"an operand with {odd[0]!r}")
        if operand["dtype"] not in TYPES:
            raise _refusal(program, f"values stored as {operand['dtype']}")
        if operand["r"] not in ROWS or not (operand["c"] in COLUMNS or isinstance(operand["c"], list)):
            raise _refusal(program, f"an operand at rows {operand['r']!r}, columns {operand['c']!r}")


def _known(fn: str) -> bool:
    return fn in POINTS or (fn.startswith("act:") and fn[4:] in ACTIVATIONS)


def _refusal(program: Json, what: str) -> LoweringError:
    return LoweringError(f"gpu: no Triton source for {what} in a kernel of {program['kind']}")
