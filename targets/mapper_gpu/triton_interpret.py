"""bfloat16 under Triton's CPU interpreter.

The interpreter (3.9) keeps bfloat16 as uint16, multiplies these bit patterns in `tl.dot`, and loses the carry
when it rounds a mantissa of ones. `mend()` gives it ml_dtypes' conversions and products of the values; on a
GPU nothing of this is used."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def mend() -> None:
    """Replace the interpreter's conversions from and to bfloat16, and its product. Once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mended", False):
        return
    cast, dot, convert = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16:
            src = wide(src)
            return src if dst_type.scalar == tl.float32 else cast(self, src, dst_type)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            data = src.data.astype(ml_dtypes.bfloat16).view(np.uint16)
            return interpreter.TensorHandle(data, dst_type.scalar)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *rest)

    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast_impl, create_dot, create_fp_to_fp
    builder.mended = True
