"""Linears whose results are cut into columns: each piece becomes a linear of its own.

A view of form "cut" stands for columns of such a result: their numbers in the shape that the graph has given
them. Reshapes, slices and concatenations move the numbers about; the first op that computes something with
the piece makes the linear of exactly these rows of the weight, so that heads that are interleaved with others
(or pairs of a rotation that are pulled apart) cost nothing: the weight is stored in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mapper.ir.op import DataflowOp
from mapper_gpu.extractor import MAKERS, VIEWS, Extractor, View, rule
from mapper_gpu.nodes import Pick

Ids = npt.NDArray[np.int64]


@dataclass
class Source:
    """The linear behind cut columns: x, its weight and bias, its row of the ops table and its op, pieces made
    so far by their columns."""

    x: str
    symbol: str
    turned: bool
    bias: Any
    width: int
    row: int
    op: DataflowOp
    made: dict[tuple[int, ...], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Columns of a source: `ids` along the axes of the value that are columns, `axes` says what each axis of
    the value is: "b" the batch, "s" the tokens, "r" both in one, "i" columns."""

    source: Source
    ids: Ids
    axes: str

    @property
    def turned(self) -> bool:
        """Whether heads come before tokens."""
        return self.axes == "bisi"


def cut(c: Extractor, op: DataflowOp, x: str, turned: bool, bias: Any) -> View:
    """The view of a whole linear that is about to be cut."""
    shape = op.result_shape()
    made = Source(x, op.attr("weight"), turned, bias, shape[-1], c.row, op)
    return View("", "cut", Cut(made, np.arange(shape[-1]), "bsi" if len(shape) == 3 else "ri"))


def is_cut(op: DataflowOp) -> bool:
    """Whether an op's result is cut before anything is computed with it."""
    pending = list(op.consumers())
    while pending:
        user = pending.pop()
        if user.mnemonic in ("split", "slice"):
            return True
        if user.mnemonic in ("reshape", "transpose", "cast"):
            pending += user.consumers()
    return False


def view_of_cut(c: Extractor, view: View, to: tuple[int, ...]) -> View:
    """Cut columns in another shape."""
    of: Cut = view.data
    b, s = c.batch, c.tokens
    lead = of.axes.rstrip("i")
    if lead not in ("bs", "r") and not still(of.axes, of.ids.shape, b, s):
        c.fail(f"reshape to {to} of columns before tokens")
    if to[:2] == (b, s) and len(to) > 2:
        axes, inner = "bs", to[2:]
    elif len(to) == 4 and to[0] == b and to[2] == s and (s == 1 or to[1] == 1):
        return View("", "cut", Cut(of.source, of.ids.reshape(to[1], to[3]), "bisi"))
    elif to[0] == b * s:
        axes, inner = "r", to[1:]
    elif len(to) == 3 and to[0] == b and to[1] % s == 0 and to[1] // s * to[2] == of.ids.size:
        axes, inner = "bs", (to[1] // s, to[2])  # tokens and heads in one axis, which only norms look at
    else:
        c.fail(f"reshape to {to} of cut columns [{b} x {s}, {of.ids.size}]")
    return View("", "cut", Cut(of.source, of.ids.reshape(inner), axes + "i" * len(inner)))


def still(axes: str, columns: Sequence[int], b: int, s: int) -> bool:
    """Whether bringing batch and tokens to the front moves no element of a value of these axes (see `Cut`),
    whose axes of columns have these sizes: what they pass has one row."""
    inner = iter(columns)
    sizes = [next(inner) if x == "i" else {"b": b, "s": s}.get(x, 0) for x in axes]
    order = sorted(range(len(sizes)), key=lambda i: ("bsri".index(axes[i]), i))
    busy = [i for i in order if sizes[i] > 1]
    return busy == sorted(busy)


def transposed(c: Extractor, view: View, perm: tuple[int, ...]) -> View:
    """Axes in another order."""
    of: Cut = view.data
    if len(perm) != len(of.axes):
        c.fail(f"transpose by {perm} of cut columns of axes {of.axes}")
    number = {i: of.axes[:i].count("i") for i, x in enumerate(of.axes) if x == "i"}
    ids = of.ids.transpose([number[p] for p in perm if p in number])
    return View("", "cut", Cut(of.source, ids, "".join(of.axes[p] for p in perm)))


@rule("expand", table=VIEWS)
def _expand(c: Extractor, op: DataflowOp) -> None:
    """The same columns several times: each time a row of the weight of its own."""
    of: Cut = c.view(op.operands[0], "cut").data
    before, to = op.operand_shape(0), op.result_shape()
    grown = [x for x, a, b in zip(of.axes, before, to, strict=False) if a != b]
    if len(before) != len(to) or len(to) != len(of.axes) or set(grown) - {"i"}:
        c.fail(f"expand to {to} of cut columns {before} of axes {of.axes}")
    ids = np.broadcast_to(of.ids, [n for x, n in zip(of.axes, to, strict=True) if x == "i"])
    c.views[op.results[0]] = View("", "cut", replace(of, ids=ids))


@rule("split", "slice", table=VIEWS)
def _cut(c: Extractor, op: DataflowOp) -> None:
    view = c.view(op.operands[0], "cut")
    of: Cut = view.data
    rank = len(op.operand_shape(0))
    axis, ranges = _ranges(c, op, rank)
    at = _inner_axis(c, of, axis, rank)
    for result, taken in zip(op.results, ranges, strict=True):
        index = [slice(None)] * of.ids.ndim
        index[at] = taken
        c.views[result] = View("", "cut", replace(of, ids=of.ids[tuple(index)]))


def _inner_axis(c: Extractor, of: Cut, axis: int, rank: int) -> int:
    """The axis of `ids` that an axis of the value is."""
    if rank != len(of.axes) or of.axes[axis] != "i":
        c.fail(f"a cut along axis {axis} of cut columns of axes {of.axes}")
    return of.axes[:axis].count("i")


def _ranges(c: Extractor, op: DataflowOp, rank: int) -> tuple[int, list[slice]]:
    if op.mnemonic == "split":
        ends = np.cumsum(op.attr("sizes")).tolist()
        return op.attr("axis") % rank, [
            slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]  # fmt: skip
    axes, starts, stops, steps = (op.attr(n) for n in ("axes", "starts", "ends", "steps"))
    if len(axes) != 1 or not (starts[0].is_const and stops[0].is_const):
        c.fail("a cut along several axes, or of unknown bounds")
    step = steps[0] if steps else 1
    if step < 1:
        c.fail(f"columns in steps of {step}")
    return axes[0] % rank, [slice(starts[0].value, stops[0].value, step)]


def joined(c: Extractor, op: DataflowOp, views: Sequence[View]) -> View:
    """Columns of heads side by side: of one linear in another order, or of several values ("joined")."""
    rank = len(op.operand_shape(0))
    if op.attr("axis") % rank != rank - 1:
        c.fail("a concatenation along another axis than the columns of heads")
    cuts = [v.data for v in views if v.form == "cut"]
    if len(cuts) == len(views) and all(x.source is cuts[0].source and x.axes == cuts[0].axes for x in cuts):
        return View("", "cut", replace(cuts[0], ids=np.concatenate([x.ids for x in cuts], axis=-1)))
    return View("", "joined", tuple(made(c, v) for v in views))


def made(c: Extractor, view: View) -> View:
    """The view of a value: a linear of cut columns where there was none yet."""
    if view.form != "cut":
        return view
    of: Cut = view.data
    source, ids = of.source, of.ids
    key = (ids.shape[-1] if ids.ndim == 2 else 0, *ids.reshape(-1).tolist())
    if key not in source.made:
        before, c.row, c.op = (c.row, c.op), source.row, source.op
        pick = pick_of(ids.reshape(-1), source.width)
        first = 0 if pick is not None else int(ids.reshape(-1)[0])
        weight = c.matrix(source.symbol, source.turned, first, ids.size, pick)
        source.made[key] = c.linear(source.x, weight, source.bias, "linear", first, pick)
        c.row, c.op = before
    name = source.made[key]
    forms = {"bsi": "rows", "ri": "rows", "bsii": "heads", "rii": "heads", "bisi": "turned"}
    form = forms.get(of.axes)
    if form is None:
        c.fail(f"columns of axes {of.axes}")
    if ids.ndim == 2:
        value = c.values[name]
        c.values[name] = replace(value, head=ids.shape[1])
    return View(name, form)


def pick_of(ids: Ids, width: int) -> Pick | None:
    """Column numbers as equal groups: the most groups of `stride` columns each of which gives the same ones.
    None where they are one run."""
    if (np.diff(ids) == 1).all():
        return None
    for groups in range(len(ids), 0, -1):
        if len(ids) % groups or width % groups:
            continue
        stride, rows = width // groups, ids.reshape(groups, -1)
        inner = rows[0]
        if inner.max() < stride and (rows == inner + stride * np.arange(groups)[:, None]).all():
            return Pick(stride, tuple(inner.tolist()))
    return Pick(width, tuple(ids.tolist()))


MAKERS["cut"] = made
