"""Products of the kernels on threads of one's own, weights on huge pages, and a plain read of the same
bytes."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from mapper_kernels import fused
from mapper_kernels.formats import FORMATS
from mapper_kernels.front_linear import project_arguments, project_parts
from mapper_kernels.jit import entry, intrinsic
from mapper_kernels.sizes import project_scratch
from mapper_kernels.vec import I32, Emitter, vector
from mapper_kernels.weight import Weight, scratch_memory

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
STREAMS, LINE, AHEAD = 4, 64, 2048
"""Streams of the plain read, bytes it takes at a time, and how far ahead it prefetches."""
_ROWS = 512
"""Different rows in a weight; the others repeat them."""


@intrinsic
def _read_lines(typingctx: Any, address: Any, lines: Any, step: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder, False)
        base, count, apart = args

        def body(i: Any, sums: list[Any]) -> list[Any]:
            places = [e.at(base, (r, apart), (LINE, i)) for r in range(STREAMS)]
            for place in places:
                e.prefetch(builder.add(place, e.number(AHEAD)))
            return [builder.add(s, e.load(p, vector(I32, 16))) for s, p in zip(sums, places, strict=True)]

        sums = e.loop(e.number(0), count, [e.fill(I32, 16, 0)] * STREAMS, body)
        a, b, c, d = sums
        return builder.sext(
            e.total(builder.add(builder.add(a, b), builder.add(c, d))), context.get_value_type(types.int64)
        )

    return types.int64(types.int64, types.int64, types.int64), build


@entry(Path(__file__))
def read(address: int, size: int) -> int:
    """Sum of the int32 of STREAMS runs of memory, side by side: as fast as this computer reads."""
    lines = size // (STREAMS * LINE)
    return _read_lines(address, lines, lines * LINE)


def huge(size: int) -> Array:
    """Bytes on huge pages, where the system has them."""
    space = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        space.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(space, np.uint8)


def _repeat(rows: Array, n: int, place: Array) -> Array:
    """n rows in `place`, repeating those given."""
    wide = place[: n * rows.shape[1] * rows.itemsize].view(rows.dtype).reshape(n, -1)
    for first in range(0, n, len(rows)):
        wide[first : first + len(rows)] = rows[: n - first]
    return wide


def random_weight(name: str, n: int, k: int, space: Array) -> Weight:
    """A weight [n, k] of a format inside `space`; values repeat every `_ROWS` rows."""
    rng = np.random.default_rng(0)
    layout = FORMATS[name]
    plain: dict[str, Any] = {"f32": "f4", "f16": "f2"}
    if name in plain or name == "bf16":
        rows: Array = rng.standard_normal((_ROWS, k), np.float32) / np.float32(k**0.5)
        rows = Weight.of(rows, name).values if name == "bf16" else rows.astype(plain[name])
    else:
        rows = rng.integers(0, 0x7F if name == "f8e4m3" else 256, (_ROWS, layout.value_bytes(k))).astype(
            np.uint8
        )
    values = _repeat(rows, n, space)
    if not layout.scale:
        return Weight(name, values, (n, k))
    few = rng.uniform(0.5, 1.5, (_ROWS, layout.scale_bytes(k) // layout.scale)) / 128 / k**0.5
    kinds: dict[int, Any] = {2: np.float16, 4: np.float32}
    scales = few.astype(kinds[layout.scale]) if layout.scale > 1 else np.full(few.shape, 118, np.uint8)
    start = (values.nbytes + LINE - 1) // LINE * LINE
    return Weight(name, values, (n, k), _repeat(scales, n, space[start:]))


@dataclass(frozen=True)
class Threads:
    """Threads that run the parts of one call together."""

    count: int
    pool: ThreadPoolExecutor

    @staticmethod
    def start(count: int) -> Threads:
        """New threads."""
        return Threads(count, ThreadPoolExecutor(count))

    def together(self, work: Callable[[int], Any]) -> None:
        """work(part) on every thread; returns when all are done."""
        list(self.pool.map(work, range(self.count)))


@dataclass(frozen=True)
class Product:
    """y = x W^T on threads; holds what compiled code knows by address only."""

    threads: Threads
    x: F32
    weight: Weight
    y: F32
    arguments: tuple[Array, Array, Array]
    scratch: list[tuple[Array, int]]

    @staticmethod
    def of(threads: Threads, x: F32, weight: Weight) -> Product:
        """x [M, K]."""
        (m, k), n = x.shape, weight.shape[0]
        y = np.zeros((m, n), np.float32)
        r, a, f = project_arguments(x, [(weight, None)], None, fused.PLAIN, "identity")
        addresses = np.array([*r, y.ctypes.data], np.int64)
        scratch = [scratch_memory(project_scratch(m, k, n, 1)) for _ in range(threads.count)]
        return Product(threads, x, weight, y, (addresses, a, f), scratch)

    def __call__(self) -> None:
        self.threads.together(self._part)

    def _part(self, part: int) -> None:
        project_parts(*self.arguments, self.scratch[part][1], part, part + 1, self.threads.count)


def plain_read(threads: Threads, space: Array) -> Callable[[], None]:
    """A function that reads these bytes."""
    each = len(space) // threads.count // (STREAMS * LINE) * (STREAMS * LINE)
    return lambda: threads.together(lambda part: read(space.ctypes.data + part * each, each))
