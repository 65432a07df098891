"""Columns of tiles as Triton variables: plain ones, or heads cut into the halves that rotation pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mapper_gpu.triton_code import Group, Json, power


@dataclass(frozen=True)
class HeadShape:
    """What a program's head-wise instructions say of a head: its columns, how many of them rotate (0: none),
    and how these are paired."""

    head: int
    rotary: int
    style: str

    @property
    def parts(self) -> list[tuple[str, str, int]]:
        """(suffix, place in the head of element {e}, elements) of the groups."""
        if not self.rotary:
            return [("", "{e}", self.head)]
        half = self.rotary // 2
        near = ("{e}", f"{{e}} + {half}") if self.style == "half" else ("2 * {e}", "2 * {e} + 1")
        found = [("_a", near[0], half), ("_b", near[1], half)]
        if self.rotary < self.head:
            found.append(("_c", f"{{e}} + {self.rotary}", self.head - self.rotary))
        return found


def head_shape(programs: Sequence[Json]) -> HeadShape | None:
    """The heads of programs that work on them, or None where they do not."""
    codes = [i for p in programs for i in p["code"]]
    ropes = [i for i in codes if i[0] == "rope"]
    norms = [i[8] for i in codes if i[0] == "norm" and i[8]]
    if ropes:
        return HeadShape(int(ropes[0][7]), int(ropes[0][6]), ropes[0][5])
    return HeadShape(int(norms[0]), 0, "") if norms else None


@dataclass(frozen=True)
class Columns:
    """Groups of columns, each with the statements that make its variables `n*` (one-dimensional), and how
    many there are, padded."""

    lines: tuple[str, ...]
    groups: tuple[Group, ...]
    extents: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Columns of all groups, padded."""
        return sum(self.extents)


def columns(
    first: str, width: int, total: int, heads: HeadShape | None, least: int = 1, mark: str = ""
) -> Columns:
    """The columns first .. first + width of `total`; `first` is an expression. Extents are at least `least`.
    `mark` tells the variables of several such runs in one kernel apart."""
    if heads is None:
        extent = max(least, power(width))
        lines = [f"n{mark} = {first} + tl.arange(0, {extent})"]
        mask = ""
        if extent != width or total % width:
            inside = f"(tl.arange(0, {extent}) < {width}) & " if extent != width else ""
            lines.append(f"n_ok{mark} = {inside}(n{mark} < {total})")
            mask = f"n_ok{mark}[None, :]"
        return Columns(tuple(lines), (Group(mark, f"n{mark}[None, :]", mask),), (extent,))
    count = width // heads.head
    lines, groups, extents = [], [], []
    for part, place, size in heads.parts:
        lanes, suffix = power(size), part + mark
        padded = max(power(count), -(-least // lanes))
        e, n, extent = f"e{suffix}", f"n{suffix}", padded * lanes
        if lanes * padded == lanes:
            lines.append(f"{e} = tl.arange(0, {extent})")
            at = first
        else:
            lines.append(f"{e} = tl.arange(0, {extent}) % {lanes}")
            at = f"{first} + tl.arange(0, {extent}) // {lanes} * {heads.head}"
        lines.append(f"{n} = {at} + {place.format(e=e)}")
        conditions = [f"({e} < {size})"] if lanes != size else []
        conditions += [f"(tl.arange(0, {extent}) < {count * lanes})"] if padded != count else []
        conditions += [f"({n} < {total})"] if total % width else []
        if conditions:
            lines.append(f"n_ok{suffix} = {' & '.join(conditions)}")
        mask = f"n_ok{suffix}[None, :]" if conditions else ""
        groups.append(Group(suffix, f"{n}[None, :]", mask, f"{e}[None, :]", padded, lanes))
        extents.append(extent)
    return Columns(tuple(lines), tuple(groups), tuple(extents))


def upright(index: str) -> str:
    """A row of columns as a column: for the rows of a weight."""
    return index.replace("[None, :]", "[:, None]")
