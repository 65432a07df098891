"""What is generated from an lpu schedule and written beside it."""

from __future__ import annotations

from mapper.backend import Artifact
from mapper.schedule.tables import Schedule
from mapper_lpu import listing, memory_map


def artifacts(schedule: Schedule) -> list[Artifact]:
    """The assembly listing of each program, the memory map and its summary."""
    return [*listing.artifacts(schedule), *memory_map.artifacts(schedule)]
