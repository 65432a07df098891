"""What the templates of kernels need, per kind of kernel: products, merges, attention, rows and heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.hardware import element_bytes
from mapper_gpu.product import STEP_BYTES, Lane, lane_width
from mapper_gpu.triton_attention import attention, attention_merge
from mapper_gpu.triton_code import TYPES, Frame, Group, Json, Parameters, Statements, load, masked, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_frames import Columns, HeadShape, columns, head_shape, upright

VECTOR_ELEMENTS = 4096
"""Running products of a weight-streaming tile: 32 registers of each of 128 threads."""
WARPS_ELEMENTS = 8192
"""Results of a tile from which two warp groups share it; a merge holds as many at a time."""
CHUNK = 1024
"""Columns of a row that are held at a time."""
TENSOR_ROWS = 64
"""Rows from which tokens take the long side of the tensor core's product (wgmma's M)."""
PIPELINE = 4
"""Stages of the pipeline that arithmetic asks for."""
LEAST_ROWS = 16
"""Rows of tokens that shared memory holds at least."""
EPILOGUE_ELEMENTS = 32768
"""Results of a tile from which its epilogue goes in two runs of columns: the accumulators are then half of
the registers, and what the epilogue loads beside all of them at once would spill."""
Context = dict[str, Any]


def write(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    """A kernel's context: `template`, `name`, `grid`, `params`, and what the template reads."""
    writer = _WRITERS.get(stage.kind)
    if setting.chips > 1:
        raise LoweringError(f"gpu: Triton source is for one chip, and this schedule has {setting.chips}")
    if writer is None:
        raise LoweringError(f"gpu: no Triton source for a kernel of {stage.kind}")
    found = writer(stage, parameters, setting)
    tasks = f"{stage.tasks} programs"
    return {
        "name": stage.name, "title": f"{stage.record['name']}: {found['what']}, {tasks}",
        "grid": stage.tasks, "params": list(parameters.known.values()), **found,
    }  # fmt: skip


# products ----------------------------------------------------------------------------------------


def _tiles(record: Json) -> Context:
    """How tiles are numbered: down a band of row tiles, then to the next column tile, lane by lane."""
    tile = record["tile"]
    lanes = [Lane(lane["n"], lane["mats"], lane["grain"]) for lane in record["lanes"]]
    widths = [lane_width(lane, tile["n"]) for lane in lanes]
    across = [math.ceil(lane.n / width) for lane, width in zip(lanes, widths, strict=True)]
    down = math.ceil(tile["rows"] / tile["m"])
    return {
        "splits": tile["splits"], "down": down, "band": min(tile["band"], down), "across": sum(across),
        "widths": widths, "totals": [lane.n for lane in lanes],
        "starts": [sum(across[:i]) for i in range(len(across))],
        "ends": [sum(across[: i + 1]) for i in range(len(across))],
    }  # fmt: skip


def _rows_frame(name: str, groups: tuple[Group, ...], rows: int, exact: bool) -> Frame:
    return Frame(name, "m[:, None]", "" if exact else "m_ok[:, None]", groups, rows)


def _product(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    record, tile = stage.record, stage.record["tile"]
    tiles = _tiles(record)
    splits, count = tile["splits"], len(record["lanes"])
    vector = tile["engine"] == "vector"
    rows = power(min(tile["m"], tile["rows"]))
    exact = (tile["rows"] % tile["m"] == 0 and rows == tile["m"]) or rows == tile["rows"]
    heads = None if splits > 1 else head_shape(stage.programs)
    programs = [stage.programs[i * splits] for i in range(count)]
    k = _depth(programs[0])
    # where K is split, a task's own part of it is counted from zero
    length = k // splits
    lanes: list[Context] = []
    frame = _rows_frame("x", (), rows, exact)
    first = Statements(programs[0], parameters, setting.batch)
    stats = statistics(first, frame)
    for i, program in enumerate(programs):
        work = first if i == 0 else Statements(program, parameters, setting.batch, stats=first.stats)
        if i:
            work.reserve(first)
        lane = _lane_heads(program, heads)
        first_column = _first_column(tiles, i)
        runs = _runs(first_column, tiles["widths"][i], tiles["totals"][i], lane, rows, 1 if vector else 16)
        lanes.append(_lane(work, stage, setting, runs, rows, exact, length, i))
    return {
        "template": "product.py.j2", **tiles, "rows": rows, "height": tile["m"], "total_rows": tile["rows"],
        "exact": exact, "stats": stats, "lanes": lanes, "length": length,
        "what": f"tile {tile['m']}x{tile['n']} on {tile['engine']}"
        + (f", K in {splits}" if splits > 1 else ""),
        **_tuning(stage, lanes, setting),
    }  # fmt: skip


def _first_column(tiles: Context, lane: int) -> str:
    """The expression of the first column of a lane's tile."""
    start, width = tiles["starts"][lane], tiles["widths"][lane]
    return f"(column - {start}) * {width}" if start else f"column * {width}"


def _runs(
    first: str, width: int, total: int, heads: HeadShape | None, rows: int, least: int
) -> list[Columns]:
    """The columns of a tile, in one run, or in two where the tile's results are many."""
    half, grain = width // 2, heads.head if heads else 1
    if rows * width < EPILOGUE_ELEMENTS or width % 2 or half % grain:
        return [columns(first, width, total, heads, least)]
    return [columns(f"{first} + {i * half}" if i else first, half, total, heads, least, mark)
            for i, mark in enumerate(("", "_2"))]  # fmt: skip


def _tuning(stage: Stage, lanes: list[Context], setting: Setting) -> Context:
    """Warps, and the stages of the pipeline through shared memory: four, or as many as hold what an SM must
    have in flight to stream its share of HBM (Little's law); no more than fit."""
    tile, chip = stage.record["tile"], setting.gpu
    widths = [sum(lane["extents"]) * b["mats"] for lane, b in zip(lanes, stage.record["lanes"], strict=True)]
    rows = min(tile["m"], tile["rows"])
    warps = 8 if max(widths) * rows >= WARPS_ELEMENTS else 4
    if tile["engine"] == "vector":
        return {"warps": warps, "stages": 1}
    flight = chip.stream * chip.hbm_latency / min(stage.tasks, chip.sms)
    wanted = max(PIPELINE, 1 + math.ceil(flight / (STEP_BYTES * max(widths))))
    # where the tensor core reads its operands through tensor memory, which came with fp4, Triton keeps the
    # buffers of all branches of a kernel at once
    held = [STEP_BYTES * (width + max(LEAST_ROWS, rows)) for width in widths]
    each = sum(held) if "fp4" in chip.tensor else max(held)
    return {"warps": warps, "stages": int(max(2, min(wanted, chip.shared // each)))}


def _lane_heads(program: Json, heads: HeadShape | None) -> HeadShape | None:
    return heads and head_shape([program])


def _depth(program: Json) -> int:
    weight = next(i[3] for i in program["code"] if i[0] == "matmul")
    number = next(i[2] for i in program["code"] if i[0] == "read" and i[1] == weight)
    return int(program["reads"][number]["width"])


def statistics(work: Statements, frame: Frame) -> list[str]:
    """Statements that leave each row norm's scale (and mean) in variables, by passes over whole rows."""
    found: list[str] = []
    norms = [i for i in work.program["code"] if i[0] == "norm" and not i[8]]
    for _, out, x, _, _, kind, eps, *_ in norms:
        width = _row_width(work, x)
        block = min(CHUNK, power(width))
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


def _row_width(work: Statements, register: str) -> int:
    """Columns of a register that is as wide as its operands."""
    op, *rest = work.made[register]
    if op == "read":
        return int(work.operand(rest[1])["width"])
    if op in ("embed", "positions"):
        return int(work.operand(work.made[rest[2] if op == "embed" else rest[1]][2])["width"])
    source = rest[2][0] if op in ("point", "gate") and isinstance(rest[2], list) else (
        rest[2] if op == "gate" else rest[1]
    )  # fmt: skip
    return _row_width(work, source)


def _lane(work: Statements, stage: Stage, setting: Setting, runs: list[Columns], rows: int, exact: bool,
          length: int, number: int) -> Context:  # fmt: skip
    tile = stage.record["tile"]
    vector, splits = tile["engine"] == "vector", tile["splits"]
    products = [i for i in work.program["code"] if i[0] == "matmul"]
    form = products[0][4]
    block = _step(vector, rows, sum(c.extent for c in runs) * len(products), form, length)
    mask = "" if length % block == 0 else "k_ok[None, :]"
    begin = f"split * {length} + " if splits > 1 else ""
    inner = _rows_frame("k", (Group("", "k[None, :]", mask),), rows, exact)
    x = work.value(products[0][2], inner)[0]
    load_x = work.take()
    frames = [_rows_frame(f"n{i}", cols.groups, rows, exact) for i, cols in enumerate(runs)]
    accumulators: list[tuple[str, str]] = []
    for _, out, _, weight, _ in products:
        o = work.operand(work.made[weight][2])
        for cols, frame in zip(runs, frames, strict=True):
            names = []
            for g in cols.groups:
                name = work.fresh(f"acc{g.suffix}")
                names.append(name)
                w = _weight(work.parameters.name(o), o, g, mask, length, splits)
                work.lines += _multiply(name, x, w, form, vector, rows)
                accumulators.append((name, _zeros(vector, rows, g, cols, block)))
            work.bind(out, frame, names)
    body = work.take()
    after = [_finish(name, vector, rows) for name, _ in accumulators if vector or rows < TENSOR_ROWS]
    for frame in frames:
        if splits > 1:
            _partials(work, stage, setting, frame, number)
        else:
            work.store(frame)
    return {
        "columns": [line for c in runs for line in c.lines], "extents": [e for c in runs for e in c.extents],
        "block": block, "k_mask": bool(mask),
        "begin": begin, "x": _rounded(load_x, x, form, vector), "body": body,
        "zeros": [f"{name} = {zero}" for name, zero in accumulators], "after": after,
        "epilogue": work.take(),
    }  # fmt: skip


def _rounded(lines: list[str], x: str, form: str, vector: bool) -> list[str]:
    """The x tile in the format that the product takes it in."""
    if form == "f32":
        return lines
    back = ".to(tl.float32)" if vector else ""
    return [*lines, f"{x} = {x}.to({TYPES[form]}){back}"]


def _step(vector: bool, rows: int, extent: int, form: str, length: int) -> int:
    """Columns of K that a turn of the loop takes."""
    if not vector:
        return max(16, min(power(length), int(STEP_BYTES / element_bytes(form))))
    return min(power(length), max(32, power(VECTOR_ELEMENTS // (rows * extent))))


def _weight(p: str, o: Json, g: Group, mask: str, length: int, splits: int) -> str:
    """The load of a weight tile [columns, K]."""
    n, n_mask = upright(g.index), upright(g.mask)
    both = " & ".join(m for m in (n_mask, mask) if m)
    if splits > 1 and o["panel"] == length:
        wide = n + (".to(tl.int64)" if o["rows"] * o["width"] >= 1 << 31 else "")
        part = f"split * {o['rows'] * length} + {wide} * {length} + (k0 + tl.arange(0, BLOCK_K))[None, :]"
        return f"tl.load({p} + {part}{masked(both, '0.0')})"
    return load(p, {**o, "dtype": "f32"}, n, "k[None, :]", both)


def _multiply(acc: str, x: str, w: str, form: str, vector: bool, rows: int) -> list[str]:
    if vector:
        w += "" if form == "f32" else ".to(tl.float32)"
        if rows == 1:
            return [f"{acc} += {x} * {w}"]
        return [f"w = {w}", f"{acc} += {x}[:, None, :] * w[None, :, :]"]
    precision = ', input_precision="ieee"' if form == "f32" else ""
    if rows < TENSOR_ROWS:
        return [f"w = {w}", f"{acc} = tl.dot(w, tl.trans({x}), {acc}{precision})"]
    return [f"w = {w}", f"{acc} = tl.dot({x}, tl.trans(w), {acc}{precision})"]


def _zeros(vector: bool, rows: int, g: Group, cols: Columns, block: int) -> str:
    extent = cols.extents[cols.groups.index(g)]
    if vector:
        shape = f"[{extent}, {block}]" if rows == 1 else f"[{rows}, {extent}, {block}]"
    else:
        shape = f"[{extent}, {rows}]" if rows < TENSOR_ROWS else f"[{rows}, {extent}]"
    return f"tl.zeros({shape}, tl.float32)"


def _finish(acc: str, vector: bool, rows: int) -> str:
    if not vector:
        return f"{acc} = tl.trans({acc})"
    return f"{acc} = tl.sum({acc}, 1)[None, :]" if rows == 1 else f"{acc} = tl.sum({acc}, 2)"


def _partials(work: Statements, stage: Stage, setting: Setting, frame: Frame, lane: int) -> None:
    """Store the sums of this task's part of K; the parts follow each other at equal distances."""
    splits = stage.record["tile"]["splits"]
    second = stage.programs[lane * splits + 1]
    for op, *rest in work.program["code"]:
        if op != "write":
            continue
        o = work.operand(rest[0], True)
        stride = setting.stride(o["value"], second["writes"][rest[0]]["value"])
        for g, v in zip(frame.groups, work.value(rest[1], frame), strict=True):
            work.put(o, frame, g, v, f" + split * {stride}")


def _product_merge(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    record, tile = stage.record, stage.record["tile"]
    tiles = _tiles(record)
    rows = power(min(tile["m"], tile["rows"]))
    exact = (tile["rows"] % tile["m"] == 0 and rows == tile["m"]) or rows == tile["rows"]
    lanes: list[Context] = []
    for i, program in enumerate(stage.programs):
        width, heads = tiles["widths"][i], head_shape([program])
        piece = width
        while (
            rows * power(piece) > WARPS_ELEMENTS
            and piece % 2 == 0
            and not (heads and piece // 2 % heads.head)
        ):
            piece //= 2
        first = _first_column(tiles, i) + (" + n0" if piece < width else "")
        cols = columns(first, piece, tiles["totals"][i], heads)
        work = Statements(program, parameters, setting.batch)
        frame = _rows_frame("n", cols.groups, rows, exact)
        loop: list[str] = []
        zeros: list[str] = []
        for _, out, parts in (i for i in program["code"] if i[0] == "sum"):
            o, second = (work.operand(work.made[p][2]) for p in parts[:2])
            stride = setting.stride(o["value"], second["value"])
            names = []
            for g, extent in zip(cols.groups, cols.extents, strict=True):
                name = work.fresh(f"acc{g.suffix}")
                names.append(name)
                mask = " & ".join(m for m in (frame.row_mask, g.mask) if m)
                p = f"{parameters.name(o)} + split * {stride}"
                loop.append(f"{name} += {load(p, o, frame.row, g.index, mask)}")
                zeros.append(f"{name} = tl.zeros([{rows}, {extent}], tl.float32)")
            work.bind(out, frame, names)
        work.store(frame)
        lanes.append({"columns": list(cols.lines), "zeros": zeros, "loop": loop, "epilogue": work.take(),
                      "width": width, "piece": piece})  # fmt: skip
    return {
        "template": "merge.py.j2", **tiles, "rows": rows, "height": tile["m"], "total_rows": tile["rows"],
        "exact": exact, "lanes": lanes, "warps": 4, "stages": 1,
        "what": f"sums of {tile['splits']} parts of K",
    }  # fmt: skip


# rows and heads ----------------------------------------------------------------------------------


def _rows(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    (program,) = stage.programs
    total = setting.batch * setting.tokens
    each = -(-total // stage.tasks)
    work = Statements(program, parameters, setting.batch)
    extent = power(each)
    exact = total % extent == 0 and each == extent
    stats = statistics(work, _rows_frame("x", (), extent, exact))
    width = max(o["width"] for o in program["writes"])
    heads = head_shape([program])
    chunk = min(CHUNK, power(width)) if heads is None else heads.head
    cols = columns("n0", chunk, width, heads)
    if any(o["width"] != width for o in program["writes"]):
        raise LoweringError("gpu: no Triton source for rows of several widths")
    work.store(_rows_frame("n", cols.groups, extent, exact))
    return {
        "template": "rows.py.j2", "each": each, "rows": extent, "total_rows": total, "exact": exact,
        "stats": stats, "columns": list(cols.lines), "width": width, "chunk": chunk, "body": work.take(),
        "what": f"{each} rows each", "warps": 4, "stages": 1,
    }  # fmt: skip


def _heads(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    (program,) = stage.programs
    work = Statements(program, parameters, setting.batch)
    width = next(o["width"] for o in program["reads"] if o["c"] == "n")
    head = width * setting.batch // stage.tasks
    rows = min(16, power(setting.tokens))
    exact = setting.tokens % rows == 0
    cols = columns(f"head * {head}", head, width, head_shape([program]))
    work.store(_rows_frame("n", cols.groups, rows, exact))
    return {
        "template": "heads.py.j2", "rows": rows, "tokens": setting.tokens, "exact": exact,
        "count": width // head, "columns": list(cols.lines), "body": work.take(),
        "what": "a sequence's head each", "warps": 4, "stages": 1,
    }  # fmt: skip


_WRITERS: Mapping[str, Callable[[Stage, Parameters, Setting], Context]] = {
    "product": _product, "product_merge": _product_merge, "attention": attention,
    "attention_merge": attention_merge, "rows": _rows, "heads": _heads,
}  # fmt: skip
