"""How much memory of its own a thread needs for the steps of a program."""

from __future__ import annotations

from mapper.schedule.tables import Int
from mapper_host.opcodes import ATTEND_AT, MATRIX, PROJECT
from mapper_kernels.sizes import attend_scratch, project_scratch


def scratch_bytes(rows: Int, args: Int) -> int:
    """The most that any step needs. rows, args: tables as the interpreter takes them."""
    found = {0}
    for opcode, first in {(int(r[0]), int(r[1])) for r in rows[:, :2]}:
        a = args[first:].tolist() if opcode in (PROJECT, ATTEND_AT) else []
        if opcode == PROJECT:
            matrices = a[10 : 10 + MATRIX * a[9]]
            found.add(project_scratch(a[0], a[1], max(matrices[::MATRIX]), a[9]))
        elif opcode == ATTEND_AT:
            found.add(attend_scratch(a[2], a[5]))
    return max(found)
