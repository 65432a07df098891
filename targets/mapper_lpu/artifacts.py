"""Files that are generated from a schedule: listing per queue, memory map."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.backend import Artifact
from mapper.schedule.tables import Schedule
from mapper_lpu import listing, memory_map


def artifacts(schedule: Schedule) -> Sequence[Artifact]:
    """All artifacts of an lpu schedule."""
    return [*listing.artifacts(schedule), *memory_map.artifacts(schedule)]
