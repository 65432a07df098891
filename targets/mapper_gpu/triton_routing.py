"""Kernels of routing: tokens choose their experts, and the (token, choice) pairs are sorted by them.

Experts are columns, of which a tile's lanes hold all. A token's best are found by repeated maxima. The sort
is a counting sort in one program: each expert's pairs are counted, a running sum of whole blocks says where
each expert's begin, then the pairs go through once more, and a running count of each expert's earlier ones
says which row a pair takes. The meaning of the instructions is in expert_ops."""

from __future__ import annotations

from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.triton_code import Frame, Group, Json, address, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_experts import Mixture
from mapper_gpu.triton_names import Parameters
from mapper_gpu.triton_rows import row_width

ELEMENTS = 4096
"""Elements of a tile of tokens and experts: 32 registers of each of 128 threads."""
Context = dict[str, Any]


def choose(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """A run of tokens chooses its experts. Raises LoweringError where the kernel makes other rows, too."""
    (program,) = stage.programs
    work = Mixture(program, parameters, setting.batch)
    if len(program["writes"]) > 1:
        raise LoweringError("gpu: no Triton source for choices of experts beside other rows")
    total = setting.batch * setting.tokens
    height = -(-total // stage.tasks)
    made = _choice(work, power(height))
    return {
        "template": "choose.py.j2", **made, "height": height, "tokens": total, "counted": False,
        "what": f"{height} tokens each choose {made['chosen']} of {made['count']} experts",
        "warps": 4, "stages": 1,
    }  # fmt: skip


def route(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """The sort of all pairs, behind the choices of all tokens where they are made in the same kernel. Raises
    LoweringError where blocks and places are made apart."""
    (program,) = stage.programs
    work = Mixture(program, parameters, setting.batch)
    code = {i[0]: i for i in program["code"]}
    missing = {"align", "places"} - code.keys()
    if missing:
        raise LoweringError(f"gpu: no Triton source for a routing without {min(missing)!r}")
    _, blocks, routing, count, chosen, tile, most = code["align"]
    counted = "top_k" in code
    tokens = setting.batch * setting.tokens
    if counted:
        made = _choice(work, tokens)
    else:
        made = {"routing": parameters.name(work.operand_of(routing)), **_columns(count, 0), "chosen": chosen}
    width, pairs = made["columns"], tokens * chosen
    return {
        "template": "route.py.j2", **made, "counted": counted, "tokens": tokens, "tile": tile,
        "tile_lanes": power(tile), "most": most, "pairs": pairs,
        "sorted": parameters.name(_written(work, blocks)),
        "places": parameters.name(_written(work, code["places"][1])),
        "at_once": max(1, min(power(most), ELEMENTS // max(width, power(tile)))),
        "pairs_at_once": min(power(pairs), max(1, ELEMENTS // width)),
        "what": f"{pairs} choices of {count} experts sorted", "warps": 4, "stages": 1,
    }  # fmt: skip


def _columns(count: int, groups: int) -> Context:
    """How experts are columns: those of a group on a power of two of lanes."""
    each = count // max(1, groups)
    across, lanes = power(max(1, groups)), power(each)
    return {"count": count, "groups": groups, "each": each, "across": across, "lanes": lanes,
            "columns": across * lanes}  # fmt: skip


def _written(work: Mixture, register: str) -> Json:
    """The operand that a register is written to."""
    return next(
        work.operand(i[1], True) for i in work.program["code"] if i[0] == "write" and i[2] == register
    )


def _choice(work: Mixture, tokens: int) -> Context:
    """What the choice of `tokens` tokens needs, as many at a time as registers hold."""
    (_, out, logits, correction, chosen, scoring, groups, top_groups, group_score, fill, normalise, epsilon,
     scale) = next(i for i in work.program["code"] if i[0] == "top_k")  # fmt: skip
    routing = _written(work, out)
    columns = _columns(row_width(work, logits), groups)
    rows = max(1, min(power(tokens), ELEMENTS // columns["columns"]))
    group = Group("", "e[None, :]", "e_ok[None, :]")
    (x,) = work.value(logits, Frame("route", "m[:, None]", "m_ok[:, None]", (group,), rows))
    return {
        **columns, "rows": rows, "load_x": work.take(), "x": x,
        "correction": correction and work.load_of(correction, "0", group.index, group.mask),
        "chosen": chosen, "picks": power(chosen), "scoring": scoring, "top_groups": top_groups,
        "both": group_score == "top2" and columns["each"] > 1,
        "fill": 'float("-inf")' if fill is None else repr(float(fill)), "normalise": normalise,
        "epsilon": epsilon, "scale": scale, "routing": work.parameters.name(routing),
        "chosen_at": address(routing, "m[:, None]", "picks[None, :]"),
        "share_at": address(routing, "m[:, None]", f"({chosen} + picks[None, :])"),
    }  # fmt: skip
