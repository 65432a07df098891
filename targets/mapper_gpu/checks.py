"""The target's own legality predicates. They know tables, plan and machine, never the scheduler or the
executor."""

from __future__ import annotations

from mapper.schedule.violation import Check
from mapper_gpu import (
    check_exchange,
    check_experts,
    check_lowbit,
    check_operands,
    check_stages,
    check_tiles,
    check_waits,
)

CHECKS: tuple[Check, ...] = (
    *check_operands.CHECKS, *check_tiles.CHECKS, *check_experts.CHECKS, *check_waits.CHECKS,
    *check_lowbit.CHECKS, *check_stages.CHECKS, *check_exchange.CHECKS,
)  # fmt: skip
"""All of them."""
