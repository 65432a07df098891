"""The kernel of routing: one task chooses every token's experts, and sorts the (token, choice) pairs by them.

A counting sort: experts are columns, of which a tile's lanes hold all. While tokens choose, each expert's
pairs are counted; a running sum of whole blocks says where each expert's begin; then the pairs go through
once more, and a running count of each expert's earlier ones says which row a pair takes. The meaning of the
instructions is in expert_ops."""

from __future__ import annotations

from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.triton_code import Frame, Group, address, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_experts import Mixture
from mapper_gpu.triton_names import Parameters

ELEMENTS = 4096
"""Elements of a tile of tokens and experts: 32 registers of each of 128 threads."""
Context = dict[str, Any]


def route(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """Routing of all tokens. Raises LoweringError where its parts are in several kernels."""
    (program,) = stage.programs
    work = Mixture(program, parameters, setting.batch)
    code = {i[0]: i for i in program["code"]}
    missing = {"top_k", "align", "places"} - code.keys()
    if missing:
        raise LoweringError(f"gpu: no Triton source for a routing without {min(missing)!r}")
    (_, out, logits, correction, chosen, scoring, groups, top_groups, group_score, fill, normalise, epsilon,
     scale) = code["top_k"]  # fmt: skip
    _, blocks, _, count, _, tile, most = code["align"]
    written = {i[2]: work.operand(i[1], True) for i in program["code"] if i[0] == "write"}
    routing, sorted_, places = (written[r] for r in (out, blocks, code["places"][1]))
    each = count // max(1, groups)
    across, lanes = power(max(1, groups)), power(each)
    rows = max(1, min(power(routing["rows"]), ELEMENTS // (across * lanes)))
    frame = Frame("route", "m[:, None]", "m_ok[:, None]",
                  (Group("", "e[None, :]", "e_ok[None, :]"),), rows)  # fmt: skip
    (x,) = work.value(logits, frame)
    load_x = work.take()
    names = {"routing": parameters.name(routing), "sorted": parameters.name(sorted_),
             "places": parameters.name(places)}  # fmt: skip
    return {
        "template": "route.py.j2", **names, "load_x": load_x, "x": x,
        "correction": correction and work.load_of(correction, "0", "e[None, :]", "e_ok[None, :]"),
        "tokens": routing["rows"], "rows": rows, "count": count, "chosen": chosen, "picks": power(chosen),
        "scoring": scoring, "groups": groups, "each": each, "across": across, "lanes": lanes,
        "columns": across * lanes, "top_groups": top_groups, "both": group_score == "top2" and each > 1,
        "fill": 'float("-inf")' if fill is None else repr(float(fill)), "normalise": normalise,
        "epsilon": epsilon, "scale": scale, "tile": tile, "tile_lanes": power(tile), "most": most,
        "at_once": max(1, min(power(most), ELEMENTS // max(across * lanes, power(tile)))),
        "pairs": routing["rows"] * chosen,
        "pairs_at_once": min(power(routing["rows"] * chosen), max(1, ELEMENTS // (across * lanes))),
        "chosen_at": address(routing, "m[:, None]", "picks[None, :]"),
        "share_at": address(routing, "m[:, None]", f"({chosen} + picks[None, :])"),
        "what": f"{routing['rows']} tokens choose {chosen} of {count} experts", "warps": 4, "stages": 1,
    }  # fmt: skip
