"""A machine file as typed numbers in SI units: what every formula of this target reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mapper.errors import MachineError, UsageError
from mapper.machine import Machine

BITS = {"f32": 32, "bf16": 16, "f16": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4.5, "mxfp4": 4.25}
"""Bits of a stored element; block scales of 4-bit formats included (16 and 32 elements to an 8-bit scale)."""
COMPUTE = {"f32": "f32", "bf16": "bf16", "f16": "f16", "fp8": "fp8", "int8": "int8", "int4": "f16"}
COMPUTE |= {"nvfp4": "fp4", "mxfp4": "bf16"}
"""Format that products with weights of a stored format are computed in."""
ENGINES = ("bf16", "f16", "fp8", "int8", "fp4", "f32", "vector")
"""What can do a task's arithmetic, by number."""


@dataclass(frozen=True)
class Gpu:
    """One chip. Rates are per second and sustained where the name says so; sizes in bytes, times in seconds.

    `tensor` is the dense peak by format; `mma` the smallest product (weight columns, rows, bytes of K).
    """

    name: str
    sms: int
    clock: float
    shared: float
    registers: float
    page: int
    in_flight: float
    port: float
    cluster: float
    hbm: float
    efficiency: float
    hbm_latency: float
    capacity: float
    reserved: float
    l2: float
    l2_bandwidth: float
    l2_latency: float
    tensor: Mapping[str, float] = field(hash=False)
    tensor_efficiency: float
    mma: tuple[int, int, int]
    vector: float
    exp: float
    gap: float
    start: float
    step: float
    signal: float
    fetch: float
    link: float
    link_latency: float
    domain: int
    switched: bool
    network: float
    network_latency: float
    megakernel: bool
    systolic: bool

    @property
    def stream(self) -> float:
        """HBM bytes per second that all SMs together reach on long reads."""
        return self.hbm * self.efficiency

    @property
    def sm_stream(self) -> float:
        """HBM bytes per second of one SM alone: its port, or what it keeps in flight over the latency
        (Little's law)."""
        return min(self.port, self.in_flight / self.hbm_latency)

    def rate(self, engine: str) -> float:
        """Operations per second of one SM on `engine`, sustained. Raises UsageError where it has none."""
        if engine == "vector":
            return self.vector / self.sms
        if engine not in self.tensor:
            raise UsageError(f"{self.name} has no {engine} products")
        return self.tensor[engine] * self.tensor_efficiency / self.sms


def gpu(machine: Machine) -> Gpu:
    """The numbers of a machine of this target. Raises MachineError naming what is missing."""
    if machine.target != "gpu":
        raise MachineError(f"machine {machine.name!r} is of target {machine.target}, not gpu")
    v = machine.value
    clock = v("sm.clock")
    multicast = "sm.cluster" in machine.constants
    names = [e for e in ENGINES if f"tensor.{e}" in machine.constants]
    return Gpu(
        name=machine.name, sms=machine.whole("sm.count"), clock=clock, shared=v("sm.shared"),
        registers=v("sm.registers"), page=machine.whole("sm.page"), in_flight=v("sm.in_flight"),
        port=v("sm.port") * clock, cluster=v("sm.cluster") if multicast else 1.0,
        hbm=v("memory.hbm.bandwidth"), efficiency=v("memory.hbm.efficiency"),
        hbm_latency=v("memory.hbm.latency"), capacity=v("memory.hbm.capacity"),
        reserved=v("memory.hbm.reserved"), l2=v("memory.l2.capacity"),
        l2_bandwidth=v("memory.l2.bandwidth"), l2_latency=v("memory.l2.latency"),
        tensor={e: v(f"tensor.{e}") for e in names}, tensor_efficiency=v("tensor.efficiency"),
        mma=(machine.whole("tensor.m"), machine.whole("tensor.n"), machine.whole("tensor.k")),
        vector=v("vector.f32"), exp=v("vector.exp"),
        gap=v("launch.pdl_gap") if v("style.pdl") else v("launch.gap"), start=v("launch.start"),
        step=v("launch.step"), signal=v("signal.latency"), fetch=v("signal.fetch"),
        link=v("link.bandwidth") * v("link.efficiency"), link_latency=v("link.latency"),
        domain=machine.whole("link.domain"), switched=bool(v("link.switched")),
        network=v("network.bandwidth"), network_latency=v("network.latency"),
        megakernel=bool(v("style.megakernel")), systolic=bool(v("geometry.systolic")),
    )  # fmt: skip


def element_bytes(dtype: str) -> float:
    """Bytes of one stored element. Raises UsageError for an unknown format."""
    if dtype not in BITS:
        raise UsageError(f"gpu: unknown format {dtype!r}; known: {', '.join(BITS)}")
    return BITS[dtype] / 8
