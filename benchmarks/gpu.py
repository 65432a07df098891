"""The emitted decode step of Llama-3.1-8B on an NVIDIA GPU: measured beside modelled, and beside PyTorch.

    python -m benchmarks.gpu                        # batch 1 and 32, context 2048, bf16 random weights
    python -m benchmarks.gpu --batch 1 --json

Per kernel: device time by CUDA events, and the schedule's. Per step: the kernels in a CUDA graph, the
schedule, `torch.compile` of the same decoder, and that decoder in a hand-captured CUDA graph. The PyTorch
decoder takes its weights from the schedule's memory image; its logits are a second opinion on the kernels'.
Without a GPU it says so and exits with 2; `--tiny` runs a small shape on the CPU under Triton's interpreter
and compares the logits alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mapper
from mapper.errors import MapperError
from mapper.schedule.tables import Schedule
from mapper.schedule.values import evaluate

MODEL = "llama-3.1-8b"
MACHINES = (
    ("H200", "h200-sxm"),
    ("GH200", "gh200"),
    ("H100", "h100-sxm"),
    ("B200", "b200"),
    ("A100", "a100-80g-sxm"),
)
"""What a device calls itself, and the machine file whose predictions are shown beside it."""
ALLOWED = {"f32": 1e-4, "bf16": 3e-2}
"""Difference of logits, over their largest, between the kernels and PyTorch: bf16 keeps 8 bits."""


@dataclass(frozen=True)
class Shape:
    """The decoder: what the PyTorch side needs of its configuration."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    eps: float


def compiled(tiny: bool, batch: int, context: int, machine: str, folder: Path) -> tuple[Schedule, Shape]:
    """The decode schedule and the decoder's shape."""
    from mapper.zoo.families import config, shortened
    from mapper.zoo.families import tiny as small
    from mapper.zoo.files import write

    made = config(MODEL)
    made = shortened(small(made), 2) if tiny else made
    write(made, folder / "model.onnx", "f32" if tiny else "bf16", None)
    schedule = mapper.compile(folder / "model.onnx", target="gpu", machine=machine, batch=batch,
                              context=context, phase="decode", out=folder / "schedule")  # fmt: skip
    return schedule, Shape(len(made.layers), made.heads, made.kv_heads, made.head_dim, made.eps)


class Image:
    """The schedule's memory on a device: random weights, caches of `context` rows, and a token."""

    def __init__(self, schedule: Schedule, device: str) -> None:
        import torch

        from mapper_gpu.triton_run import image_bytes

        self.schedule, self.ports = schedule, {p.name: p for p in schedule.ports}
        self.memory = torch.zeros(image_bytes(schedule), dtype=torch.uint8, device=device)
        self._offset, self._size = (schedule.buffers.column(c).to_pylist() for c in ("offset", "bytes"))
        torch.manual_seed(2024)
        for port in schedule.ports:
            flat = self.flat(port.name)
            if port.kind == "state":
                flat.normal_()
            elif port.name.startswith("weight:rope"):
                table = evaluate(port.source, _absent, schedule.constants.__getitem__)
                flat.copy_(torch.from_numpy(table.reshape(-1).copy()))
            elif port.kind == "weight" and port.shape[0] == 1:
                flat.normal_(1.0, 0.1)
            elif port.kind == "weight":
                # queries and keys are sharpened, so that attention is not uniform
                gain = 3.0 if "q_proj" in port.name or "k_proj" in port.name else 1.0
                flat.normal_(0.0, gain * port.shape[1] ** -0.5)
        self.flat("input_ids").copy_(torch.arange(1, schedule.request.batch + 1))
        self.flat("past_length").fill_(schedule.request.context - 1)

    def flat(self, name: str) -> Any:
        """A port's buffer as a flat tensor."""
        import torch

        port = self.ports[name]
        low = self._offset[port.buffers[0]]
        return self.memory[low : low + self._size[port.buffers[0]]].view(getattr(torch, port.dtype))

    def rows(self, name: str) -> Any:
        """A port's [rows, width] array in row-major order, out of its panels."""
        port = self.ports[name]
        width, panel = port.shape[-1], int(port.layout["panel"])
        return self.flat(name).view(width // panel, -1, panel).transpose(0, 1).reshape(-1, width)


def _absent(name: str) -> Any:
    raise MapperError(f"weight {name} is random")


def decoder(image: Image, shape: Shape) -> Callable[[], Any]:
    """The same step in plain PyTorch, on static caches of its own: a function of no arguments that gives the
    logits [batch, vocabulary]."""
    import torch
    from torch.nn import functional

    names = [n for n in image.ports if n.startswith("weight:")]
    find = lambda *parts: image.rows(next(n for n in names if all(p in n for p in parts)))  # noqa: E731
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
             "input_layernorm", "post_attention_layernorm")  # fmt: skip
    layers = [{p: find(f"layers.{i}.", p) for p in parts} for i in range(shape.layers)]
    caches = [tuple(image.flat(f"cache.{k}.{i}").clone().view(_cache(image, f"cache.{k}.{i}"))
                    for k in ("key", "value")) for i in range(shape.layers)]  # fmt: skip
    table, final, head = find("embed_tokens"), find("model.norm"), find("lm_head")
    cos, sin = find("rope").view(2, -1, shape.dim // 2)
    ids, past = image.flat("input_ids").clone(), image.flat("past_length").clone()
    batch = ids.shape[0]

    def norm(x: Any, weight: Any) -> Any:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + shape.eps)
        return (scaled * weight).to(table.dtype)

    def turn(x: Any) -> Any:
        a, b = x.float().view(batch, -1, shape.dim).chunk(2, -1)
        c, s = cos[past], sin[past]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(table.dtype)

    def step() -> Any:
        x = table[ids].float()
        for w, (keys, values) in zip(layers, caches, strict=True):
            h = norm(x, w["input_layernorm"])
            q, k = turn(functional.linear(h, w["q_proj"])), turn(functional.linear(h, w["k_proj"]))
            v = functional.linear(h, w["v_proj"]).view(batch, -1, shape.dim)
            # caches are [heads, batch, positions, elements]
            keys.index_copy_(2, past, k.transpose(0, 1)[:, :, None])
            values.index_copy_(2, past, v.transpose(0, 1)[:, :, None])
            made = functional.scaled_dot_product_attention(
                q[:, :, None], keys.transpose(0, 1), values.transpose(0, 1), enable_gqa=True
            )
            x = x + functional.linear(made.reshape(batch, -1), w["o_proj"]).float()
            h = norm(x, w["post_attention_layernorm"])
            inner = functional.silu(functional.linear(h, w["gate_proj"]).float())
            inner = inner * functional.linear(h, w["up_proj"]).float()
            x = x + functional.linear(inner.to(table.dtype), w["down_proj"]).float()
        return functional.linear(norm(x, final), head).float()

    return step


def _cache(image: Image, name: str) -> tuple[int, ...]:
    batch, heads, length, dim = image.ports[name].shape
    return heads, batch, length, dim


def difference(image: Image, run: Callable[[], Any], step: Callable[[], Any]) -> float:
    """Largest difference of the logits over their largest magnitude."""
    import torch

    with torch.no_grad():
        run()
        mine, other = image.rows("logits").float(), step()
    return float((mine - other).abs().max() / other.abs().max())


def timed(run: Callable[[], Any], repeats: int = 50) -> float:
    """Median seconds of a step on the GPU."""
    import torch

    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return sorted(found)[repeats // 2]


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """A step in a CUDA graph, after three runs on a side stream."""
    import torch

    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]


def measure(tiny: bool, batch: int, context: int, device: str, machine: str) -> dict[str, Any]:
    """One point: the differences of the logits, and on a GPU all times."""
    import torch

    from mapper_gpu.triton_run import Runner, module

    with tempfile.TemporaryDirectory() as name:
        schedule, shape = compiled(tiny, batch, context, machine, Path(name))
        image = Image(schedule, device)
        kernels = module(schedule, "decode", Path(name) / "schedule")
        runner = Runner(schedule, "decode", kernels, image.memory)
        step = decoder(image, shape)
        found: dict[str, Any] = {"batch": batch, "context": context, "machine": machine, "device": device}
        found["difference"] = difference(image, runner.run, step)
        found["allowed"] = ALLOWED["f32" if tiny else "bf16"]
        if device == "cpu":
            return found
        graph = runner.capture()
        found["device"] = torch.cuda.get_device_name()
        found["step"] = {
            "modelled": schedule.programs["decode"].cycles / schedule.clock_hz,
            "kernels in a CUDA graph": timed(graph.replay),
            "PyTorch in a CUDA graph": timed(captured(step)),
        }
        fast = torch.compile(step, mode="max-autotune-no-cudagraphs")
        found["step"]["torch.compile in a CUDA graph"] = timed(captured(fast))
        found["kernels"] = _kernels(runner)
    return found


def _kernels(runner: Any) -> list[dict[str, Any]]:
    """Measured and modelled time of each kernel, a repeated one once with its count; a merge is part of the
    kernel before it in the model."""
    rows: dict[str, dict[str, Any]] = {}
    for launch, seconds in runner.seconds():
        row = rows.setdefault(
            launch.kernel, {"kernel": launch.kernel, "count": 0, "measured": 0.0, "modelled": launch.seconds}
        )
        row["count"] += 1
        row["measured"] += seconds
    return [{**r, "measured": r["measured"] / r["count"]} for r in rows.values()]


def show(found: dict[str, Any]) -> None:
    """The tables of one point."""
    print(f"\nbatch {found['batch']}, context {found['context']}, {found['device']}, as {found['machine']}")
    print(
        f"logits differ from PyTorch's by {found['difference']:.2e} of the largest, "
        f"limit {found['allowed']:g}"
    )
    for row in found.get("kernels", ()):
        print(f"  {row['kernel']:<44} x{row['count']:<4} {row['measured'] * 1e6:>9.2f} us measured "
              f"{row['modelled'] * 1e6:>9.2f} us modelled")  # fmt: skip
    for name, seconds in found.get("step", {}).items():
        print(f"  step, {name:<34} {seconds * 1e3:>9.3f} ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the logits agree, 1 where they do not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="The emitted decode step on a GPU, beside PyTorch.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        print("error: this needs torch and triton: pip install 'inference-mapper[gpu]'", file=sys.stderr)
        return 2
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not asked.tiny:
        print("error: no NVIDIA GPU is here, so nothing is measured", file=sys.stderr)
        return 2
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    called = torch.cuda.get_device_name() if gpu else ""
    machine = next((file for part, file in MACHINES if part in called), "h100-sxm")
    try:
        found = [
            measure(asked.tiny, b, asked.context, "cuda" if gpu else "cpu", machine) for b in asked.batch
        ]
    except MapperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for point in [] if asked.json else found:
        show(point)
    if asked.json:
        print(json.dumps(found))
    return 0 if all(p["difference"] <= p["allowed"] for p in found) else 1


if __name__ == "__main__":
    sys.exit(main())
