"""What the template of attention needs for latent attention: all heads attend to the same cached rows.

Queries are in two parts, on rows in two parts, of which the first are the values, too: a tile of them is
loaded once, and is the second operand of both products (see extract_latent)."""

from __future__ import annotations

from typing import Any

from mapper_gpu.flash import ACCUMULATORS, KEY_STEP
from mapper_gpu.hardware import element_bytes
from mapper_gpu.triton_attention import LEAST, results, shape_of
from mapper_gpu.triton_code import TYPES, Frame, Group, Json, Statements, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_names import Parameters

LEAST_KEYS = 16
"""Cache rows of a tensor core's product."""
FEW_KEYS = 32
"""Cache rows of a turn where registers are scarce."""
HELD = 16384
"""Results of a tile from which two warp groups share it: 128 registers of each thread of one."""
Context = dict[str, Any]


def latent_attention(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """Online softmax over a stretch of the cache, for a part of the query heads, which all see the same rows;
    `kv_head` is then the part."""
    program, shape = stage.programs[0], shape_of(stage)
    (_, out, stats, q, latent, key, past, _, _, _, _, _, scale, softcap, rotated) = next(
        i for i in program["code"] if i[0] == "attend_latent"
    )
    work = Statements(program, parameters, setting.batch)
    rows = max(LEAST, power(shape["each"] * shape["group"]))
    rope = shape["dim"] - shape["value_dim"]
    lanes = max(LEAST, power(rope))
    whole = Group("", f"(head[:, None] * {shape['value_dim']} + v[None, :])",
                  "" if shape["whole"] else "v_ok[None, :]")  # fmt: skip
    turned = Group("", f"(head[:, None] * {rope} + d[None, :])", "" if lanes == rope else "d_ok[None, :]")
    frames = [Frame(name, "m[:, None]", "m_ok[:, None]", (g,), rows)
              for name, g in (("q", whole), ("rotated", turned))]  # fmt: skip
    names = [work.value(r, frame)[0] for r, frame in zip((q, rotated), frames, strict=True)]
    values, keys = (work.operand(work.made[r][2]) for r in (latent, key))
    form = TYPES[values["dtype"]]
    precision = ', input_precision="ieee"' if values["dtype"] == "f32" else ""
    mask = "j_ok[None, :]" + ("" if lanes == rope else " & d_ok[:, None]")
    tile = f"tl.load({parameters.name(keys)} + cached[None, :] * {rope} + d[:, None], mask={mask}, other=0.0)"
    return {
        "template": "attention.py.j2", **shape, "rows": rows,
        "places": [f"d = tl.arange(0, {lanes})", *([] if lanes == rope else [f"d_ok = d < {rope}"])],
        "load_q": [*work.take(), *(f"{name} = {name}.to({form})" for name in names)],
        "products": [f"tl.dot({names[0]}, tl.trans(values){precision})",
                     f"tl.dot({names[1]}, {tile}{precision})"],
        **_pipeline(shape, rows, values, setting), "length": values["rows"] // setting.batch,
        "scale": scale, "softcap": softcap, "slopes": False, "latent": True, "past": work.past(past),
        "value_cache": parameters.name(values), "form": form, "precision": precision,
        "result": results(work, stage, setting, out, stats),
        "warps": 8 if rows * shape["values"] >= HELD else 4,
        "what": f"{shape['each']} tokens x {shape['keys']} latent rows of cache",
    }  # fmt: skip


def _pipeline(shape: Context, rows: int, cached: Json, setting: Setting) -> Context:
    """Cache rows of a turn and stages of the pipeline: three, or two, that fit an SM beside the queries.
    Where results fill half of the registers, few are left for the addresses of a turn's loads."""
    block = min(KEY_STEP, power(shape["keys"]))
    if rows * shape["values"] >= ACCUMULATORS:
        block = min(block, FEW_KEYS)
    wide = (shape["values"] + power(shape["dim"] - shape["value_dim"])) * element_bytes(cached["dtype"])
    while block > LEAST_KEYS and (2 * block + rows) * wide > setting.gpu.shared:
        block //= 2
    return {"block": block, "stages": 3 if (3 * block + rows) * wide <= setting.gpu.shared else 2}
