"""Number formats of published checkpoints: which matrices a stated precision means."""

from __future__ import annotations

from dataclasses import dataclass

from mapper.published.points import Point

EXPERTS_ONLY = ("deepseek", "kimi", "gpt-oss")  # their low-bit checkpoints keep attention in bf16

FOUR = {
    "nvfp4": "nvfp4",
    "fp4": "nvfp4",
    "mxfp4": "mxfp4",
    "int4": "int4",
    "int4_wo": "int4",
    "w4a16": "int4",
}


@dataclass(frozen=True)
class Formats:
    """Formats of matrices, of routed experts, and of the cache."""

    weights: str
    experts: str
    cache: str


def formats(point: Point) -> Formats | None:
    """What the row's precision means for its model; None for a precision that is not known here.

    Unstated precisions are taken as bf16, the format of the checkpoints that these rows name. "fp8" means
    all matrices but the head. Four-bit checkpoints of DeepSeek, Kimi and gpt-oss quantise the routed experts
    alone (their model cards). Caches: fp8 where TensorRT-LLM runs fp8 or fp4 weights, its documentation's
    recipe; else bf16.
    """
    stated = point.row.weights.split()[0].lower() if point.row.weights.strip() else "unstated"
    if stated in ("unstated", "bf16", "fp16", "16-bit"):
        return Formats("bf16", "bf16", "bf16")
    low = "fp8" if point.framework == "TensorRT-LLM" else "bf16"
    if stated in ("fp8", "fp8_block"):
        return Formats("fp8", "fp8", low)
    if stated.startswith("int8"):
        return Formats("int8", "int8", "bf16")
    if stated in FOUR:
        four = FOUR[stated]
        if point.model.startswith(EXPERTS_ONLY):
            four = "mxfp4" if point.model.startswith("gpt-oss") else four
            return Formats("bf16", four, low)
        return Formats(four, four, low)
    return None
