"""What has Triton source: instructions, formats and places that the templates know; the rest is refused."""

from __future__ import annotations

from mapper.errors import LoweringError
from mapper_gpu.triton_code import ACTIVATIONS, POINTS, TYPES, Json

OPERANDS: dict[str, tuple[int, ...]] = {
    "read": (2,), "embed": (3,), "positions": (5,), "norm": (8,), "rope": (9,), "point": (4,), "gate": (4,),
    "append": (5,), "columns": (2,), "matmul": (4,), "sum": (2,), "concat": (2,), "attend": (13, 14),
    "attend_latent": (14,), "finish": (4,), "merge": (4,), "write": (2,), "dequantise": (9,),
    "round_blocks": (3,), "top_k": (12,), "align": (6,), "places": (6,), "gather": (5,),
    "expert_matmul": (5,), "expert_bias": (4,), "expert_gate": (5,), "weighted_sum": (5,),
    "share_bias": (5,),
}  # fmt: skip
"""Instruction -> how many operands it has. One more or less means another thing than the templates emit."""
ROWS = ("m", "n", "all", "cache", "expert", "blocks")
KEYS = {"value", "dtype", "rows", "width", "panel", "r", "c", "chip"}
COLUMNS = ("k", "n", "q", "all", "keys", "heads", "stats", "groups")
CODES = {"int": (2, 4, 8), "e4m3": (8,), "e2m1": (4,)}
"""Kind of code -> its bits."""
FLOATS = ("f32", "bf16", "f16")
SCORINGS = ("softmax", "sigmoid", "topk_softmax", "none")


def refuse_unknown(program: Json) -> None:
    """Raises LoweringError that names what has no Triton source in a program, if anything."""
    for op, *operands in program["code"]:
        if len(operands) not in OPERANDS.get(op, ()):
            raise _refusal(
                program, f"{op!r}" if op not in OPERANDS else f"{op!r} of {len(operands)} operands"
            )
        if op in ("matmul", "expert_matmul") and operands[-1] not in TYPES:
            raise _refusal(program, f"products in {operands[-1]}")
        if op == "top_k" and operands[4] not in SCORINGS:
            raise _refusal(program, f"the scoring {operands[4]!r}")
        if op == "round_blocks" and operands[2] & (operands[2] - 1):
            raise _refusal(program, f"activations rounded in blocks of {operands[2]}")
        if op in ("gate", "expert_gate") and operands[1] not in ACTIVATIONS:
            raise _refusal(program, f"the activation {operands[1]!r}")
        if op == "point" and not _known(operands[1]):
            raise _refusal(program, f"{operands[1]!r}")
    parts = _parts(program)
    for number, operand in enumerate((*program["reads"], *program["writes"])):
        part = number in parts
        more = {"bits", "per"} if part else set()
        if operand["r"] == "expert":
            more.add("stack")
        if odd := sorted(operand.keys() - KEYS - more):
            raise _refusal(program, f"an operand with {odd[0]!r}")
        if operand["dtype"] not in TYPES and not (part and operand["dtype"] == "u8"):
            raise _refusal(program, f"values stored as {operand['dtype']}")
        if operand["r"] not in ROWS or not _columns(operand["c"]):
            raise _refusal(program, f"an operand at rows {operand['r']!r}, columns {operand['c']!r}")


def _parts(program: Json) -> set[int]:
    """The numbers of the operands that are parts of low-bit weights. Raises LoweringError where one is held
    otherwise than tiles decode."""
    number = {i[1]: i[2] for i in program["code"] if i[0] == "read"}
    found: set[int] = set()
    for op, *rest in program["code"]:
        if op != "dequantise":
            continue
        _, values, scales, zeros, kind, bits, block, scale, form = rest
        if bits not in CODES.get(kind, ()) or form not in FLOATS or scale not in (*FLOATS, "u8"):
            raise _refusal(program, f"codes of {bits} bits of {kind} with scales of {scale}")
        if block & (block - 1):
            # a turn of the loop takes whole blocks, or a part of one
            raise _refusal(program, f"blocks of {block} columns")
        found |= {number[r] for r in (values, scales, zeros) if r is not None}
    return found


def _columns(c: Json) -> bool:
    return c in COLUMNS or isinstance(c, list) or str(c).startswith("head:")


def _known(fn: str) -> bool:
    return fn in POINTS or (fn.startswith("act:") and fn[4:] in ACTIVATIONS)


def _refusal(program: Json, what: str) -> LoweringError:
    return LoweringError(f"gpu: no Triton source for {what} in a kernel of {program['kind']}")
