"""Low-bit weights in a tile's registers: codes are loaded once, as bytes, and become operands of the product.

The meaning of `dequantise` is in lowbit_ops, layouts in packed. A code takes about four instructions: masks
and shifts that put it into the mantissa, or the exponent and mantissa, of a float (no conversion of integers,
which run at a fraction of the rate), one addition that takes off the zero point, one product with the scale,
and half of a conversion to the 16-bit format:

    int     bits of 2^23 + code (code < 2^23), less 2^23 + zero: exact
    e4m3    as f16: the exponent field is 8 too low, so the scale takes 2^8; numbers below the normal ones
            are such in f16 too
    e2m1    as f16, likewise with 2^14

A scale is loaded once per row and block, and spread over the block's columns by a reshape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mapper_gpu.triton_code import TYPES, Group, Json, Statements, address, join, masked
from mapper_gpu.triton_frames import upright
from mapper_gpu.triton_products import Operand, Strip, pointer

MAGIC = 0x4B000000
"""The bits of 2^23 as float32."""
LIFTED = {"e4m3": 8, "e2m1": 14}
"""Kind -> by how much f16's bias lowers the exponent."""


@dataclass(frozen=True)
class _Part:
    """A stored part of a weight: its pointer; its layout, in bytes where elements are packed; the columns of
    K that one element, or one byte of codes, stands for (0: all of a row's); numbers that a byte holds, and
    their bits; whether it is the codes."""

    pointer: str
    layout: Json
    per: int
    packed: int
    bits: int
    codes: bool

    @property
    def index(self) -> str:
        """The variable with the elements of a turn, counted from the beginning of the task's part of K."""
        return "byte" if self.codes else "group"

    def indices(self, strip: Strip) -> str:
        """The statement that makes them."""
        count = max(1, strip.block // self.per)
        first = f"k0 // {self.per}" if self.per > 1 else "k0"
        return f"{self.index} = {first}" + (f" + tl.arange(0, {count})[None, :]" if count > 1 else "")

    def load(self, g: Group, strip: Strip) -> str:
        """The expression of the turn's elements [columns, elements]; packed numbers are taken apart."""
        o, n, mask = self.layout, upright(g.index), upright(g.mask)
        if not self.per:
            return f"tl.load({self.pointer} + {address(o, n, '0')}{masked(mask, '0')})"
        at, length, base = self.index, -(-strip.length // self.per), ""
        if strip.mask and strip.block > self.per:
            mask = join(mask, f"({at} < {length})")
        if strip.splits > 1 and o["panel"] * self.packed == length:
            base, o = f"split * {o['rows'] * o['panel']} + ", {**o, "width": o["panel"]}
        elif strip.splits > 1:
            at = f"(split * {length} + {at})"
        byte = f"{at} // {self.packed}" if self.packed > 1 else at
        made = f"tl.load({self.pointer} + {base}{address(o, n, byte)}{masked(mask, '0')})"
        if self.packed == 1:
            return made
        return f"({made} >> {at} % {self.packed} * {self.bits} & {(1 << self.bits) - 1})"


def decoded(work: Statements, register: str, g: Group, strip: Strip, extent: int, expert: str) -> Operand:
    """Statements that leave the operands [columns, K] of a weight in `w` (see triton_products.weight)."""
    _, _, values, scales, zeros, kind, bits, block, scale, form = work.made[register]
    before: list[str] = []
    part = _part(work, values, 8 // bits, True, before, expert)
    shared, turn = [part.indices(strip)], _codes(part, g, strip, bits)
    if block:
        shared.append(_part(work, scales, block, False, [], "").indices(strip))
    spread = 0 < block < strip.block
    across = "[:, :, None]" if spread else ""

    def row(register: str, name: str, text: str) -> str:
        """A variable [columns, blocks], of numbers per row before the loop; `text` is made of the load."""
        part = _part(work, register, block, False, before, expert)
        # of one name and two shapes Triton would make one variable behind the lanes of a kernel
        made = name if block else work.fresh(f"{name}{extent}_")
        (turn if block else before).append(f"{made} = {text.format(part.load(g, strip))}")
        return made + across

    turn.append(f"w = {_number(kind)}")
    w = f"tl.reshape(w, [{extent}, {strip.block // block}, {block}])" if spread else "w"
    if kind == "int":
        w = f"({w} - {_middle(work, zeros, bits, row)})"
    turn.append(f"w = {w} * {row(scales, 'step', _scale(scale, LIFTED.get(kind, 0)))}")
    if spread:
        turn.append(f"w = tl.reshape(w, [{extent}, {strip.block}])")
    if strip.mask:
        # a block may end behind the last column, and has a zero point there
        turn.append(f"w = tl.where({strip.mask}, w, 0.0)")
    return Operand(before, shared, [*turn, *([] if form == "f32" else [f"w = w.to({TYPES[form]})"])], "w")


def _middle(work: Statements, zeros: str | None, bits: int, row: Callable[[str, str, str], str]) -> str:
    """The expression of what is taken off 2^23 + code: 2^23 and the zero point, in one where that is a whole
    number."""
    if zeros is None:
        return str(float((1 << 23) + (1 << (bits - 1))))
    if work.operand(work.made[zeros][2])["dtype"] == "u8":
        return row(zeros, "centre", _LIFTED_INTEGER)
    return f"{float(1 << 23)} - {row(zeros, 'centre', '{0}.to(tl.float32)')}"


_LIFTED_INTEGER = f"({{0}}.to(tl.int32) | {MAGIC:#x}).to(tl.float32, bitcast=True)"


def _number(kind: str) -> str:
    """The expression of float32 numbers that have `codes` in their bits."""
    if kind == "int":
        return _LIFTED_INTEGER.format("codes")
    bits = "codes.to(tl.uint16)"
    exponents = (8, 7, 9) if kind == "e2m1" else (128, 127, 7)
    sign, rest, up = exponents
    lifted = f"(({bits} & {sign}) << {12 if kind == 'e2m1' else 8} | ({bits} & {rest}) << {up})"
    lifted += ".to(tl.float16, bitcast=True).to(tl.float32)"
    return lifted if kind == "e2m1" else f'tl.where((codes & 127) == 127, float("nan"), {lifted})'


def _scale(stored: str, lifted: int) -> str:
    """The expression of a scale in float32, of the stored {0}."""
    number = "{0}" if stored == "f32" else "{0}.to(tl.float32)"
    if stored == "u8":
        # E8M0 is a float's exponent field; of 0, which is 2^-127, nothing is left
        number = "({0}.to(tl.int32) << 23).to(tl.float32, bitcast=True)"
    return f"{number} * {float(1 << lifted)}" if lifted else number


def _part(work: Statements, register: str, per: int, codes: bool, before: list[str], expert: str) -> _Part:
    """A part by its register: the codes as bytes, which are taken apart once loaded, or numbers per block."""
    o = work.operand(work.made[register][2])
    bits = int(o.get("bits", 0))
    packed = 8 // bits if bits else 1
    panel = -(-o["panel"] // packed)
    layout = {**o, "panel": panel, "width": o["width"] // o["panel"] * panel}
    p = pointer(work, o, o["rows"] * layout["width"], expert, before)
    return _Part(p, layout, per, 1 if codes else packed, bits, codes)


def _codes(part: _Part, g: Group, strip: Strip, bits: int) -> list[str]:
    """Statements that make `codes` [columns, K], a byte each."""
    loaded, low = f"codes = {part.load(g, strip)}", (1 << bits) - 1
    pieces = [f"codes >> {i} & {low}" if i else f"codes & {low}" for i in range(0, 8, bits)]
    while len(pieces) > 1:
        half = len(pieces) // 2
        pieces = [f"tl.interleave({a}, {b})" for a, b in zip(pieces[:half], pieces[half:], strict=True)]
    return [loaded] if bits == 8 else [loaded, f"codes = {pieces[0]}"]
