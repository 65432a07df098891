"""Target `lpu`: one Groq TSP chip, scheduled instruction by instruction in space and time. See ISA.md."""

from mapper_lpu.backend import LpuBackend

BACKEND = LpuBackend()
