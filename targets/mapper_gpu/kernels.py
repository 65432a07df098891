"""Seconds of one kernel, from its shape: matrix products, attention, grouped experts, vector passes.

A product of `rows` tokens with weights [k, n] is cut into tiles of the output, one at a time per core; it
takes as long as its bytes from HBM or as its waves of tiles, whichever is longer. Every kernel costs the
gap between two kernels besides.
"""

from __future__ import annotations

from math import ceil

from mapper_gpu.rates import BITS, Rates

TILES = ((16, 64), (16, 128), (32, 128), (64, 128), (128, 128), (128, 256))  # rows x columns of the output
OPERAND = {
    "f32": 4.0,
    "bf16": 2.0,
    "f16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5625,
}  # bytes, scales included
WIDE = 2.0  # bytes of an activation element between kernels, bf16


def product(rates: Rates, rows: float, k: float, n: float, weights: str) -> float:
    """y [rows, n] = x [rows, k] @ W [k, n], W in format `weights`."""
    if rows <= 0 or n <= 0:
        return 0.0
    computed = rates.format(weights)
    bits = BITS[weights] / 8
    moved = k * n * bits + rows * (k * min(WIDE, bits if computed != "bf16" else WIDE) + n * WIDE)
    reading = moved / (rates.bandwidth * rates.stream)
    return max(reading, waves(rates, rows, k, n, computed)) / rates.unpacked(weights) + rates.kernel


def waves(rates: Rates, rows: float, k: float, n: float, computed: str) -> float:
    """Time of the tensor cores: the best tile's waves. A tile takes as long as its products, or as its
    operands through the core's port. Tiles that do not fill a wave are split along k into as many parts as
    do."""
    rate = rates.product[computed] / rates.cores * rates.tensor
    best, size = float("inf"), OPERAND[computed]
    for tall, wide in TILES:
        tiles = ceil(rows / tall) * ceil(n / wide)
        parts = max(1, rates.cores // tiles)
        each = k * max(2 * tall * wide / rate, (tall + wide) * size / rates.port)
        best = min(best, ceil(tiles * parts / rates.cores) / parts * each)
    return best


def experts(
    rates: Rates, tokens: float, chosen: int, count: float, k: float, n: float, inner: float, weights: str
) -> float:
    """The products of `count` experts on one chip to which `tokens` x `chosen` rows go evenly: up [k, n],
    down [inner, k], an expert's weights read if a row reaches it; and the kernels that sort rows and sum
    them."""
    if tokens <= 0:
        return 0.0
    rows = tokens * chosen
    busy = count * (1 - (1 - 1 / count) ** rows) if count > 1 else 1.0
    computed, bits = rates.format(weights), BITS[weights] / 8
    share = rates.grouped * rates.unpacked(weights)
    stored = busy * (k * n + inner * k) * bits
    reading = (stored + rows * (2 * k + n + inner) * WIDE) / (rates.bandwidth * rates.stream * share)
    each = rows / busy
    tall = next((t for t in (16, 32, 64, 128) if t >= each), 128)
    padded = busy * ceil(each / tall) * tall
    rate = rates.product[computed] * rates.tensor * share
    return max(reading, 2 * padded * (k * n + inner * k) / rate) + 5 * rates.kernel


def decode_attention(rates: Rates, queries: float, context: float, row_bytes: float, flops: float) -> float:
    """Split-KV attention of `queries` sequences with `context` cached tokens of `row_bytes`, `flops` for each
    cached token; a kernel for the parts and one that merges them."""
    if queries <= 0:
        return 0.0
    reading = queries * context * row_bytes / (rates.bandwidth * rates.stream)
    computing = queries * context * flops / (rates.product["bf16"] * rates.tensor)
    return max(reading, computing) + 2 * rates.kernel


def prefill_attention(rates: Rates, tokens: float, seen: float, flops: float) -> float:
    """Attention of `tokens` prompt tokens to `seen` tokens each on average, `flops` per pair."""
    if tokens <= 0:
        return 0.0
    rate = rates.product["bf16"] * rates.tensor
    return tokens * seen * flops / rate + rates.kernel


def vector(rates: Rates, elements: float) -> float:
    """A pass over `elements`, read and written once: norms, activations, rotary embeddings, quantisation."""
    return 2 * WIDE * elements / (rates.bandwidth * rates.stream) + rates.kernel
