"""What the templates of rows and heads need, and the statistics of row norms, which products take too."""

from __future__ import annotations

from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.triton_code import Frame, Group, Statements, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_experts import Mixture
from mapper_gpu.triton_frames import columns, head_shape
from mapper_gpu.triton_names import Parameters

CHUNK = 1024
"""Columns of a row that are held at a time."""
ELEMENTS = 8192
"""Elements of rows that a pass over them holds: 64 registers of each of 128 threads."""
Context = dict[str, Any]


def rows_frame(name: str, groups: tuple[Group, ...], rows: int, exact: bool) -> Frame:
    """The rows `m`, masked unless all of them exist."""
    return Frame(name, "m[:, None]", "" if exact else "m_ok[:, None]", groups, rows)


def statistics(work: Statements, frame: Frame) -> list[str]:
    """Statements that leave each row norm's scale (and mean) in variables, by passes over whole rows."""
    found: list[str] = []
    norms = [i for i in work.program["code"] if i[0] == "norm" and not i[8]]
    for _, out, x, _, _, kind, eps, *_ in norms:
        width = row_width(work, x)
        block = min(CHUNK, power(width), ELEMENTS // frame.rows)
        mask = "" if width % block == 0 else "c_ok[None, :]"
        loop = [f"c = c0 + tl.arange(0, {block})", *([f"c_ok = c < {width}"] if mask else [])]
        scale, mean = work.fresh("scale"), work.fresh("mean") if kind == "layer" else ""
        for total, centred in ((mean, False), (scale, True)):
            if not total:
                continue
            inner = Frame(f"stat{out}{total}", frame.row, frame.row_mask, (Group("", "c[None, :]", mask),),
                          frame.rows)  # fmt: skip
            (v,) = work.value(x, inner)
            term = v
            if centred and mean:
                term = f"({v} - {mean})"
                term = f"tl.where({mask}, {term}, 0.0)" if mask else term
            body = work.take()
            body.append(f"{total} += tl.sum({f'{term} * {term}' if centred else v}, 1)[:, None]")
            found += [
                f"{total} = tl.zeros([{frame.rows}, 1], tl.float32)",
                f"for c0 in range(0, {width}, {block}):",
            ]
            found += [f"    {line}" for line in (*loop, *body)]
            found.append(f"{total} = 1.0 / tl.sqrt({total} / {width} + {eps!r})" if centred
                         else f"{total} = {total} / {width}")  # fmt: skip
        work.stats[out] = (mean, scale)
    return found


def row_width(work: Statements, register: str) -> int:
    """Columns of a register that is as wide as its operands."""
    op, *rest = work.made[register]
    if op == "read":
        return int(work.operand(rest[1])["width"])
    if op in ("embed", "positions"):
        return int(work.operand(work.made[rest[2] if op == "embed" else rest[1]][2])["width"])
    source = rest[2][0] if op in ("point", "gate") and isinstance(rest[2], list) else (
        rest[2] if op == "gate" else rest[1]
    )  # fmt: skip
    return row_width(work, source)


def by_rows(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """Row work alone: a run of rows per program. Raises LoweringError where results differ in width."""
    (program,) = stage.programs
    total = setting.batch * setting.tokens
    each = -(-total // stage.tasks)
    work = Mixture(program, parameters, setting.batch)
    extent = power(each)
    exact = total % extent == 0 and each == extent
    stats = statistics(work, rows_frame("x", (), extent, exact))
    width = max(o["width"] for o in program["writes"])
    shape = head_shape([program])
    chunk = min(CHUNK, power(width)) if shape is None else shape.head
    cols = columns("n0", chunk, width, shape)
    if any(o["width"] != width for o in program["writes"]):
        raise LoweringError("gpu: no Triton source for rows of several widths")
    work.store(rows_frame("n", cols.groups, extent, exact))
    # a token's experts are as many rows to load
    summed = any(i[0] == "weighted_sum" for i in program["code"])
    return {
        "template": "rows.py.j2", "each": each, "rows": extent, "total_rows": total, "exact": exact,
        "stats": stats, "columns": list(cols.lines), "width": width, "chunk": chunk, "body": work.take(),
        "what": f"{each} rows each", "warps": 8 if summed else 4, "stages": 1,
    }  # fmt: skip


def by_heads(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """Column work that appends to a cache: a sequence's head per program."""
    (program,) = stage.programs
    work = Statements(program, parameters, setting.batch)
    width = next(o["width"] for o in program["reads"] if o["c"] == "n")
    head = width * setting.batch // stage.tasks
    rows = min(16, power(setting.tokens))
    exact = setting.tokens % rows == 0
    cols = columns(f"head * {head}", head, width, head_shape([program]))
    work.store(rows_frame("n", cols.groups, rows, exact))
    return {
        "template": "heads.py.j2", "rows": rows, "tokens": setting.tokens, "exact": exact,
        "count": width // head, "columns": list(cols.lines), "body": work.take(),
        "what": "a sequence's head each", "warps": 4, "stages": 1,
    }  # fmt: skip
