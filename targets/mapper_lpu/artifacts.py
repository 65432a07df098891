"""Files that are generated from a schedule: listing per queue, memory map, trace."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.backend import Artifact
from mapper.report.perfetto import trace
from mapper.schedule.tables import Schedule
from mapper_lpu import listing, memory_map


def artifacts(schedule: Schedule) -> Sequence[Artifact]:
    """All artifacts of an lpu schedule."""
    made = [*listing.artifacts(schedule), *memory_map.artifacts(schedule)]
    return [*made, Artifact("trace.json", trace(schedule))]
