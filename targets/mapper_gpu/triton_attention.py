"""What the templates of attention need: tiles of queries over a stretch of the cache, and the exact merge."""

from __future__ import annotations

import math
from typing import Any

from mapper_gpu.flash import KEY_STEP
from mapper_gpu.triton_code import TYPES, Frame, Group, Json, Statements, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_frames import HeadShape, head_shape
from mapper_gpu.triton_names import Parameters

Context = dict[str, Any]
MERGED = 2048
"""Results that a warp of a merge holds: 64 registers of each of its threads."""
LEAST = 16
"""Query rows, and columns of a head, of a tensor core's product: fewer are padded."""


def shape_of(stage: Stage) -> Context:
    """The tile's numbers."""
    a, split = stage.record["attention"], stage.record["split"]
    group = a["heads"] // a["kv_heads"]
    return {
        "batch": a["batch"], "kv_heads": a["kv_heads"], "group": group, "dim": a["dim"],
        "value_dim": a["value_dim"], "tokens": a["tokens"], "window": a["window"], "each": split["tokens"],
        "splits": split["splits"], "keys": split["keys"], "down": math.ceil(a["tokens"] / split["tokens"]),
        "values": power(a["value_dim"]), "whole": power(a["value_dim"]) == a["value_dim"],
    }  # fmt: skip


def _query_groups(dim: int, heads: HeadShape | None) -> tuple[list[str], list[Group], list[str]]:
    """Statements that make `d*`, the places in a head of each group of columns; the groups; the `d*`."""
    parts = heads.parts if heads is not None else [("", "{e}", dim)]
    lines, groups, places = [], [], []
    for suffix, place, size in parts:
        lanes, e, d = max(LEAST, power(size)), f"e{suffix}", f"d{suffix}"
        mask = ""
        if place == "{e}":
            e = d
        lines.append(f"{e} = tl.arange(0, {lanes})")
        if e != d:
            lines.append(f"{d} = {place.format(e=e)}")
        if lanes != size:
            lines.append(f"d_ok{suffix} = {e} < {size}")
            mask = f"d_ok{suffix}[None, :]"
        index = f"(head[:, None] * {dim} + {d}[None, :])"
        groups.append(Group(suffix, index, mask, f"{e}[None, :]", 1, lanes))
        places.append(d)
    return lines, groups, places


def attention(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """Online softmax over a stretch of the cache, for the query heads that share a cache head."""
    program, shape = stage.programs[0], shape_of(stage)
    (_, out, stats, q, k, v, past, _, _, _, _, _, scale, softcap, *slopes) = next(
        i for i in program["code"] if i[0] == "attend"
    )
    work = Statements(program, parameters, setting.batch)
    rows = max(LEAST, power(shape["each"] * shape["group"]))
    place_lines, groups, places = _query_groups(shape["dim"], head_shape([program]))
    frame = Frame("q", "m[:, None]", "m_ok[:, None]", tuple(groups), rows)
    queries = work.value(q, frame)
    keys, values = (work.operand(work.made[r][2]) for r in (k, v))
    form = TYPES[keys["dtype"]]
    load_q = [*work.take(), *(f"{name} = {name}.to({form})" for name in queries)]
    if slopes:
        load_q.append(f"slope = {_per_head(work, slopes[0])}")
    block = min(KEY_STEP, power(shape["keys"]))
    length = keys["rows"] // setting.batch
    precision = ', input_precision="ieee"' if keys["dtype"] == "f32" else ""
    products = []
    for name, g, d in zip(queries, groups, places, strict=True):
        mask = "j_ok[None, :]" + (f" & d_ok{g.suffix}[:, None]" if g.mask else "")
        where = f"{parameters.name(keys)} + cached[None, :] * {shape['dim']} + {d}[:, None]"
        tile = f"tl.load({where}, mask={mask}, other=0.0)"
        products.append(f"tl.dot({name}, {tile}{precision})")
    return {
        "template": "attention.py.j2", **shape, "rows": rows, "places": place_lines, "load_q": load_q,
        "products": products, "block": block, "length": length, "scale": scale, "softcap": softcap,
        "slopes": bool(slopes), "latent": False,
        "past": work.past(past), "value_cache": parameters.name(values), "form": form, "precision": precision,
        "result": results(work, stage, setting, out, stats), "warps": 8 if rows >= 128 else 4, "stages": 2,
        "what": f"{shape['each']} tokens x {shape['keys']} rows of cache",
    }  # fmt: skip


def results(work: Statements, stage: Stage, setting: Setting, out: str, stats: str) -> list[str]:
    """The normalised result, or the unnormalised one with its maxima and sums."""
    shape = shape_of(stage)
    frame = Frame("v", "m[:, None]", "m_ok[:, None]", (_value_group(shape),), 0)
    finish = [i for i in work.program["code"] if i[0] == "finish"]
    writes = [work.operand(i[1], True) for i in work.program["code"] if i[0] == "write"]
    if finish:
        work.lines += _normalised(work, finish[0][4])
        work.put(writes[0], frame, frame.groups[0], "acc")
        return work.take()
    second = stage.programs[1]["writes"]
    for o, other, name in zip(writes, second, ("acc", "stats"), strict=True):
        offset = f" + split * {setting.stride(o['value'], other['value'])}"
        if name == "acc":
            work.put(o, frame, frame.groups[0], "acc", offset)
            continue
        for part, place in (("top", 0), ("total", shape["group"])):
            work.put(o, frame, Group("", _stats_index(shape, place)), f"{part}[:, None]", offset)
    return work.take()


def _value_group(shape: Context) -> Group:
    mask = "" if shape["whole"] else "v_ok[None, :]"
    return Group("", f"(head[:, None] * {shape['value_dim']} + v[None, :])", mask)


def _stats_index(shape: Context, place: int) -> str:
    """Columns of maxima, or sums, of the heads of a group: all maxima of a cache head, then its sums."""
    return f"(kv_head * {2 * shape['group']} + {place} + (head - kv_head * {shape['group']}))[:, None]"


def _normalised(work: Statements, sinks: str | None) -> list[str]:
    if sinks is None:
        return ["acc = acc / tl.where(m_ok, total, 1.0)[:, None]"]
    return [
        f"sink = {_per_head(work, sinks)}",
        "high = tl.maximum(top, sink)",
        "factor = tl.exp(top - high)",
        "acc = acc * factor[:, None] / (total * factor + tl.exp(sink - high))[:, None]",
    ]


def attention_merge(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """The exact log-sum-exp merge of all stretches of a tile."""
    (program,), shape = stage.programs, shape_of(stage)
    _, _, _, parts, stats = next(i for i in program["code"] if i[0] == "merge")
    work = Statements(program, parameters, setting.batch)
    rows = power(shape["each"] * shape["group"])
    frame = Frame("v", "m[:, None]", "m_ok[:, None]", (_value_group(shape),), rows)
    (value,) = frame.groups
    loads: dict[str, str] = {}
    for key, registers, column, mask in (
        ("part", parts, value.index, " & ".join(m for m in (frame.row_mask, value.mask) if m)),
        ("top", stats, _stats_index(shape, 0), frame.row_mask),
        ("total", stats, _stats_index(shape, shape["group"]), frame.row_mask),
    ):
        o, other = (work.operand(work.made[r][2]) for r in registers[:2])
        loads[key] = _part(parameters, o, setting.stride(o["value"], other["value"]), frame.row, column, mask)
    finish = next(i for i in program["code"] if i[0] == "finish")
    work.lines += _normalised(work, finish[4])
    written = next(work.operand(i[1], True) for i in program["code"] if i[0] == "write")
    work.put(written, frame, value, "acc")
    return {
        "template": "attention_merge.py.j2", **shape, "rows": rows, "loads": loads, "result": work.take(),
        "warps": max(4, min(16, rows * shape["values"] // MERGED)), "stages": 1,
        "what": f"merge of {shape['splits']} stretches",
    }  # fmt: skip


def _per_head(work: Statements, register: str) -> str:
    """The load of a number per query head, for the rows of the tile."""
    p = work.parameters.name(work.operand(work.made[register][2]))
    return f"tl.load({p} + head, mask=m_ok, other=0.0)"


def _part(parameters: Parameters, o: Json, stride: int, row: str, column: str, mask: str) -> str:
    from mapper_gpu.triton_code import load

    return load(f"{parameters.name(o)} + split * {stride}", o, row, column, mask)
