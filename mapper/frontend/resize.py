"""Making the widths of a sub-graph small, so that it can be evaluated whatever the model's size.

Widths stand in shapes and in slice bounds, alone or as a factor; every occurrence of one is replaced by its
stand-in, so relations between widths survive (two halves of twice a width stay its halves).
"""

from __future__ import annotations

from collections.abc import Mapping

from mapper.ir.dims import Dim

LARGE = 64
"""Widths up to this stay as they are: numbers of that size may mean something else (heads, experts)."""
_MOST = 512  # largest factor beside a width: chosen experts times packed parts


def resized(dim: Dim, table: Mapping[int, int]) -> Dim:
    """`dim` with every coefficient that is a multiple of a width in `table` made that of its stand-in."""
    terms = tuple((monomial, _number(coefficient, table)) for monomial, coefficient in dim.terms)
    return dim if terms == dim.terms else Dim(terms)


def _number(number: int, table: Mapping[int, int]) -> int:
    sign, size = (-1, -number) if number < 0 else (1, number)
    if size in table:
        return sign * table[size]
    for width in sorted(table, reverse=True):
        if size % width == 0 and size // width <= _MOST:
            return sign * (size // width) * table[width]
    return number


def small_widths(inner: int, model: int) -> dict[int, int]:
    """Width -> stand-in, of a model width and the inner width of experts or an MLP, for those that are large.

    Where one is twice the other, so are the stand-ins."""
    table = {inner: 4, 2 * inner: 8} if inner > LARGE else {}
    if model > LARGE and model != 2 * inner:
        table.setdefault(model, 6)
        if 2 * model == inner:
            table[model] = 2
    return table
