"""How work is shared between threads, and how a thread waits for the others."""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mapper_kernels.jit import inline, intrinsic, jit

SPINS = 2000
"""How often a waiting thread looks before it lets others have its core."""


@intrinsic
def relax(typingctx: Any) -> Any:
    """Tell the core that it waits in a loop."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            kind: Any = ir.FunctionType(ir.VoidType(), [])
            declare: Any = cgutils.get_or_insert_function
            builder.call(declare(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), build


@inline
def share(n: int, grain: int, part: int, parts: int) -> tuple[int, int]:
    """[low, high) of share number `part` of n items in `parts` shares, cut at multiples of `grain`."""
    blocks = (n + grain - 1) // grain
    low = blocks * part // parts * grain
    high = blocks * (part + 1) // parts * grain
    return min(low, n), min(high, n)


if sys.platform == "win32":

    @jit
    def give_way() -> None:
        """Keep looking: this system has no call to yield that compiled code finds by name."""

else:
    _yield = types.ExternalFunction("sched_yield", types.int32())

    @jit
    def give_way() -> None:
        """Let another thread run on this core."""
        _yield()
