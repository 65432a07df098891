"""Ops that only look at a value in another shape."""

from __future__ import annotations

from dataclasses import replace

from mapper.ir.op import DataflowOp
from mapper_gpu.extract_cut import joined, transposed, view_of_cut
from mapper_gpu.extractor import VIEWS, Extractor, View, rule


@rule("reshape", table=VIEWS)
def _reshape(c: Extractor, op: DataflowOp) -> None:
    view, to = c.views[op.operands[0]], op.result_shape()
    if view.form in ("vector", "constant"):
        c.views[op.results[0]] = view
        return
    if view.form == "cut":
        c.views[op.results[0]] = view_of_cut(c, view, to)
        return
    b, s = c.batch, c.tokens
    value = c.values.get(view.name)
    if value is None:
        c.fail("a reshape of what is no activation")
    width = value.width
    flat = to in ((b, s, width), (b * s, width))
    if flat and view.form in ("rows", "heads"):
        c.views[op.results[0]] = View(view.name, "rows")
    elif len(to) == 4 and to[:2] == (b, s) and to[2] * to[3] == width and view.form in ("rows", "heads"):
        c.views[op.results[0]] = _headed(c, view, to[3], "heads")
    elif (
        len(to) == 3
        and to[0] == b
        and to[1] * to[2] == s * width
        and width % to[2] == 0
        and (view.form in ("rows", "heads"))
    ):
        c.views[op.results[0]] = _headed(c, view, to[2], "heads")  # tokens and heads in one axis
    elif len(to) == 4 and to[0] == b and to[2] == s and view.form == "rows" and to[1] * to[3] == width and (
        s == 1 or to[1] == 1
    ):  # fmt: skip
        c.views[op.results[0]] = _headed(c, view, to[3], "turned")
    elif flat and view.form == "turned" and (s == 1 or value.head == width):
        c.views[op.results[0]] = View(view.name, "rows")
    else:
        c.fail(f"reshape to {to} of {view.form} [{b} x {s}, {width}]")


def _headed(c: Extractor, view: View, head: int, form: str) -> View:
    value = c.values[view.name]
    if value.head not in (0, head):
        c.fail(f"heads of {head} and of {value.head} columns in one value")
    c.values[view.name] = replace(value, head=head)
    return View(view.name, form)


@rule("transpose", table=VIEWS)
def _transpose(c: Extractor, op: DataflowOp) -> None:
    view, perm = c.views[op.operands[0]], op.attr("perm")
    if view.form == "cut":
        c.views[op.results[0]] = transposed(c, view, perm)
        return
    if view.form in ("vector", "table") and perm == (1, 0):
        c.views[op.results[0]] = View(view.name, "table", view.form == "vector" or not view.data)
        return
    if perm != (0, 2, 1, 3):
        c.fail(f"transpose by {perm}")
    view = c.view(op.operands[0], "heads", "turned")
    c.views[op.results[0]] = View(view.name, "turned" if view.form == "heads" else "heads")


@rule("concat", table=VIEWS)
def _concat(c: Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = joined(c, op, [c.views[v] for v in op.operands])


@rule("cast", table=VIEWS)
def _same(c: Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = c.views[op.operands[0]]


@rule("constant", table=VIEWS)
def _constant(c: Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = View("", "constant", c.constant(op.results[0]))


@rule("load", table=VIEWS)
def _load(c: Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = View(op.attr("weight"), "vector")
