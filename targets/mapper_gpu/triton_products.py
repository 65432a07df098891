"""Products of a tile over a strip of K at a time: the strip, operands of weights, multiply and finish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mapper_gpu.hardware import Gpu, element_bytes
from mapper_gpu.product import STEP_BYTES
from mapper_gpu.triton_code import TYPES, WIDE, Group, Json, Statements, load, masked
from mapper_gpu.triton_code import join as both_masks
from mapper_gpu.triton_code import power as padded
from mapper_gpu.triton_frames import Columns, upright

VECTOR_ELEMENTS = 4096
"""Running products of a weight-streaming tile: 32 registers of each of 128 threads."""
TENSOR_ROWS = 64
"""Rows from which tokens take the long side of the tensor core's product (wgmma's M)."""
WARPS_ELEMENTS = 8192
"""Results of a tile from which two warp groups share it; a merge holds as many at a time."""
PIPELINE = 4
"""Stages of the pipeline that arithmetic asks for."""
LEAST_ROWS = 16
"""Rows of tokens that shared memory holds at least."""
CODE_BYTES = 64
"""Bytes of a row's codes that a turn takes: two sectors, where its registers allow."""
DECODED = 8192
"""Operands of low-bit weights that a turn makes: 64 registers of each of 128 threads."""


@dataclass(frozen=True)
class Strip:
    """What a turn of the loop takes of K: `block` columns from `k0` on, of the `length` that the task goes
    through; `splits` such parts are the whole K. `mask` says which columns exist ("": all)."""

    block: int
    length: int
    splits: int = 1

    @property
    def mask(self) -> str:
        """The mask of the columns `k`, as a row."""
        return "" if self.length % self.block == 0 else "k_ok[None, :]"

    @property
    def begin(self) -> str:
        """What stands before `k0` in a column of K."""
        return f"split * {self.length} + " if self.splits > 1 else ""


@dataclass(frozen=True)
class Turn:
    """What a turn of the loop brings in: `block` columns of K of `width` rows of weights, the format of
    products, and the bits of codes (0: weights are held in that format)."""

    width: int
    form: str
    block: int
    bits: int

    @property
    def operand(self) -> float:
        """Bytes of one row as operands."""
        return self.block * element_bytes(self.form)

    @property
    def staged(self) -> float:
        """Bytes of the weights as stored."""
        return self.width * (self.block * self.bits / 8 if self.bits else self.operand)


def tuning(engine: str, rows: int, turns: Sequence[Turn], tasks: int, chip: Gpu) -> dict[str, int]:
    """Warps, and the stages of the pipeline through shared memory: four, or as many as hold what an SM must
    have in flight to stream its share of HBM (Little's law); no more than fit. `turns` are of the kernel's
    lanes, of which a task has one."""
    warps = 8 if max(t.width for t in turns) * rows >= WARPS_ELEMENTS else 4
    if engine == "vector":
        return {"warps": warps, "stages": 1}
    flight = chip.stream * chip.hbm_latency / min(tasks, chip.sms)
    wanted = max(PIPELINE, 1 + math.ceil(flight / max(t.staged for t in turns)))
    # where the tensor core reads its operands through tensor memory, which came with fp4, Triton keeps the
    # buffers of all branches of a kernel at once
    held = [t.staged + t.operand * max(LEAST_ROWS, rows) for t in turns]
    each = sum(held) if "fp4" in chip.tensor else max(held)
    # operands that are made of codes pass through shared memory once more
    made = max(t.operand * t.width if t.bits else 0 for t in turns)
    return {"warps": warps, "stages": int(max(2, min(wanted, (chip.shared - made) // each)))}


@dataclass(frozen=True)
class Operand:
    """A weight tile [columns, K]: statements before the loop, those at the head of a turn, which are the same
    for all weights of their kind, those of each, and an expression."""

    before: list[str]
    shared: list[str]
    turn: list[str]
    value: str


def coded(work: Statements, weight: str) -> Json | None:
    """The instruction that makes a weight's operands of codes, if it is held in low bits."""
    made = work.made[weight]
    return made if made[0] == "dequantise" else None


def stored(work: Statements, weight: str) -> Json:
    """The operand with a weight's values: [n, k], or a stack of them."""
    made = work.made[weight]
    return work.operand(work.made[made[2]][2] if made[0] == "dequantise" else made[2])


def step(vector: bool, rows: int, extent: int, form: str, length: int, bits: int = 0) -> int:
    """Columns of K that a turn of the loop takes. Of codes of `bits` bits (0: whole elements) they are more,
    as few bytes would leave sectors half read."""
    if vector:
        return min(padded(length), max(32, padded(VECTOR_ELEMENTS // (rows * extent))))
    columns = int(STEP_BYTES / element_bytes(form))
    if bits:
        wanted = CODE_BYTES * 8 // bits
        while columns < wanted and 2 * columns * extent <= DECODED:
            columns *= 2
    return max(16, min(padded(length), columns))


def turns(operand: Operand, lines: list[str]) -> list[str]:
    """A weight's statements of a turn; `lines` are those of the turn so far."""
    return [*(s for s in operand.shared if s not in lines), *operand.turn]


def weight(work: Statements, register: str, g: Group, strip: Strip, extent: int, expert: str = "") -> Operand:
    """The operand of some columns and a strip. `expert` is the variable with the number of the expert whose
    weights are taken out of a stack ("": there is one)."""
    from mapper_gpu.triton_lowbit import decoded

    if coded(work, register) is not None:
        return decoded(work, register, g, strip, extent, expert)
    o = stored(work, register)
    before: list[str] = []
    p = pointer(work, o, o["rows"] * o["width"], expert, before)
    return Operand(before, [], [], _load(p, o, g, strip))


def pointer(work: Statements, o: Json, elements: int, expert: str, before: list[str]) -> str:
    """The expression of a weight's first element; of an expert's `elements` a variable, made in `before`."""
    p = work.parameters.name(o)
    if not expert:
        return p
    name = work.fresh(f"{p}_here")
    before.append(f"{name} = {p} + {expert}.to(tl.int64) * {elements}")
    return name


def _load(p: str, o: Json, g: Group, strip: Strip) -> str:
    n, mask = upright(g.index), both_masks(upright(g.mask), strip.mask)
    length = strip.length
    if strip.splits > 1 and o["panel"] == length:
        wide = n + (".to(tl.int64)" if o["rows"] * o["width"] >= WIDE else "")
        part = f"split * {o['rows'] * length} + {wide} * {length}"
        return f"tl.load({p} + {part} + (k0 + tl.arange(0, {strip.block}))[None, :]{masked(mask, '0.0')})"
    return load(p, {**o, "dtype": "f32"}, n, "k[None, :]", mask)


def rounded(lines: list[str], x: str, form: str, vector: bool) -> list[str]:
    """The x tile in the format that the product takes it in."""
    if form == "f32":
        return lines
    back = ".to(tl.float32)" if vector else ""
    return [*lines, f"{x} = {x}.to({TYPES[form]}){back}"]


def multiply(acc: str, x: str, w: str, form: str, vector: bool, rows: int) -> list[str]:
    """Add the product of an x tile and a weight tile to an accumulator."""
    if vector:
        w += "" if form == "f32" else ".to(tl.float32)"
        if rows == 1:
            return [f"{acc} += {x} * {w}"]
        return [f"w = {w}", f"{acc} += {x}[:, None, :] * w[None, :, :]"]
    precision = ', input_precision="ieee"' if form == "f32" else ""
    named = [] if w == "w" else [f"w = {w}"]
    if rows < TENSOR_ROWS:
        return [*named, f"{acc} = tl.dot(w, tl.trans({x}), {acc}{precision})"]
    return [*named, f"{acc} = tl.dot({x}, tl.trans(w), {acc}{precision})"]


def zeros(vector: bool, rows: int, g: Group, cols: Columns, block: int) -> str:
    """An accumulator's first value."""
    extent = cols.extents[cols.groups.index(g)]
    if vector:
        shape = f"[{extent}, {block}]" if rows == 1 else f"[{rows}, {extent}, {block}]"
    else:
        shape = f"[{extent}, {rows}]" if rows < TENSOR_ROWS else f"[{rows}, {extent}]"
    return f"tl.zeros({shape}, tl.float32)"


def finish(acc: str, vector: bool, rows: int) -> list[str]:
    """Statements that make [rows, columns] of an accumulator."""
    if vector:
        return [f"{acc} = tl.sum({acc}, 1)[None, :]" if rows == 1 else f"{acc} = tl.sum({acc}, 2)"]
    return [f"{acc} = tl.trans({acc})"] if rows < TENSOR_ROWS else []
