"""Routed experts, through the serving interpreter's compiled entry, against float64 NumPy on the dequantised
weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mapper.lowbit import FORMATS as STORED
from mapper.lowbit import Scheme, dequantise, quantise
from mapper_host.interpreter import BAD_INDEX, CONTROL, END, FINISHED, GENERATION, PARTS, member, unpack
from mapper_host.opcodes import EXPERTS_DOWN, EXPERTS_UP, OPERANDS, bits, extents
from mapper_host.scratch import scratch_bytes
from mapper_kernels.formats import FORMATS
from mapper_kernels.names import ACTIVATIONS, PACKINGS

Array = npt.NDArray[Any]
ERROR = {"f32": 1e-6, "f16": 1e-6, "bf16": 1e-6, "f8e4m3": 1e-6}
"""Bound on the error over the sum of magnitudes: float32 sums; where x is taken as integers of 16 bits,
half a step of it besides."""


@dataclass(frozen=True)
class Stack:
    """[E, N, K]: the arrays that a step reads, and the weights that they stand for in float64."""

    format: str
    parts: tuple[Array, ...]
    exact: Array
    zeros: bool = False

    @property
    def args(self) -> list[int]:
        """As a step has them, without a bias."""
        return [FORMATS[self.format].code, int(self.zeros)]


def stack(name: str, seed: int, *shape: int) -> Stack:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    how = STORED[name]
    if isinstance(how, Scheme):
        parts = quantise(how, w)
        exact = dequantise(how, shape, **parts).astype(np.float64)
        return Stack(name, tuple(parts.values()), exact, "zeros" in parts)
    if how == "bf16":
        narrow = (w.view(np.uint32) >> 16).astype(np.uint16)
        return Stack(name, (narrow,), (narrow.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    narrow = w.astype(how.replace("f", "float"))
    return Stack(name, (narrow,), narrow.astype(np.float64))


def run(opcode: int, args: list[int], operands: list[Array], threads: int = 1) -> int:
    """Run a step as each of `threads` threads in turn, as if the others had come to the barrier already; the
    last operand is the result. What thread 0 returns."""
    assert [a.nbytes for a in operands] == extents(opcode, args)
    rows = np.zeros((1, 2 + OPERANDS), np.int64)
    rows[0, 0] = opcode
    rows[0, 2 : 2 + len(operands)] = [a.ctypes.data for a in operands]
    given = np.array([*args, 0], np.int64)
    found = []
    for part in range(threads):
        scratch = np.full(scratch_bytes(rows, given) + 64, 0xFF, np.uint8)
        control, barrier = np.zeros(CONTROL, np.int64), np.array([threads - 1, 0])
        control[END], control[PARTS], control[FINISHED], control[GENERATION] = 1, threads, threads - 1, 1
        tables = (rows, given, given.view(np.float64), control, barrier)
        address = scratch.ctypes.data + -scratch.ctypes.data % 64
        found.append(int(member(*tables, address, part, 0, 0)))
    return found[0]


def activated(name: str, x: Array) -> Array:
    if name == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    return np.maximum(x, 0)


def chosen(tokens: int, k: int, experts: int, seed: int = 5) -> Array:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int64)


def bound(name: str, k: int, size: Array) -> Array:
    """Error of a dot product of k terms with magnitudes that sum to `size`."""
    return np.asarray((ERROR.get(name, 4e-5) + (k + 8) * 2.0**-24) * size)


@pytest.mark.parametrize("name", list(STORED))
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "d", "inner"), [(1, 2, 4, 64, 32), (3, 2, 3, 40, 37), (70, 1, 2, 33, 5)]
)
def test_up(name: str, tokens: int, k: int, experts: int, d: int, inner: int) -> None:
    """A gate and an up in different formats, biases on one."""
    x = np.random.default_rng(1).standard_normal((tokens, d)).astype(np.float32)
    index = chosen(tokens, k, experts)
    gate, up = (
        stack(name, 2, experts, inner, d),
        stack("f32" if name == "int4" else name, 3, experts, inner, d),
    )
    bias = np.random.default_rng(4).standard_normal((experts, inner)).astype(np.float32)
    args = [tokens, k, experts, d, inner, 0, 0, 1, ACTIVATIONS["relu"], bits(0.0), bits(0.0)]
    args += [*gate.args, 1, *up.args, 0]
    h = np.full((tokens, k, inner), np.nan, np.float32)
    for threads in (1, 3):
        h[:] = np.nan
        assert run(EXPERTS_UP, args, [x, index, *gate.parts, bias, *up.parts, h], threads) == 0
        each = x.astype(np.float64)[:, None, :, None]
        g = (gate.exact[index] @ each)[..., 0] + bias[index]
        u = (up.exact[index] @ each)[..., 0]
        g_size = (np.abs(gate.exact[index]) @ np.abs(each))[..., 0] + np.abs(bias[index])
        u_size = (np.abs(up.exact[index]) @ np.abs(each))[..., 0]
        g_off, u_off = bound(name, d, g_size), bound(name, d, u_size)
        off = g_off * (np.abs(u) + u_off) + u_off * np.abs(np.maximum(g, 0)) + 1e-6 * np.abs(g * u)
        assert (np.abs(h - np.maximum(g, 0) * u) <= off).all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["f32", "bf16", "mxfp4"])
def test_packings(packing: str, shared: bool, name: str) -> None:
    """Halves, alternating columns, and up alone; with biases, and for packed ones clamping and an offset."""
    tokens, k, experts, d, inner = 5, 2, 4, 48, 21
    wide = inner if packing == "none" else 2 * inner
    x = np.random.default_rng(1).standard_normal((tokens, d)).astype(np.float32)
    share = np.random.default_rng(6).uniform(0.2, 2, (tokens, k)).astype(np.float32)
    index = chosen(tokens, k, experts)
    up, bias = stack(name, 2, experts, wide, d), np.random.default_rng(4).standard_normal((experts, wide))
    bias = bias.astype(np.float32)
    packed = packing != "none"
    limit, offset = (3.0, 1.0) if packed else (0.0, 0.0)
    args = [tokens, k, experts, d, inner, int(shared), PACKINGS.index(packing), 0, ACTIVATIONS["silu"]]
    args += [bits(limit), bits(offset), *up.args, 1]
    h = np.full((tokens, k, inner), np.nan, np.float32)
    given = [x, index, *([share] if shared else []), *up.parts, bias, h]
    assert run(EXPERTS_UP, args, given, 2) == 0
    entering = x.astype(np.float64)[:, None] * (share[..., None] if shared else 1)
    made = (up.exact[index] @ entering[..., None])[..., 0] + bias[index]
    if packed:
        g, u = (
            (made[..., :inner], made[..., inner:])
            if packing == "halves"
            else (made[..., ::2], made[..., 1::2])
        )
        want = activated("silu", np.minimum(g, limit)) * (np.clip(u, -limit, limit) + offset)
    else:
        want = activated("silu", made)
    np.testing.assert_allclose(
        h, want, rtol=2e-3 if name == "mxfp4" else 1e-4, atol=2e-3 if name == "mxfp4" else 2e-5
    )


@pytest.mark.parametrize("name", list(STORED))
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "inner", "d"), [(1, 3, 4, 64, 32), (3, 2, 3, 33, 37), (130, 2, 2, 7, 5)]
)
@pytest.mark.parametrize("shared", [False, True])
def test_down(name: str, tokens: int, k: int, experts: int, inner: int, d: int, shared: bool) -> None:
    h = np.random.default_rng(1).standard_normal((tokens, k, inner)).astype(np.float32)
    share = np.random.default_rng(6).uniform(0.2, 2, (tokens, k)).astype(np.float32)
    index = chosen(tokens, k, experts)
    down, bias = stack(name, 2, experts, d, inner), np.random.default_rng(4).standard_normal((experts, d))
    bias = bias.astype(np.float32)
    args = [tokens, k, experts, inner, d, int(shared), *down.args, 1]
    for threads in (1, 2):
        y = np.full((tokens, d), np.nan, np.float32)
        given = [h, index, *([share] if shared else []), *down.parts, bias, y]
        assert run(EXPERTS_DOWN, args, given, threads) == 0
        factor = share[..., None].astype(np.float64) if shared else np.ones((tokens, k, 1))
        each = (down.exact[index] @ h.astype(np.float64)[..., None])[..., 0] + bias[index]
        size = (np.abs(down.exact[index]) @ np.abs(h)[..., None].astype(np.float64))[..., 0] + np.abs(
            bias[index]
        )
        assert (np.abs(y - (factor * each).sum(1)) <= (factor * bound(name, inner + k, size)).sum(1)).all()


def test_one_expert_more_than_once() -> None:
    h = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    index, down = np.array([[1, 1, 0], [1, 1, 1]]), stack("f32", 2, 2, 4, 8)
    y = np.full((2, 4), np.nan, np.float32)
    assert run(EXPERTS_DOWN, [2, 3, 2, 8, 4, 0, *down.args, 0], [h, index, *down.parts, y]) == 0
    np.testing.assert_allclose(y, (down.exact[index] @ h[..., None])[..., 0].sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 2, 1 << 40])
@pytest.mark.parametrize("opcode", [EXPERTS_UP, EXPERTS_DOWN])
def test_an_expert_that_is_not_there_is_a_fault(bad: int, opcode: int) -> None:
    x, index, w = np.ones((1, 2, 4), np.float32), np.array([[1, bad]]), stack("f32", 1, 2, 4, 4)
    y = np.full((1, 2, 4) if opcode == EXPERTS_UP else (1, 4), np.nan, np.float32)
    head = [1, 2, 2, 4, 4, 0] + ([0, 0, ACTIVATIONS["relu"], 0, 0] if opcode == EXPERTS_UP else [])
    x = x[:, 0].copy() if opcode == EXPERTS_UP else x
    assert unpack(run(opcode, [*head, *w.args, 0], [x, index, *w.parts, y])) == (0, BAD_INDEX)
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    "args",
    [
        [1, 2, 2, 4, 4, 0, 0, 1],  # zeros in a format that has none
        [1, 2, 2, 4, 4, 0, 99, 0, 0],
        [1, 2, 2, 4, 4, 2, 0, 0, 0],
        [1, -2, 2, 4, 4, 0, 0, 0, 0],
        [1, 2, 2, 4, 4, 0, 0, 0, 0, 0],
    ],
)
def test_arguments_of_no_experts_are_refused(args: list[int]) -> None:
    with pytest.raises((ValueError, IndexError)):
        extents(EXPERTS_DOWN, args)


def test_memory_of_a_step_hardly_grows_with_experts() -> None:
    def needed(experts: int) -> int:
        args = np.array([512, 8, experts, 2880, 2880, 0, 2, 0, 0, 0, 0, 6, 0, 0, 0], np.int64)
        return scratch_bytes(np.array([[EXPERTS_UP, 0]], np.int64), args)

    assert needed(128) - needed(8) == math.ceil(8 * 120 / 64) * 64
    assert needed(8) < 8 << 20
