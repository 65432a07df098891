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
    {"f32": 32.0, "bf16": 16.0, "f16": 16.0, "fp8": 8.0, "int8": 8.0, "nvfp4": 4.5, "mxfp4": 4.25, "int4": 4.5}
)
PRODUCTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    # the formats in which products of such weights can be computed, quickest first
    {
        "f32": ("f32",), "bf16": ("bf16",), "f16": ("bf16",), "fp8": ("fp8", "bf16"), "int8": ("int8", "bf16"),
        "nvfp4": ("fp4", "bf16"), "mxfp4": ("fp4", "bf16"), "int4": ("bf16",),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Of one chip: `cores` SMs (or scratchpad cores), FLOP/s of one core by format, memory in bytes and bytes/s.

    The fractions are what kernels achieve of the peaks: `stream` of HBM bandwidth where weights are read,
    `gather` where cache rows are; `tensor` of the matrix rate at large tiles. `kernel` seconds pass between the
    end of a kernel's work and the start of the next one's in a CUDA graph; `usable` is the share of memory
    that weights and cache may take.
    """

    cores: int
    product: Mapping[str, float]
    memory: float
    bandwidth: float
    stream: float
    gather: float
    tensor: float
    grouped: float
    kernel: float
    usable: float
    fabric: Fabric

    def format(self, weights: str) -> str:
        """The format in which products with `weights` are computed. Raises UsageError where there is none."""
        for name in PRODUCTS.get(weights, ()):
            if name in self.product:
                return name
        known = ", ".join(w for w, p in PRODUCTS.items() if set(p) & set(self.product))
        raise UsageError(f"no products with {weights!r} weights on this machine; it has {known}")


def rates(machine: Machine) -> Rates:
    """The rates of `machine`. Raises MachineError where a constant is missing."""
    clock = machine.value("clock")
    prefix = "tensor.flops_per_cycle."
    product = {
        key.removeprefix(prefix): constant.value * clock
        for key, constant in machine.constants.items()
        if key.startswith(prefix)
    }
    fabric = Fabric(
        machine.whole("link.node"),
        machine.value("link.latency"),
        machine.value("link.bandwidth") * machine.value("link.fraction"),
        machine.value("network.latency"),
        machine.value("network.bandwidth"),
        bool(machine.whole("link.switched")),
    )
    return Rates(
        machine.whole("cores"), MappingProxyType(product), machine.value("hbm.bytes"),
        machine.value("hbm.bandwidth"), machine.value("hbm.stream_fraction"),
        machine.value("hbm.gather_fraction"), machine.value("tensor.fraction"),
        machine.value("tensor.grouped_fraction"), machine.value("kernel.gap"), machine.value("hbm.usable_fraction"),
        fabric,
    )  # fmt: skip
