"""Operands that emitted statements make of every code of a kind: a kernel of these statements alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper_gpu.triton_code import Group, Statements
from mapper_gpu.triton_names import Parameters
from mapper_gpu.triton_products import Strip, weight
from mapper_gpu.triton_run import TORCH, imported

Array = npt.NDArray[Any]
FORMATS = {"uint8": "u8", "float16": "f16", "float32": "f32"}
KERNEL = """import triton
import triton.language as tl


@triton.jit
def codes({parameters}, out):
    n = tl.arange(0, {rows})
{before}
    for k0 in range(0, {columns}, {block}):
        k = k0 + tl.arange(0, {block})
{turn}
        tl.store(out + n[:, None] * {columns} + k[None, :], w)
"""


def operands(
    folder: Path, kind: str, bits: int, block: int, step: int, packed: Array, scales: Array,
    zeros: Array | None,
) -> Array:  # fmt: skip
    """float32 [rows, K] of packed codes u8 [rows, bytes] and scales and zero points [rows, blocks]; `step`
    columns of K at a time. Zero points in u8 are packed like the codes."""
    import torch

    rows, columns = packed.shape[0], packed.shape[1] * 8 // bits
    arrays = {"values": packed, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
    reads = []
    for name, array in arrays.items():
        whole = name == "values" or (array.dtype == np.uint8 and name == "zeros")
        width = columns if name == "values" else max(1, columns // block) if block else 1
        reads.append({
            "value": name, "dtype": FORMATS[array.dtype.name], "rows": rows, "width": width, "panel": width,
            "r": "n", "c": "k", "chip": -1, "bits": bits if whole else 0,
            "per": 1 if name == "values" else block,
        })  # fmt: skip
    code = [["read", name, i] for i, name in enumerate(arrays)]
    code.append(["dequantise", "w", "values", "scales", None if zeros is None else "zeros", kind, bits, block,
                 reads[1]["dtype"], "f32"])  # fmt: skip
    work = Statements({"kind": "product", "reads": reads, "writes": [], "code": code}, Parameters(), 1)
    made = weight(work, "w", Group("", "n[None, :]"), Strip(step, columns), rows)
    path = folder / f"codes_{kind}_{bits}_{block}.py"
    path.write_text(KERNEL.format(
        parameters=", ".join(work.parameters.known.values()), rows=rows, columns=columns, block=step,
        before="\n".join(f"    {line}" for line in made.before),
        turn="\n".join(f"        {line}" for line in (*made.shared, *made.turn)),
    ))  # fmt: skip
    out = torch.empty((rows, columns), dtype=torch.float32)
    taken = [torch.from_numpy(arrays[value]).to(getattr(torch, TORCH[work.parameters.formats[name]]))
             for (value, _), name in work.parameters.known.items()]  # fmt: skip
    imported(path).codes[(1,)](*taken, out)
    return np.asarray(out.numpy())


def outcomes(folder: Path) -> dict[str, bool]:
    """Kind of code -> whether every operand is, bit for bit, what ml_dtypes and NumPy make of it."""
    import ml_dtypes

    random = np.random.default_rng(0)
    every = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    scales = random.uniform(0.1, 2, (4, 1)).astype(np.float32)
    found = {}
    made = operands(folder, "e4m3", 8, 0, 64, every, scales, None)
    found["e4m3"] = _same(made, every.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales)
    # a byte has two codes, of which the low one is the first; scales of every exponent but the least
    exponents = np.arange(1, 255 - 6, dtype=np.uint8).repeat(2)[:256].reshape(16, 16)
    pairs = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
    small = np.stack([pairs & 15, pairs >> 4], -1).reshape(16, 512)
    made = operands(folder, "e2m1", 4, 32, 64, pairs, exponents, None)
    values = small.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    factor = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).repeat(32, 1)
    found["e2m1"] = _same(made, values * factor)
    for bits in (2, 4, 8):
        each = 8 // bits
        codes = np.stack([every >> (i * bits) & ((1 << bits) - 1) for i in range(each)], -1).reshape(4, -1)
        blocks = codes.shape[1] // 16
        steps = random.uniform(0.1, 2, (4, blocks)).astype(np.float16)
        zeros = random.integers(0, 256, (4, blocks // each)).astype(np.uint8)
        apart = np.stack([zeros >> (i * bits) & ((1 << bits) - 1) for i in range(each)], -1).reshape(4, -1)
        wanted = (codes.astype(np.float32) - apart.repeat(16, 1)) * steps.astype(np.float32).repeat(16, 1)
        found[f"int{bits}"] = _same(operands(folder, "int", bits, 16, 32, every, steps, zeros), wanted)
    return found


def _same(made: Array, wanted: Array) -> bool:
    return bool(np.array_equal(made, wanted, equal_nan=True) and np.isfinite(wanted).any())
