"""Names and geometry of the TSP: pure data shared by scheduler, checks, executor and emitters. See ISA.md."""

from __future__ import annotations

from mapper.machine import Machine

LANES = 320
SUPERLANE = 16
SLICES = 44
ROWS = 8192
BANK_ROWS = 4096
STREAMS = 32
ALUS = 16
EAST, WEST = 0, 1
SXM_POSITION = 12
NO_INDEX = 65535

I8, I16, I32, F16, F32 = range(5)
TYPE_BYTES = (1, 2, 4, 2, 4)

IMMEDIATE, OUTER, INNER, ACC = range(4)

LARGE_ALUS = frozenset({0, 2, 5, 7, 8, 10, 13, 15})
SMALL_OPS = frozenset({"vxm.add", "vxm.sub", "vxm.mul", "vxm.neg", "vxm.iadd", "vxm.copy"})
BINARY_OPS = ("vxm.add", "vxm.sub", "vxm.mul", "vxm.max", "vxm.min", "vxm.iadd")
UNARY_OPS = ("vxm.neg", "vxm.copy", "vxm.relu", "vxm.exp2", "vxm.rsqrt", "vxm.tanh")
OPCODES = (
    "mem.read",
    "mem.write",
    "mem.gather",
    "mem.scatter",
    *BINARY_OPS,
    *UNARY_OPS,
    "vxm.cast",
    "mxm.load",
    "mxm.install",
    "mxm.activate",
    "mxm.emit",
    "sxm.permute",
)


def _sxm(h: str) -> list[str]:
    names = ["permute", "transpose0", "transpose1"]
    names += [f"distribute{i}" for i in range(4)] + [f"shift{i}" for i in range(3)]
    return [f"sxm.{h}.{n}" for n in names] + [f"c2c.{h}.{i}" for i in range(4)]


UNITS = (
    *(f"mem.{h}.{s:02d}" for h in "ew" for s in range(SLICES)),
    *(f"vxm.{n:02d}" for n in range(ALUS)),
    *(f"mxm.{h}.{p}.{q}" for h in "ew" for p in (0, 1) for q in ("load", "in", "out")),
    *(name for h in "ew" for name in _sxm(h)),
)
"""The 144 instruction queues. Unit number u < 88 is MEM: hemisphere u // 44 (0 = east), slice u % 44."""


def position(unit: int, crossing: int) -> int:
    """West-east position of a unit; `crossing` is the machine's sxm.crossing in cycles."""
    name = UNITS[unit]
    kind, *rest = name.split(".")
    if kind == "vxm":
        return 0
    sign = 1 if rest[0] == "e" else -1
    if kind == "mem":
        return sign * (1 + int(rest[1]) // 4)
    if kind in ("sxm", "c2c"):
        return sign * SXM_POSITION
    return sign * (SXM_POSITION + crossing)


def mxm_position(machine: Machine) -> int:
    """X, the distance of the MXM from the VXM."""
    return SXM_POSITION + machine.whole("sxm.crossing")
