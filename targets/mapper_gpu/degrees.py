"""How chips share a model: what `--parallel` asks for.

A stage of a pipeline is `data` replicas of `tensor` chips, chips of a replica next to each other. Experts are
cut over the chips of a replica like all matrices, or held whole: `expert` groups of chips have each
count / expert of them. These groups are all inside a replica, or spread over all replicas, whose tokens then
pass from replica to replica."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mapper.errors import UsageError
from mapper.schedule.tables import Request

Near = Literal["own", "replica", "rank"]
"""Chips of a stage seen from one of them: itself; those of its replica; those of the same rank in replicas
that share experts with its own."""
NAMES = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "dp": "data"}
_FORM = "gpu: --parallel takes tp=N,pp=N,ep=N,dp=N"


@dataclass(frozen=True)
class Degrees:
    """Chips that share each matrix (`tensor`), stages that share the layers (`pipeline`), groups that share
    the experts (`expert`), replicas with sequences of their own (`data`)."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1

    @property
    def group(self) -> int:
        """Chips of a stage."""
        return self.tensor * self.data

    @property
    def chips(self) -> int:
        """All chips."""
        return self.group * self.pipeline

    @property
    def spread(self) -> int:
        """Replicas that share the experts of one another: all, or a replica alone."""
        return self.data if self.expert > 1 else 1

    @property
    def inside(self) -> int:
        """Groups of one replica's chips that have experts of their own."""
        return self.expert // self.spread

    def near(self, chip: int, which: Near) -> list[int]:
        """Chips of a stage as `which` says, counted from its first."""
        first = chip // self.tensor * self.tensor
        if which == "replica":
            return list(range(first, first + self.tensor))
        return list(range(chip - first, self.group, self.tensor)) if which == "rank" else [chip]


def degrees_of(text: str, chips: int) -> Degrees:
    """What `--parallel` asks for, as "tp=4,pp=2"; "" is tensor parallelism over all chips, and tp is what is
    left where it is not named. Raises UsageError for what is not known, or does not make `chips`."""
    found = _numbers(text)
    rest = found.get("pipeline", 1) * found.get("data", 1)
    if "tensor" not in found and rest and chips % rest == 0:
        found["tensor"] = chips // rest
    made = Degrees(**found)
    if made.chips != chips or chips < 1 or made.expert < 1:
        parts = " x ".join(f"{k}={getattr(made, v)}" for k, v in NAMES.items() if k != "ep" and v in found)
        raise UsageError(f"gpu: {parts} are {made.chips} chips, --chips says {chips}")
    if made.expert % made.spread or made.tensor % made.inside:
        over = f", in dp={made.data} replicas" if made.data > 1 else ""
        raise UsageError(f"gpu: ep={made.expert} groups do not divide tp={made.tensor} chips{over} evenly")
    return made


def _numbers(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, number = part.partition("=")
        known = NAMES.get(name)
        if known is None or known in found or not number.isascii() or not number.isdigit() or len(number) > 5:
            raise UsageError(f"{_FORM}, not {text[:40]!r}")
        found[known] = int(number)
    return found


def settled(request: Request) -> Request:
    """The request with the number of chips that its degrees make, where it leaves that open. Raises
    UsageError."""
    if not request.parallel or request.chips is not None:
        return request
    found = _numbers(request.parallel)
    product = 1
    for name in ("tensor", "pipeline", "data"):
        product *= found.get(name, 1)
    return replace(request, chips=max(1, product))


def own(request: Request) -> Request:
    """The request of one replica: its share of the sequences. Raises UsageError where they do not divide."""
    if not request.parallel:
        return request
    data = max(1, _numbers(request.parallel).get("data", 1))
    if request.batch % data:
        raise UsageError(
            f"gpu: dp={data} replicas do not share {request.batch} sequences evenly; --batch is that of all"
        )
    return replace(request, batch=request.batch // data)
