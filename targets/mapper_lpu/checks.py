"""The checks of the lpu target, written from ISA.md; they know the tables and the machine, never the
scheduler."""

from __future__ import annotations

from mapper.schedule.checks import Check
from mapper_lpu.check_listing import InstructionMemory, ListingMatches
from mapper_lpu.check_mem import MemHazards, MemPorts
from mapper_lpu.check_mxm import MxmWeights
from mapper_lpu.check_queue import ProgramEnds, QueueOrder, TimingDataIndependent
from mapper_lpu.check_streams import StreamArrival, StreamExclusive
from mapper_lpu.check_values import NothingIdle, ValueNames
from mapper_lpu.check_vxm import VxmWiring

CHECKS: tuple[Check, ...] = (
    QueueOrder(),
    TimingDataIndependent(),
    MemPorts(),
    StreamExclusive(),
    StreamArrival(),
    ValueNames(),
    VxmWiring(),
    MxmWeights(),
    MemHazards(),
    NothingIdle(),
    ProgramEnds(),
    InstructionMemory(),
    ListingMatches(),
)
"""All of them; run after the shared checks."""
