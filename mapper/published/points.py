"""From a published row to what was run: serving software, parallelism, load. Or why that cannot be told.

Nothing here looks at a published rate, but to see whether there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mapper.published.rows import Row

FRAMEWORKS: Mapping[str, str] = {
    r"\btrt-?llm\b|tensorrt-llm": "TensorRT-LLM",
    r"\bvllm\b": "vLLM",
    r"\bsglang\b": "SGLang",
    r"\bsambaflow\b": "SambaFlow",
    r"llama\.cpp": "llama.cpp",
    r"deepspeed": "DeepSpeed",
    r"\btgi\b|text-generation-inference": "TGI",
}
SOURCES: Mapping[str, str] = {
    r"^aiconfigurator": "aiconfigurator silicon_sample",
    r"^argonne": "Argonne LLM-Inference-Bench",
    r"^tensorrt-llm docs perf-overview": "TensorRT-LLM perf-overview",
    r"^tensorrt-llm docs performance": "TensorRT-LLM performance.md",
    r"^mlperf": "MLPerf",
}
MODELS: Mapping[str, str] = {
    "kimi-k2.5": "kimi-k2",  # the language model's layers and widths are K2's; vision is not timed here
    "qwen2-7b": "qwen2.5-7b",  # same layers, heads and widths
    "llama-3-70b": "llama-3.1-70b",  # 3.1 changed the rotary scaling and the context only
}
Load = Literal["loop", "batch", "offline"]


@dataclass(frozen=True)
class Point:
    """What a row measured.

    `load`: "loop" keeps `concurrency` requests in flight and the rate is that of tokens after the first;
    "batch" starts `concurrency` requests at once and the rate is output over the time to the last token;
    "offline" offers more requests than the server takes, and the rate is all output over all time. `tensor`
    chips share each matrix, `experts` of them hold whole experts, `replicas` hold copies of attention.
    """

    row: Row
    model: str
    framework: str
    load: Load
    concurrency: int | None
    prompt: int
    output: int
    tensor: int
    experts: int
    replicas: int


@dataclass(frozen=True)
class Excluded:
    """A row that is not predicted, and why."""

    row: Row
    reason: str


def framework(source: str) -> str | None:
    """The serving software that a source names; None where it names none."""
    return next((name for pattern, name in FRAMEWORKS.items() if re.search(pattern, source, re.I)), None)


def group(source: str) -> str:
    """The source without what differs from row to row; its own text where it is none of the known ones."""
    return next((name for pattern, name in SOURCES.items() if re.search(pattern, source, re.I)), source)


def point(row: Row) -> Point | Excluded:
    """What the row measured, or why that cannot be told from it."""
    made, load, software = _split(row), _load(row), framework(row.source)
    reasons = {
        "the row gives no token rate": row.metric is None,
        "the source names no serving software": software is None,
        "the row gives no batch or concurrency": row.batch is None,
        "the row gives no prompt and output lengths": not row.prompt or not row.output,
        "speculative decoding of unknown acceptance": row.speculative.startswith(("yes", "likely")),
        "the row does not say how the model is split over its chips": made is None,
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason or software is None or made is None or row.prompt is None or row.output is None:
        return Excluded(row, reason or "incomplete row")
    tensor, experts, replicas = made
    wanted = None if load == "offline" else concurrency(row)
    model = MODELS.get(row.model, row.model)
    return Point(row, model, software, load, wanted, row.prompt, row.output, tensor, experts, replicas)


def concurrency(row: Row) -> int | None:
    """Requests in flight: from the sample's name (`_c64_`) where it has one, else the batch."""
    named = re.search(r"_c(\d+)_", row.source)
    if named:
        return int(named[1])
    return row.batch if isinstance(row.batch, int) else None


def _load(row: Row) -> Load:
    if row.batch == "max" or "max load" in row.source:
        return "offline"
    whole = "latency" in row.source and "incl. prefill" in row.source
    return "batch" if whole or "static batch" in row.source else "loop"


def _split(row: Row) -> tuple[int, int, int] | None:
    """(tensor, experts, replicas). Of a sample named `..._tp8_ep8_...` the name tells: the file's chips are
    tp x ep there, though experts are split over the same chips. Where its batch is less than its concurrency,
    each chip attends to its own share of the sequences."""
    named = re.search(r"_tp(\d+)(?:_0)?_ep(\d+|none)(?:_0)?(?:_|\s)", row.source)
    wanted = concurrency(row)
    shared = isinstance(row.batch, int) and wanted is not None and row.batch < wanted
    if not named:
        return None if not row.chips or shared else (row.chips, 1, 1)
    tensor = int(named[1])
    experts = int(named[2]) if named[2].isdigit() else 1
    if not row.chips or not tensor or tensor & (tensor - 1) or row.chips not in (tensor, tensor * experts):
        return None
    return tensor, experts, tensor if shared else 1
