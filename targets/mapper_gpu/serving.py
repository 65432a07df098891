"""The target's serving view: iteration times of a model on a machine, and the systems of published results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from mapper.errors import UsageError
from mapper.ir.graph import Graph
from mapper.machine import Machine
from mapper.serving.phases import Deployment
from mapper_gpu import stacks
from mapper_gpu.phases import GpuPhases
from mapper_gpu.rates import rates
from mapper_gpu.work import Work, work

SYSTEMS: Mapping[str, str] = MappingProxyType(
    {
        "A100": "a100-80g-sxm", "A100 SXM": "a100-80g-sxm", "A100 80GB": "a100-80g-sxm",
        "A100 SXM 80GB": "a100-80g-sxm", "A100 40GB": "a100-40g-sxm",
        "H100": "h100-sxm", "H100 SXM": "h100-sxm",
        "H200": "h200-sxm", "H200 SXM": "h200-sxm",
        "GH200": "gh200",
        "B200": "b200", "B200 SXM": "b200",
        "GB200": "gb200",
        "B300": "b300", "B300 SXM": "b300",
        "TPU v5e": "tpu-v5e", "TPU v5p": "tpu-v5p", "TPU v6e": "tpu-v6e", "TPU Ironwood": "tpu-ironwood",
        "Trainium2": "trainium2", "Trainium3": "trainium3", "Inferentia2": "inferentia2", "Maia 200": "maia-200",
    }
)  # fmt: skip
POLARIS = "a100-40g-sxm"
"""Argonne's A100s: the modules of its machine Polaris have 40 GB (recalled; the rows do not say)."""
CALIBRATED = frozenset({"H100", "H100 SXM", "H200", "B200", "GB200"})


def machine_of(system: str, source: str) -> str | None:
    """The machine file of a system of published results; None where it is not of this target."""
    if system == "A100" and source.startswith("argonne"):
        return POLARIS
    return SYSTEMS.get(system)


@lru_cache(maxsize=64)
def _work(graph: Graph) -> Work:
    return work(graph)


def phases(graph: Graph, machine: Machine, deployment: Deployment) -> GpuPhases:
    """Iteration times of `graph` on `machine`. Raises CapacityError, UsageError, LoweringError."""
    name = deployment.stack
    if name is not None and name not in stacks.files():
        raise UsageError(f"no serving software called {name[:40]!r}; known: {', '.join(stacks.files())}")
    software = None if name is None else stacks.kernels()
    return GpuPhases(_work(graph), rates(machine, software), deployment, stacks.host(name))
