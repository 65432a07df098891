"""Formats of weights as the kernels read them, importable without the compiler.

A weight W [N, K] lies row by row; the sizes below are bytes of one row. Blocks are of 32 elements along K,
the last one padded. Accumulation is in float32 for all formats; x is taken in float32 where the elements
are floating point, and as integers of 16 bits per block of 32 where they are integers (exact products, see
`dot`).

    f32 f16 bf16   K elements
    f8e4m3         K bytes (e4m3fn, no NaN among them), one float32 scale per row
    int8           bytes q + 128 by blocks, one float16 scale per block (MatMulNBits of onnxruntime, 8 bits)
    int4           two elements a byte, low half first, scale (q - zero), zero 8 or given, packed likewise
    mxfp4          e2m1 elements, two a byte, low half first; one e8m0 scale per block (OCP MX v1.0)
    int8row        K bytes q + 128, one float32 scale per row
    int8f int4f    as int8 and int4 with float32 scales
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32
"""Elements that share a scale in the formats with blocks."""


@dataclass(frozen=True)
class Chunk:
    """The stretch of a row that an inner loop takes at a time: elements, bytes of them and of their block
    scales, and bytes of the same stretch of a prepared row of x."""

    values: int
    bytes: int
    x_bytes: int
    scales: int = 0


@dataclass(frozen=True)
class Format:
    """`bits` of an element; bytes of a scale, one per block or, where not `blocked`, per row (0: none).

    `chunk`: see `Chunk`. `zeros`: zero points may be given."""

    name: str
    code: int
    bits: int
    chunk: Chunk
    scale: int = 0
    blocked: bool = False
    zeros: bool = False

    def value_bytes(self, k: int) -> int:
        """Bytes of the elements of a row of K."""
        return (-(-k // BLOCK) * BLOCK if self.blocked else k) * self.bits // 8

    def scale_bytes(self, k: int) -> int:
        """Bytes of the scales of a row."""
        return self.scale * (-(-k // BLOCK) if self.blocked else 1)

    def prepared_bytes(self, k: int) -> int:
        """Bytes of a prepared row of x (see `prepare`): its chunks, and where zero points may be given a
        float32 per block, for whole vectors of sixteen."""
        return -(-k // self.chunk.values) * self.chunk.x_bytes + (
            -(-k // (16 * BLOCK)) * 64 if self.zeros else 0
        )

    def zero_bytes(self, k: int) -> int:
        """Bytes of the zero points of a row, where they are given."""
        blocks = -(-k // BLOCK)
        return -(-blocks // 2) if self.zeros else 0


FORMATS = {
    f.name: f
    for f in (
        Format("f32", 0, 32, Chunk(64, 256, 256)),
        Format("f16", 1, 16, Chunk(32, 64, 128)),
        Format("bf16", 2, 16, Chunk(32, 64, 128)),
        Format("f8e4m3", 3, 8, Chunk(32, 32, 128), 4),
        Format("int8", 4, 8, Chunk(128, 128, 448, 8), 2, True),
        Format("int4", 5, 4, Chunk(128, 64, 384, 8), 2, True, True),
        Format("mxfp4", 6, 4, Chunk(128, 64, 384, 4), 1, True),
        Format("int8row", 7, 8, Chunk(128, 128, 448), 4),
        Format("int8f", 8, 8, Chunk(128, 128, 448, 16), 4, True),
        Format("int4f", 9, 4, Chunk(128, 64, 384, 16), 4, True, True),
    )
}
"""Format name -> layout."""
