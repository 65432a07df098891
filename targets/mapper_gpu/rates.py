"""A GPU-like machine's constants as the numbers that kernel times are made of, read once from its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mapper.errors import UsageError
from mapper.machine import Machine
from mapper_gpu.collectives import Fabric

BITS: Mapping[str, float] = MappingProxyType(
    # block formats with their scales: nvfp4 one fp8 per 16, mxfp4 one byte per 32, int4 one bf16 per 32
    {
        "f32": 32.0,
        "bf16": 16.0,
        "f16": 16.0,
        "fp8": 8.0,
        "int8": 8.0,
        "nvfp4": 4.5,
        "mxfp4": 4.25,
        "int4": 4.5,
    }
)
PRODUCTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    # the formats in which products of such weights can be computed, quickest first
    {
        "f32": ("f32",),
        "bf16": ("bf16",),
        "f16": ("bf16",),
        "fp8": ("fp8", "bf16"),
        "int8": ("int8", "bf16"),
        "nvfp4": ("fp4", "bf16"),
        "mxfp4": ("fp4", "bf16"),
        "int4": ("bf16",),
    }
)


@dataclass(frozen=True)
class Rates:
    """Of one chip: `cores` SMs (or scratchpad cores), bytes/s into each, FLOP/s of all by format, memory in
    bytes, bytes/s.

    The rest is what kernels make of it: `stream` of the HBM bandwidth; `tensor` of the matrix rate at large
    tiles; `grouped` times both for routed experts, and `unpack` times both where weights of a format that
    the tensor cores lack are unpacked on the way. `kernel` seconds pass between the end of a kernel's work
    and the start of the next one's; `usable` is the share of memory that weights and cache usually take,
    `most` the share that they can.
    """

    cores: int
    port: float
    product: Mapping[str, float]
    memory: float
    bandwidth: float
    stream: float
    tensor: float
    grouped: float
    unpack: float
    kernel: float
    usable: float
    most: float
    fabric: Fabric

    def unpacked(self, weights: str) -> float:
        """The share of the rates that is left where `weights` have to be unpacked to bf16 first."""
        return self.unpack if BITS[weights] < 16 and self.format(weights) == "bf16" else 1.0

    def format(self, weights: str) -> str:
        """The format in which products with `weights` are computed. Raises UsageError where there is none."""
        for name in PRODUCTS.get(weights, ()):
            if name in self.product:
                return name
        known = ", ".join(w for w, p in PRODUCTS.items() if set(p) & set(self.product))
        raise UsageError(f"no products with {weights!r} weights on this machine; it has {known}")


def rates(machine: Machine, software: Machine) -> Rates:
    """The rates of `machine` under the kernels of `software`, whose constants are shares of what the
    machine's file says that memory and products reach. Raises MachineError where a constant is missing."""
    m, s = machine.value, software.value
    names = ("f32", "bf16", "f16", "fp8", "fp4", "int8")
    product = {n: m(f"tensor.{n}") for n in names if f"tensor.{n}" in machine.constants}
    fabric = Fabric(
        machine.whole("link.domain"), s("exchange.latency"), m("link.bandwidth") * m("link.efficiency"),
        m("network.latency"), m("network.bandwidth"), bool(machine.whole("link.switched")),
    )  # fmt: skip
    best = machine.get("memory.hbm.efficiency").high
    full = machine.get("memory.hbm.capacity")
    return Rates(
        cores=machine.whole("sm.count"),
        port=m("sm.port") * m("sm.clock"),
        product=MappingProxyType(product),
        memory=m("memory.hbm.capacity"),
        bandwidth=m("memory.hbm.bandwidth"),
        stream=best * s("kernels.stream"),
        tensor=m("tensor.efficiency") * s("kernels.tensor"),
        grouped=s("kernels.grouped"),
        unpack=s("kernels.unpack"),
        kernel=s("kernels.gap"),
        usable=1 - m("memory.hbm.reserved"),
        most=(1 - machine.get("memory.hbm.reserved").low) * full.high / full.value,
        fabric=fabric,
    )
