"""Einsum, expanded to transposes, reshapes, one batched matrix product per operand, and sums."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.frontend import build as b
from mapper.frontend.lower import Call, lowers
from mapper.frontend.net import Net, Value, product
from mapper.ir.dims import ONE, Dim

Labels = tuple[str, ...]


@lowers("Einsum")
def _einsum(c: Call) -> list[Value]:
    net = c.net
    equation = c.text("equation", "").replace(" ", "")
    operands, arrow, wanted = equation.partition("->")
    terms = operands.split(",")
    if len(terms) != len(c.ins):
        raise c.refuse(f"equation {equation[:60]!r} does not fit {len(c.ins)} operands")
    values = [c.x(i) for i in range(len(terms))]
    labels = [_labels(c, t, v.rank) for t, v in zip(terms, values, strict=True)]
    spread = max((sum(s.startswith(".") for s in one) for one in labels), default=0)
    every = [s for one in labels for s in one]
    if arrow:
        result = _labels(c, wanted, len(wanted.replace("...", "")) + (spread if "..." in wanted else 0))
    else:
        dots = tuple(f".{i}" for i in range(spread, 0, -1))
        result = (*dots, *sorted(s for s in set(every) if not s.startswith(".") and every.count(s) == 1))
    if set(result) - set(every) or len(set(result)) != len(result):
        raise c.refuse(f"equation {equation[:60]!r} has labels in its result that no operand has")
    out, have = _diagonals(net, values[0], labels[0])
    for i in range(1, len(values)):
        later = {s for one in labels[i + 1 :] for s in one} | set(result)
        right, own = _diagonals(net, values[i], labels[i])
        out, have = _product(net, out, have, right, own, later)
    gone = [i for i, s in enumerate(have) if s not in result]
    out = b.reduce(net, "sum", out, gone, False) if gone else out
    kept = [s for s in have if s in result]
    return [b.transpose(net, out, [kept.index(s) for s in result])]


def _labels(c: Call, term: str, rank: int) -> Labels:
    """One label per axis; those of the ellipsis are .n to .1, counted from the right."""
    head, dots, tail = term.partition("...")
    extra = rank - len(head) - len(tail)
    if extra < 0 or (extra and not dots) or not all(s.isascii() and s.isalpha() for s in head + tail):
        raise c.refuse(f"the term {term[:40]!r} of the equation does not fit a tensor of rank {rank}")
    return (*head, *(f".{i}" for i in range(extra, 0, -1)), *tail)


def _diagonals(net: Net, x: Value, labels: Labels) -> tuple[Value, Labels]:
    """Axes of one label become one: off-diagonal elements are set to zero and the second axis is summed."""
    while len(set(labels)) != len(labels):
        at = next(i for i, s in enumerate(labels) if s in labels[:i])
        first = labels.index(labels[at])
        places = b.iota(net, Dim.of(0), x.dims[at], 1)
        row = b.reshape(net, places, [x.dims[at], *[ONE] * (x.rank - first - 1)])
        column = b.reshape(net, places, [x.dims[at], *[ONE] * (x.rank - at - 1)])
        x = b.select(net, b.binary(net, "eq", row, column), x, net.scalar(0, x))
        x = b.reduce(net, "sum", x, [at], False)
        labels = labels[:at] + labels[at + 1 :]
    return x, labels


def _product(
    net: Net, a: Value, have: Labels, other: Value, own: Labels, later: set[str]
) -> tuple[Value, Labels]:
    """The product of two operands, summed over labels that nothing needs later."""
    a, have = _summed(net, a, have, later | set(own))
    other, own = _summed(net, other, own, later | set(have))
    sizes: dict[str, Dim] = {}
    for value, labels in ((a, have), (other, own)):
        for s, d in zip(labels, value.dims, strict=True):
            sizes[s] = d if sizes.get(s, ONE) == ONE else sizes[s]
    shared = [s for s in have if s in own]
    batch = [s for s in shared if s in later]
    inner = [s for s in shared if s not in later]
    rows = [s for s in have if s not in own]
    columns = [s for s in own if s not in have]
    if not inner:
        order = (*batch, *rows, *columns)
        left, right = _placed(net, a, have, order), _placed(net, other, own, order)
        return b.binary(net, "mul", left, right), order
    left = _matrix(net, a, have, sizes, [batch, rows, inner])
    right = _matrix(net, other, own, sizes, [batch, inner, columns])
    out = b.matmul(net, left, right)
    order = (*batch, *rows, *columns)
    return b.reshape(net, out, [sizes[s] for s in order]), order


def _summed(net: Net, x: Value, labels: Labels, needed: set[str]) -> tuple[Value, Labels]:
    gone = [i for i, s in enumerate(labels) if s not in needed]
    return (b.reduce(net, "sum", x, gone, False) if gone else x), tuple(s for s in labels if s in needed)


def _placed(net: Net, x: Value, labels: Labels, order: Sequence[str]) -> Value:
    """`x` with its axes in the order of `order`, 1 where it lacks a label."""
    x = b.transpose(net, x, [labels.index(s) for s in order if s in labels])
    dims = iter(x.dims)
    return b.reshape(net, x, [next(dims) if s in labels else ONE for s in order])


def _matrix(
    net: Net, x: Value, labels: Labels, sizes: dict[str, Dim], parts: Sequence[Sequence[str]]
) -> Value:
    """[batch..., first group, second group] with each group flattened."""
    batch, first, second = parts
    x = b.transpose(net, x, [labels.index(s) for s in (*batch, *first, *second)])
    x = b.expand(
        net, x, [x.dims[i] if i < len(batch) else sizes[s] for i, s in enumerate((*batch, *first, *second))]
    )
    head = x.dims[: len(batch)]
    groups = [product([sizes[s] for s in group]) for group in (first, second)]
    return b.reshape(net, x, [*head, *groups])
