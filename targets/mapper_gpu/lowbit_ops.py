"""Low-bit weights in the executor: packed codes in memory, and the instruction that makes operands of them.

Written from the formats' specifications, apart from `mapper.lowbit`, by which weights are quantised and the
oracle's are dequantised:

    int    (code - zero) x scale; without zero points the middle of the range is zero   (MatMulNBits)
    e4m3   sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, s.1111.111 is NaN   (OCP 8-bit)
    e2m1   sign, 2 bits of exponent (bias 1), 1 of mantissa                               (OCP MX v1.0)
    u8 scales are E8M0: 2^(scale - 127)                                                   (OCP MX v1.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mapper.schedule.dtypes import dtype

if TYPE_CHECKING:
    from mapper_gpu.execute import Stack, Task

Array = npt.NDArray[Any]
_LAYOUT = {"e4m3": (4, 3, 7), "e2m1": (2, 1, 1)}
"""Kind -> bits of exponent, bits of mantissa, bias."""
_KINDS = {"int": (2, 4, 8), "e4m3": (8,), "e2m1": (4,)}
_ROUNDED = {"bf16": "bfloat16", "f16": "float16"}


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of packed elements."""
    return -(-columns * bits // 8)


def unpacked(raw: Array, bits: int, columns: int) -> Array:
    """u8 [..., bytes] -> the first `columns` elements of each row, u8; low bits come first."""
    if bits not in (2, 4, 8):
        raise ValueError(f"elements of {bits} bits")
    places = np.arange(columns)
    shift = (places * bits % 8).astype(np.uint8)
    return (raw[..., places * bits // 8] >> shift) & np.uint8((1 << bits) - 1)


def packed(codes: Array, bits: int) -> Array:
    """Inverse of `unpacked`, rows filled to whole bytes with zeros."""
    each, columns = 8 // bits, codes.shape[-1]
    made = np.zeros((*codes.shape[:-1], row_bytes(columns, bits)), np.uint8)
    for place in range(each):
        part = codes[..., place::each].astype(np.uint8) << np.uint8(place * bits)
        made[..., : part.shape[-1]] |= part
    return made


@cache
def floats(kind: str) -> Array:
    """Code -> float32 of a floating-point kind."""
    exponents, mantissas, bias = _LAYOUT[kind]
    code = np.arange(1 << (1 + exponents + mantissas))
    sign = np.where(code >> (exponents + mantissas), -1.0, 1.0)
    exponent, mantissa = code >> mantissas & ((1 << exponents) - 1), code & ((1 << mantissas) - 1)
    normal = np.ldexp(1 + mantissa / (1 << mantissas), exponent - bias)
    value = sign * np.where(exponent > 0, normal, np.ldexp(mantissa / (1 << mantissas), 1 - bias))
    if kind == "e4m3":
        value[(exponent == 15) & (mantissa == 7)] = np.nan
    return value.astype(np.float32)


def round_blocks(task: Task, r: dict[str, Any], out: str, x: str, block: int) -> None:
    """x [rows, k] in whole steps of 1/127 of the largest magnitude of each block of columns, as kernels that
    multiply integers take it (MatMulNBits, accuracy_level 4). Coordinates begin at a block."""
    v = r[x]
    if task.at[4] % block:
        task.fail(f"activations rounded in blocks of {block} from column {task.at[4]} on")
    starts = np.arange(0, v.shape[1], block)
    step = np.repeat(np.maximum.reduceat(np.abs(v), starts, axis=1), block, axis=1)[:, : v.shape[1]]
    step = step / np.float32(127)
    r[out] = np.where(step > 0, np.rint(v / np.where(step > 0, step, 1)) * step, 0).astype(np.float32)


@dataclass(frozen=True)
class Decoded:
    """Operands of all experts, made of the parts of one where its block is worked through: `parts` by name,
    `how` the rest of the instruction."""

    parts: Mapping[str, Stack]
    how: tuple[str, int, int, str, str]

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return self.parts["values"].columns

    def read(self, task: Task, expert: int) -> Array:
        """The operand [n, k] of one expert."""
        r: dict[str, Any] = {name: part.read(task, expert) for name, part in self.parts.items()}
        zeros = "zeros" if "zeros" in r else None
        kind, bits, block, scale, form = self.how
        dequantise(task, r, "out", "values", "scales", zeros, kind, bits, block, scale, form)
        return np.asarray(r["out"])


def dequantise(
    task: Task, r: dict[str, Any], out: str, values: str, scales: str, zeros: str | None, kind: str,
    bits: int, block: int, scale: str, form: str,
) -> None:  # fmt: skip
    """out [n, k]: operands of the tensor core, rounded to `form`, of codes [n, k], with scales and zeros
    [n, blocks] (one per row where `block` is 0). Coordinates begin at a block. Of stacks, whose experts the
    blocks name, they are made when these are read."""
    codes = r[values]
    if not isinstance(codes, np.ndarray):
        stacks = {"values": codes, "scales": r[scales]} | ({} if zeros is None else {"zeros": r[zeros]})
        r[out] = Decoded(stacks, (kind, bits, block, scale, form))
        return
    rows, columns = codes.shape
    if bits not in _KINDS.get(kind, ()) or form not in ("f32", *_ROUNDED):
        task.fail(f"codes of {bits} bits of {kind}, operands of {form}")
    count = -(-columns // block) if block else 1
    factor = np.exp2(r[scales].astype(np.float32) - 127) if scale == "u8" else r[scales].astype(np.float32)
    parts = [factor] + ([] if zeros is None else [r[zeros].astype(np.float32)])
    if (block and task.at[4] % block) or any(p.shape != (rows, count) for p in parts):
        task.fail(f"codes [{rows}, {columns}] with scales {[p.shape for p in parts]} of blocks of {block}")
    spread = [np.repeat(p, block, axis=1)[:, :columns] if block else p for p in parts]
    if kind == "int":
        middle = np.float32(1 << (bits - 1)) if zeros is None else spread[1]
        made = (codes.astype(np.float32) - middle) * spread[0]
    else:
        made = floats(kind)[codes] * spread[0]
    r[out] = made.astype(dtype(_ROUNDED[form])).astype(np.float32) if form in _ROUNDED else made
