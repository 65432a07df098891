"""How much memory of its own a thread needs for the steps of a program."""

from __future__ import annotations

from mapper.schedule.tables import Int
from mapper_host.opcodes import ATTEND_AT, EXPERTS_DOWN, EXPERTS_UP, PROJECT
from mapper_kernels.names import PROJECT_EACH, PROJECT_HEAD
from mapper_kernels.sizes import attend_scratch, experts_scratch, project_scratch

_OWN = (PROJECT, ATTEND_AT, EXPERTS_UP, EXPERTS_DOWN)


def scratch_bytes(rows: Int, args: Int) -> int:
    """The most that any step needs. rows, args: tables as the interpreter takes them."""
    found = {0}
    for opcode, first in {(int(r[0]), int(r[1])) for r in rows[:, :2]}:
        a = args[first:].tolist() if opcode in _OWN else []
        if opcode == PROJECT:
            matrices = a[PROJECT_HEAD : PROJECT_HEAD + PROJECT_EACH * a[PROJECT_HEAD - 1]]
            found.add(project_scratch(a[0], a[1], max(matrices[::PROJECT_EACH]), a[PROJECT_HEAD - 1]))
        elif opcode == ATTEND_AT:
            found.add(attend_scratch(a[1] // a[3], a[2], a[5]))
        elif opcode == EXPERTS_UP:
            found.add(experts_scratch(a[0] * a[1], a[2], a[3], 2 * a[4]))
        elif opcode == EXPERTS_DOWN:
            found.add(experts_scratch(a[0] * a[1], a[2], a[3], a[4]))
    return max(found)
