"""What the templates of kernels need, per kind of kernel: products, merges, attention, rows and heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mapper.errors import LoweringError
from mapper_gpu.product import Lane, lane_width
from mapper_gpu.triton_attention import attention, attention_merge
from mapper_gpu.triton_code import Frame, Group, Json, Statements, load, power
from mapper_gpu.triton_emit import Setting, Stage
from mapper_gpu.triton_experts import experts
from mapper_gpu.triton_frames import Columns, HeadShape, columns, head_shape
from mapper_gpu.triton_latent import latent_attention
from mapper_gpu.triton_names import Parameters
from mapper_gpu.triton_products import (
    WARPS_ELEMENTS,
    Strip,
    Turn,
    coded,
    finish,
    multiply,
    rounded,
    step,
    stored,
    tuning,
    turns,
    weight,
    zeros,
)
from mapper_gpu.triton_routing import choose, route
from mapper_gpu.triton_rows import by_heads, by_rows, rows_frame, statistics

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
    # a matrix per head: the tiles of one head after those of the other
    heads = record["weights"][0]["n"] // lanes[0].n if len(record["weights"]) == 1 else 1
    each = across[0]
    across = [a * heads for a in across]
    return {
        "splits": tile["splits"], "down": down, "band": min(tile["band"], down), "across": sum(across),
        "widths": widths, "totals": [lane.n for lane in lanes],
        "starts": [sum(across[:i]) for i in range(len(across))],
        "ends": [sum(across[: i + 1]) for i in range(len(across))], "heads": heads, "each": each,
    }  # fmt: skip


def _product(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    record, tile = stage.record, stage.record["tile"]
    tiles = _tiles(record)
    splits, count = tile["splits"], len(record["lanes"])
    vector = tile["engine"] == "vector"
    rows = power(min(tile["m"], tile["rows"]))
    exact = (tile["rows"] % tile["m"] == 0 and rows == tile["m"]) or rows == tile["rows"]
    heads = None if splits > 1 else head_shape(stage.programs)
    programs = [stage.programs[i * splits] for i in range(count)]
    lanes: list[Context] = []
    frame = rows_frame("x", (), rows, exact)
    first = Statements(programs[0], parameters, setting.batch)
    # where K is split, a task's own part of it is counted from zero
    length = _depth(first) // splits
    stats = statistics(first, frame)
    for i, program in enumerate(programs):
        mark = _mark(record, i)
        work = first if i == 0 else Statements(program, parameters, setting.batch, mark, stats=first.stats)
        if i:
            work.reserve(first)
        lane = _lane_heads(program, heads)
        first_column = _first_column(tiles, i)
        least = 1 if vector else 16
        runs = _runs(first_column, tiles["widths"][i], tiles["totals"][i], lane, rows, least, mark)
        runs = [_of_heads(cols, tiles) for cols in runs]
        lanes.append(_lane(work, stage, setting, tiles, runs, rows, exact, length, i))
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
    if tiles["heads"] > 1:
        return f"column % {tiles['each']} * {width}"
    return f"(column - {start}) * {width}" if start else f"column * {width}"


def _of_heads(cols: Columns, tiles: Context) -> Columns:
    """Columns of a head as those of all heads, where there is a matrix per head."""
    if tiles["heads"] == 1:
        return cols
    moved = [f"{g.index.removesuffix('[None, :]')} += column // {tiles['each']} * {tiles['totals'][0]}"
             for g in cols.groups]  # fmt: skip
    return replace(cols, lines=(*cols.lines, *moved))


def _inner(work: Statements, x: str, tiles: Context) -> str:
    """The columns of x that the columns `k` of a weight meet."""
    made = work.made[x]
    operand = work.operand(made[2]) if made[0] == "read" else {"c": ""}
    if tiles["heads"] == 1 or not str(operand["c"]).startswith("head:"):
        return "k[None, :]"
    return f"(column // {tiles['each']} * {operand['c'].split(':')[1]} + k[None, :])"


def _mark(record: Json, lane: int) -> str:
    """What marks a lane's variables, where its tiles are not of the first lane's shape (see Statements)."""
    lanes = [Lane(x["n"], x["mats"], x["grain"]) for x in record["lanes"]]
    shapes = [(lane_width(x, record["tile"]["n"]), x.mats) for x in lanes]
    return f"_l{lane}" if lane and len(set(shapes)) > 1 else ""


def _runs(
    first: str, width: int, total: int, heads: HeadShape | None, rows: int, least: int, mark: str
) -> list[Columns]:
    """The columns of a tile, in one run, or in two where the tile's results are many."""
    half, grain = width // 2, heads.head if heads else 1
    if rows * width < EPILOGUE_ELEMENTS or width % 2 or half % grain:
        return [columns(first, width, total, heads, least, mark)]
    return [columns(f"{first} + {i * half}" if i else first, half, total, heads, least, run + mark)
            for i, run in enumerate(("", "_2"))]  # fmt: skip


def _tuning(stage: Stage, lanes: list[Context], setting: Setting) -> Context:
    tile = stage.record["tile"]
    mats = [lane["mats"] for lane in stage.record["lanes"]]
    turns = [Turn(sum(lane["extents"]) * n, lane["form"], lane["block"], lane["bits"])
             for lane, n in zip(lanes, mats, strict=True)]  # fmt: skip
    return tuning(tile["engine"], min(tile["m"], tile["rows"]), turns, stage.tasks, setting.gpu)


def _lane_heads(program: Json, heads: HeadShape | None) -> HeadShape | None:
    return heads and head_shape([program])


def _depth(work: Statements) -> int:
    """Columns of a weight."""
    return int(stored(work, next(i[3] for i in work.program["code"] if i[0] == "matmul"))["width"])


def _lane(work: Statements, stage: Stage, setting: Setting, tiles: Context, runs: list[Columns], rows: int,
          exact: bool, length: int, number: int) -> Context:  # fmt: skip
    tile = stage.record["tile"]
    vector, splits = tile["engine"] == "vector", tile["splits"]
    products = [i for i in work.program["code"] if i[0] == "matmul"]
    form, codes = products[0][4], coded(work, products[0][3])
    bits = int(codes[6]) if codes else 0
    rounds = max((int(i[3]) for i in work.program["code"] if i[0] == "round_blocks"), default=1)
    block = step(vector, rows, sum(c.extent for c in runs) * len(products), form, length, bits)
    # activations that are rounded in blocks come in whole ones
    block = max(block, rounds)
    strip = Strip(block, length, splits)
    inner = rows_frame(
        "k", (Group("", _inner(work, products[0][2], tiles), strip.mask, "", 1, block),), rows, exact
    )
    x = work.value(products[0][2], inner)[0]
    load_x = work.take()
    frames = [rows_frame(f"n{i}", cols.groups, rows, exact) for i, cols in enumerate(runs)]
    accumulators: list[tuple[str, str]] = []
    before: list[str] = []
    for _, out, _, matrix, _ in products:
        for cols, frame in zip(runs, frames, strict=True):
            names = []
            for g, extent in zip(cols.groups, cols.extents, strict=True):
                name = work.fresh(f"acc{g.suffix}")
                names.append(name)
                w = weight(work, matrix, g, strip, extent)
                before += w.before
                work.lines += [*turns(w, work.lines), *multiply(name, x, w.value, form, vector, rows)]
                accumulators.append((name, zeros(vector, rows, g, cols, block)))
            work.bind(out, frame, names)
    body = work.take()
    after = [line for name, _ in accumulators for line in finish(name, vector, rows)]
    for frame in frames:
        if splits > 1:
            _partials(work, stage, setting, frame, number)
        else:
            work.store(frame)
    return {
        "columns": [*(line for c in runs for line in c.lines), *before],
        "extents": [e for c in runs for e in c.extents],
        "block": block, "k_mask": bool(strip.mask), "form": form, "bits": bits,
        "begin": strip.begin, "x": rounded(load_x, x, form, vector), "body": body,
        "zeros": [f"{name} = {zero}" for name, zero in accumulators], "after": after,
        "epilogue": work.take(),
    }  # fmt: skip


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
    wide = False
    for i, program in enumerate(stage.programs):
        width, heads = tiles["widths"][i], head_shape([program])
        sums = [i for i in program["code"] if i[0] == "sum"]
        piece = width
        while (
            rows * power(piece) * len(sums) > WARPS_ELEMENTS
            and piece % 2 == 0
            and not (heads and piece // 2 % heads.head)
        ):
            piece //= 2
        # a rotation holds its table's numbers beside the sums
        wide |= bool(heads and heads.rotary) and rows * power(piece) * len(sums) >= WARPS_ELEMENTS
        first = _first_column(tiles, i) + (" + n0" if piece < width else "")
        mark = _mark(record, i)
        cols = _of_heads(columns(first, piece, tiles["totals"][i], heads, mark=mark), tiles)
        work = Statements(program, parameters, setting.batch, mark)
        frame = rows_frame("n", cols.groups, rows, exact)
        loop: list[str] = []
        starts: list[str] = []
        for _, out, parts in sums:
            o, second = (work.operand(work.made[p][2]) for p in parts[:2])
            stride = setting.stride(o["value"], second["value"])
            names = []
            for g, extent in zip(cols.groups, cols.extents, strict=True):
                name = work.fresh(f"acc{g.suffix}")
                names.append(name)
                mask = " & ".join(m for m in (frame.row_mask, g.mask) if m)
                p = f"{parameters.name(o)} + split * {stride}"
                loop.append(f"{name} += {load(p, o, frame.row, g.index, mask)}")
                starts.append(f"{name} = tl.zeros([{rows}, {extent}], tl.float32)")
            work.bind(out, frame, names)
        work.store(frame)
        lanes.append({"columns": list(cols.lines), "zeros": starts, "loop": loop, "epilogue": work.take(),
                      "width": width, "piece": piece})  # fmt: skip
    return {
        "template": "merge.py.j2", **tiles, "rows": rows, "height": tile["m"], "total_rows": tile["rows"],
        "exact": exact, "lanes": lanes, "warps": 8 if wide else 4, "stages": 1,
        "what": f"sums of {tile['splits']} parts of K",
    }  # fmt: skip


def _rows(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    choice = any(i[0] == "top_k" for i in stage.programs[0]["code"])
    return (choose if choice else by_rows)(stage, parameters, setting)


def _attention(stage: Stage, parameters: Parameters, setting: Setting) -> Context:
    latent = any(i[0] == "attend_latent" for i in stage.programs[0]["code"])
    return (latent_attention if latent else attention)(stage, parameters, setting)


_WRITERS: Mapping[str, Callable[[Stage, Parameters, Setting], Context]] = {
    "product": _product, "product_merge": _product_merge, "attention": _attention,
    "attention_merge": attention_merge, "rows": _rows, "heads": by_heads,
    "route": route, "experts": experts,
}  # fmt: skip
