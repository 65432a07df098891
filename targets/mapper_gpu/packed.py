"""Low-bit weights as this target holds them: which stored ones stay as they are, in which parts, and the
format that products with them are computed in.

The parts of a weight [n, k] are arrays of their own in memory, each in panels along K: the codes [n, k] of
2, 4 or 8 bits, packed low bits first within a row of a panel; a scale, and where the scheme has them a zero
point, per row and block of K (`mapper.lowbit` defines the schemes). A task brings its rows and its stretch of
K of each part into its SM and makes the operands of the tensor core there: products are computed in `form`,
activations are not quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp
from mapper.ir.weights import Packing, WeightSymbol
from mapper.passes.quantise import PRODUCTS

SCALES = {"f16": 2, "bf16": 2, "f32": 4, "u8": 1}
"""Types of stored scales and zero points, and their bytes; u8 scales are exponents (E8M0)."""
CODES = "codes"
"""The type of zero points that are packed like the values."""
INTEGERS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4}
"""Types of plain stored integers, and their bits; signed ones are held offset by half of their range."""
FORMS = ("f32", "bf16", "f16")
"""Element types that weights, activations and caches are held in."""
OPERATIONS = 4.0
"""Operations of the vector units that make an operand of a code, counted as fused multiply-adds of two
results are (so at the file's `vector.f32`): a 32-bit word of two operands takes one logical instruction, at
half the rate, and one instruction each to centre and to scale, two operands at a time (Kim et al. 2022,
arXiv:2211.10017: conversion through the bit patterns of fp16). Assumed: no kernel was measured."""


@dataclass(frozen=True)
class Part:
    """One stored part of a weight: elements of `bits` bits (0: of `dtype`), each for `per` columns of K
    (0: for the whole row)."""

    name: str
    dtype: str
    bits: int
    per: int

    def width(self, k: int) -> int:
        """Elements in a row of K columns."""
        return -(-k // self.per) if self.per else 1

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of K columns."""
        width = self.width(k)
        return -(-width * self.bits // 8) if self.bits else width * SCALES[self.dtype]


@dataclass(frozen=True)
class Packed:
    """How a weight is held in low bits: its scheme, the type of its scales, of its zero points ("": none;
    "codes": packed like the values)."""

    name: str
    bits: int
    block: int
    kind: str
    scale: str
    zero: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is stored."""
        found = [Part("values", "u8", self.bits, 1), Part("scales", self.scale, 0, self.block)]
        if self.zero == CODES:
            found.append(Part("zeros", "u8", self.bits, self.block))
        elif self.zero:
            found.append(Part("zeros", self.zero, 0, self.block))
        return tuple(found)

    @property
    def whole(self) -> int:
        """Columns of K that chips must not share: a block."""
        return max(1, self.block)

    @property
    def grain(self) -> int:
        """Columns of K that tiles must not share: whole blocks, and whole bytes of every part."""
        packed = 8 // self.bits
        zeros = self.block * packed if self.zero == CODES else 1
        return math.lcm(self.whole, packed, max(1, zeros))

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of K columns, scales and zero points included."""
        return sum(p.row_bytes(k) for p in self.parts)


def packed_of(weight: WeightSymbol, turned: bool = False) -> Packed | None:
    """How a weight is held in low bits; None where its values are (blocks across K, in another order, or of
    half bytes; stacks of plain integers; types that are not known). `turned` says that the product takes it
    as [K, N]."""
    packing = weight.packing
    if packing is None or len(weight.shape) not in (2, 3) or packing.order is not None:
        return None
    if packing.scheme.layout == "plain":
        return _plain(packing, weight.shape, turned) if len(weight.shape) == 2 else None
    scheme, zeros, scales = packing.scheme, packing.zeros, packing.scales.dtype
    if turned or scales not in SCALES or (scales == "u8" and scheme.kind != "e2m1"):
        return None
    zero = "" if zeros is None else CODES if zeros.dtype == "u8" else zeros.dtype
    across = zero == CODES and not scheme.block  # one per row, packed along the rows
    if across or scheme.block * scheme.bits % 8 or zero not in ("", CODES, *SCALES):
        return None
    return Packed(scheme.name, scheme.bits, scheme.block, scheme.kind, scales, zero)


def _plain(packing: Packing, shape: tuple[int, ...], turned: bool) -> Packed | None:
    """Integers of the weight's own shape, with a scale for all, per row, or per row and block of K."""
    scheme, scales, bits = packing.scheme, packing.scales, INTEGERS.get(packing.values.dtype)
    rows, columns = (1, 0) if turned else (0, 1)
    axis = scheme.axis % 2
    per_row = scales.elements == 1 or (not scheme.block and axis == rows and len(scales.shape) == 1)
    per_block = scheme.block and axis == columns and len(scales.shape) == 2
    if bits is None or scales.dtype not in SCALES or scales.dtype == "u8" or not (per_row or per_block):
        return None
    block = scheme.block if per_block and scales.elements > 1 else 0
    if (packing.zeros is not None and packing.zeros.dtype != packing.values.dtype) or block * bits % 8:
        return None
    middle = packing.zeros is None and packing.values.dtype.startswith("i")
    return Packed(scheme.name, bits, block, "int", scales.dtype, "" if middle else CODES)


LATENT = ("latent_attention", "cached_latent_attention")


def turned_of(op: DataflowOp, attribute: str) -> bool:
    """Whether an op takes a matrix as [K, N]."""
    flag = PRODUCTS.get(op.mnemonic, {}).get(attribute)
    return flag is not None and not op.attr(flag)


def held_bytes(weight: WeightSymbol, item: float, turned: bool = False) -> float:
    """Bytes of a matrix in memory: of its parts, or of its values at `item` bytes each."""
    held = packed_of(weight, turned)
    if held is None:
        return weight.elements * item
    k = weight.shape[-2 if turned else -1]
    return weight.elements // k * held.row_bytes(k)


def used(graph: Graph) -> Iterator[tuple[str, WeightSymbol, bool]]:
    """(name, symbol, whether it is taken as [K, N]) of every weight that an op names, those of all
    repetitions, each once."""
    seen: set[str] = set()
    for section in graph.sections():
        for op in section.ops:
            for attribute, slot in op.weights().items():
                for name in section.table.get(slot, (slot,)):
                    if name not in seen:
                        seen.add(name)
                        yield name, graph.weights[name], turned_of(op, attribute)


def dequantised(graph: Graph) -> set[str]:
    """Names of the weights that are held as values, whatever they are stored in: those of latent attention,
    whose key half is transposed head by head."""
    return {
        name for section in graph.sections() for op in section.ops if op.mnemonic in LATENT
        for slot in op.weights().values() for name in section.table.get(slot, (slot,))
    }  # fmt: skip


def form_of(graph: Graph, asked: str | None, f16: bool = True) -> str:
    """The element type of activations, caches and product operands: the format asked for; with low-bit
    weights asked for, the model's own 16-bit type, else f16 (bf16 where the machine has no f16 products);
    where nothing is asked for, that in which the model holds most of its elements."""
    if asked in FORMS:
        return asked
    sizes: dict[str, int] = {}
    for _, w, _ in used(graph):
        derived = w.packing.values.derivation if w.packing is not None else None
        own = w.dtype if derived is None else derived.source.dtype
        sizes[own] = sizes.get(own, 0) + w.elements
    own = max(sorted(sizes), key=lambda d: sizes[d]) if sizes else "f32"
    own = own if own in FORMS else "f32"
    if asked is None or own != "f32":
        return own
    return "f16" if f16 else "bf16"


def item_bytes(form: str) -> int:
    """Bytes of an element that is not in low bits."""
    return 4 if form == "f32" else 2
