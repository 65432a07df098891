"""The serving view as part of a backend; what it needs is imported when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mapper.ir.graph import Graph
    from mapper.machine import Machine
    from mapper.serving.phases import Deployment, Phases, Stack


class ServingView:
    """What the target offers to `mapper serve` and `mapper published`, for its backend to inherit."""

    def phases(self, graph: Graph, machine: Machine, deployment: Deployment) -> Phases:
        """See `mapper.serving.phases.Serves`."""
        from mapper_gpu.serving import phases

        return phases(graph, machine, deployment)

    def stacks(self) -> Sequence[Stack]:
        """The serving software whose constants are known."""
        from mapper_gpu.stacks import stacks

        return stacks()

    def machine_of(self, system: str, source: str) -> str | None:
        """See `mapper.published.evaluate.Systems`."""
        from mapper_gpu.serving import machine_of

        return machine_of(system, source)

    def calibration_systems(self) -> frozenset[str]:
        """The systems whose rows were fitted on."""
        from mapper_gpu.serving import CALIBRATED

        return CALIBRATED
