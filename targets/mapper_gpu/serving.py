"""The target's serving view: iteration times of a model on a machine, and the systems of published
results."""

from __future__ import annotations

import re
from functools import lru_cache

from mapper.errors import UsageError
from mapper.ir.graph import Graph
from mapper.machine import Machine
from mapper.serving.phases import Deployment, Phases
from mapper_gpu import stacks
from mapper_gpu.compiled import CompiledPhases, shape_of
from mapper_gpu.hardware import gpu
from mapper_gpu.phases import GpuPhases
from mapper_gpu.rates import rates
from mapper_gpu.work import Work, work

SYSTEMS: tuple[tuple[str, str], ...] = (
    (r"A100.*\b40 ?GB", "a100-40g-sxm"),
    (r"A100\b", "a100-80g-sxm"),
    (r"GH200\b", "gh200"),
    (r"H100\b(?!.*(PCIe|NVL))", "h100-sxm"),
    (r"H200\b(?!.*NVL)", "h200-sxm"),
    (r"GB200\b", "gb200"),
    (r"B200\b", "b200"),
    (r"B300\b", "b300"),
    (r"TPU v5e\b", "tpu-v5e"),
    (r"TPU v5p\b", "tpu-v5p"),
    (r"TPU v6e\b", "tpu-v6e"),
    (r"(TPU )?Ironwood\b", "tpu-ironwood"),
    (r"Trainium ?2\b", "trainium2"),
    (r"Trainium ?3\b", "trainium3"),
    (r"Inferentia ?2\b", "inferentia2"),
    (r"Maia ?200\b", "maia-200"),
)
"""How the names of systems in published results begin, and the machine file of each."""
POLARIS = "a100-40g-sxm"
"""Argonne's A100s: the modules of its machine Polaris have 40 GB (recalled; the rows do not say)."""
CALIBRATED = frozenset({"H100", "H100 SXM", "H200", "B200", "GB200"})


def machine_of(system: str, source: str) -> str | None:
    """The machine file of a system of published results; None where it is not of this target."""
    if system == "A100" and source.startswith("argonne"):
        return POLARIS
    return next((machine for pattern, machine in SYSTEMS if re.match(pattern, system)), None)


@lru_cache(maxsize=64)
def _work(graph: Graph) -> Work:
    return work(graph)


def phases(graph: Graph, machine: Machine, deployment: Deployment) -> Phases:
    """Iteration times of `graph` on `machine`: under the kernels and host of the stack that the deployment
    names, else on mapper's own kernels. Raises CapacityError, UsageError, LoweringError."""
    name, items = deployment.stack, _work(graph)
    if name is None:
        return CompiledPhases(shape_of(graph.name, items), gpu(machine), deployment)
    if name not in stacks.files():
        raise UsageError(f"no serving software called {name[:40]!r}; known: {', '.join(stacks.files())}")
    return GpuPhases(items, rates(machine, stacks.kernels()), deployment, stacks.host(name))
