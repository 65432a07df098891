"""The NumPy front: arrays in, arrays out. Results are new float32 arrays; sums are in float32 (see
`formats`).

    linear gated     products with weights in their stored format, with what comes before and after them
    attention        rows of queries against cached keys and values
    argmax top_k lm_head_top     the largest logits

All raise ValueError where shapes or types do not fit. The first call of each compiles; later processes find
the code in a cache on disk. Every call runs on the calling thread, without Python's lock.
"""

from __future__ import annotations

from mapper_kernels.front_attention import attention
from mapper_kernels.front_linear import gated, linear
from mapper_kernels.front_top import argmax, lm_head_top, top_k
from mapper_kernels.weight import Norm, Weight

__all__ = ["Norm", "Weight", "argmax", "attention", "gated", "linear", "lm_head_top", "top_k"]
