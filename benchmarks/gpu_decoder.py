"""The schedule's memory image filled with random values, and the same decoder in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mapper.errors import MapperError
from mapper.schedule.tables import Schedule
from mapper.schedule.values import evaluate


@dataclass(frozen=True)
class Shape:
    """The decoder: what the PyTorch side needs of its configuration."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    rotary: int
    eps: float


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
                flat.normal_(0.0, self._gain(port.name) * port.shape[1] ** -0.5)
        self.flat("input_ids").copy_(torch.arange(1, schedule.request.batch + 1))
        self.flat("past_length").fill_(schedule.request.context - 1)

    def _gain(self, name: str) -> float:
        """Queries are sharpened, so that attention is not uniform; what is added to the hidden state is
        scaled as in GPT-2, so that rounding errors do not grow from layer to layer."""
        if "q_proj" in name:
            return 2.0
        layers = sum(name.startswith("cache.key") for name in self.ports)
        return float((2 * layers) ** -0.5) if "o_proj" in name or "down_proj" in name else 1.0

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


def decoder(image: Image, shape: Shape, exact: bool = False) -> Callable[[], Any]:
    """The same step in plain PyTorch, on static caches of its own: a function of no arguments that gives the
    logits [batch, vocabulary]. Products are in the weights' format, the hidden state in float32; `exact` has
    all in float64, one weight at a time."""
    import torch
    from torch.nn import functional

    names = [n for n in image.ports if n.startswith("weight:")]

    def find(*parts: str) -> Any:
        return image.rows(next(n for n in names if all(p in n for p in parts)))

    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
             "input_layernorm", "post_attention_layernorm")  # fmt: skip
    layers = [{p: find(f"layers.{i}.", p) for p in parts} for i in range(shape.layers)]
    own = (lambda t: t) if exact else (lambda t: t.clone())  # float64 works on copies anyway
    caches = [tuple(own(image.flat(f"cache.{k}.{i}")).view(_cache(image, f"cache.{k}.{i}"))
                    for k in ("key", "value")) for i in range(shape.layers)]  # fmt: skip
    table, final, head = find("embed_tokens"), find("model.norm"), find("lm_head")
    half = shape.rotary // 2
    cos, sin = find("rope").view(2, -1, half)
    ids, past = image.flat("input_ids").clone(), image.flat("past_length").clone()
    batch = ids.shape[0]

    wide = torch.float64 if exact else torch.float32
    held = torch.float64 if exact else table.dtype

    def norm(x: Any, weight: Any) -> Any:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.eps)
        return (scaled * weight).to(held)

    def turn(x: Any) -> Any:
        heads = x.to(wide).view(batch, -1, shape.dim)
        a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        c, s = cos[past], sin[past]
        return torch.cat((a * c - b * s, b * c + a * s, rest), -1).to(held)

    def linear(x: Any, weight: Any) -> Any:
        return functional.linear(x, weight.to(held))

    def step() -> Any:
        x = table[ids].to(wide)
        for w, (keys, values) in zip(layers, caches, strict=True):
            keys, values = keys.to(held), values.to(held)  # themselves, unless all is float64
            h = norm(x, w["input_layernorm"])
            q, k = turn(linear(h, w["q_proj"])), turn(linear(h, w["k_proj"]))
            v = linear(h, w["v_proj"]).view(batch, -1, shape.dim)
            # caches are [heads, batch, positions, elements]
            keys.index_copy_(2, past, k.transpose(0, 1)[:, :, None])
            values.index_copy_(2, past, v.transpose(0, 1)[:, :, None])
            made = functional.scaled_dot_product_attention(
                q[:, :, None], keys.transpose(0, 1), values.transpose(0, 1), enable_gqa=True
            )
            x = x + linear(made.reshape(batch, -1), w["o_proj"]).to(wide)
            h = norm(x, w["post_attention_layernorm"])
            inner = functional.silu(linear(h, w["gate_proj"]).to(wide)) * linear(h, w["up_proj"]).to(wide)
            x = x + linear(inner.to(held), w["down_proj"]).to(wide)
        return linear(norm(x, final), head).to(wide)

    return step


def _cache(image: Image, name: str) -> tuple[int, ...]:
    batch, heads, length, dim = image.ports[name].shape
    return heads, batch, length, dim
