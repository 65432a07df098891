"""A serving graph as sections of nodes: heads become columns, views vanish, MLPs come apart into their
products.

Every node keeps what its meaning needs in its attributes (see `programs`), so that nothing later looks at
the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from xdsl.ir import SSAValue

from mapper.errors import LoweringError
from mapper.ir.cost import attended_pairs
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.sections import Section as GraphSection
from mapper.ir.types import numpy_dtype
from mapper_gpu.hardware import COMPUTE, element_bytes
from mapper_gpu.nodes import Matrix, Node, Section, Value
from mapper_gpu.packed import packed_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """An SSA value as a named value: `form` says how its axes map to rows and columns ("rows": tokens and
    columns, "heads": batch, tokens, heads, elements; "turned": heads before tokens), or "scalar", "vector",
    "state"."""

    name: str
    form: str
    data: Any = None


@dataclass(frozen=True)
class Carry:
    """A value handed from repetition to repetition: names outside before, inside, at the end, outside
    after."""

    initial: str
    argument: str
    yielded: str
    result: str


@dataclass(frozen=True)
class Extracted:
    """A section, the graph section it comes from, and its carried values. `slots` gives the symbols of a
    weight slot per repetition, `states` those of a cache."""

    section: Section
    slots: Mapping[str, tuple[str, ...]]
    states: Mapping[str, tuple[str, ...]]
    carries: tuple[Carry, ...]


@dataclass(frozen=True)
class Program:
    """All sections of one phase, and the rows of its ops table (operands numbered within the program)."""

    phase: str
    batch: int
    tokens: int
    context: int
    sections: tuple[Extracted, ...]
    ops: tuple[dict[str, Any], ...]
    logits: str


def extract(graph: Graph, phase: str, batch: int, tokens: int, context: int, form: str) -> Program:
    """The sections of a serving graph with weights in format `form`. Raises LoweringError naming the op."""
    work = _Extractor(graph, phase, batch, tokens, context, form)
    return work.run()


_RULES: dict[str, Callable[[_Extractor, DataflowOp], None]] = {}


def _rule(*names: str) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class _Extractor:
    graph: Graph
    phase: str
    batch: int
    tokens: int
    context: int
    form: str
    views: dict[SSAValue, View] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    makers: dict[SSAValue, int] = field(default_factory=dict)
    place: str = ""
    repeat: int = 1
    table: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    op: DataflowOp | None = None
    row: int = -1
    count: int = 0

    @property
    def height(self) -> int:
        return self.batch * self.tokens

    def fail(self, reason: str) -> NoReturn:
        op = self.op
        name = op.mnemonic if op is not None else "graph"
        node = f" ({op.node})" if op is not None and op.node else ""
        raise LoweringError(f"gpu: {self.place}{name}{node}: {reason}")

    # sections ------------------------------------------------------------------------------------

    def run(self) -> Program:
        for name, ssa in self.graph.input_values.items():
            role = self.graph.roles["inputs"].get(name, "")
            if role.startswith("state."):
                self.views[ssa] = View(name, "state")
                self._state(name, ssa)
            elif role in ("token_ids", "past_length"):
                self.views[ssa] = View(name, "scalar" if role == "past_length" else "rows")
                if role == "token_ids":
                    self.values[name] = Value(self.height, 1, "f32")
            else:
                raise LoweringError(f"gpu: input {name!r} is neither tokens, position nor cache")
        found = [self._section(s, i) for i, s in enumerate(self.graph.sections())]
        logits = self.views[self.graph.output_values["logits"]]
        if logits.form != "rows":
            raise LoweringError("gpu: the logits do not come as rows")
        found = _keep(found, logits.name)
        return Program(self.phase, self.batch, self.tokens, self.context, tuple(found), tuple(self.rows),
                       logits.name)  # fmt: skip

    def _state(self, name: str, ssa: SSAValue) -> None:
        b, h, length, d = tensor_type(ssa).ints
        self.values[name] = Value(b * length, h * d, self.form, d, name)

    def _section(self, s: GraphSection, number: int) -> Extracted:
        self.nodes, self.table = [], s.table
        self.repeat = s.count
        self.place = f"layers/{number}/" if s.repeat is not None else ""
        carries: list[Carry] = []
        states: dict[str, tuple[str, ...]] = {}
        for j, c in enumerate(s.carried):
            outer = self.views[c.initial]
            if outer.form != "rows":
                self.fail(f"a carried value of form {outer.form}")
            name = f"s{number}.carry{j}"
            self.values[name] = self.values[outer.name]
            self.views[c.argument] = View(name, outer.form)
            self.makers[c.argument] = self.makers.get(c.initial, -1)
            carries.append(Carry(outer.name, name, "", f"s{number}.out{j}"))
        for shared in s.shared:
            self.views[shared.argument] = self.views[shared.value]
        for slot in s.inputs:
            if not all(slot.names):
                self.fail("an iterated value that is no cache")
            self.views[slot.argument] = View(slot.names[0], "state")
            states[slot.names[0]] = slot.names
        for op in s.ops:
            self._op(op)
        for j, c in enumerate(s.carried):
            view = self.views[c.yielded]
            carries[j] = replace(carries[j], yielded=view.name)
            self.values[carries[j].result] = self.values[view.name]
            self.views[c.result] = View(carries[j].result, view.form)
            self.makers[c.result] = self.makers.get(c.yielded, -1)
        for out in s.outputs:
            view = self.views[out.yielded]
            if view.form != "state" or states.get(view.name) != out.names:
                self.fail("a layer hands out a value that is no cache")
        used = {v for n in self.nodes for v in (*n.inputs, n.output)}
        outputs = {n.output for n in self.nodes if n.kind == "append"} | {c.yielded for c in carries}
        values = {v: self.values[v] for v in sorted(used | {c.yielded for c in carries})}
        name = "layers" if s.repeat is not None else ("head" if number else "embedding")
        section = Section(name, s.count, tuple(self.nodes), values, frozenset(outputs))
        return Extracted(section, dict(s.table), states, tuple(carries))

    # ops -----------------------------------------------------------------------------------------

    def _op(self, op: DataflowOp) -> None:
        self.op = op
        if op.mnemonic in _VIEWS:
            _VIEWS[op.mnemonic](self, op)
            if op.operands and op.operands[0] in self.makers:
                self.makers.update(dict.fromkeys(op.results, self.makers[op.operands[0]]))
            return
        rule = _RULES.get(op.mnemonic)
        if rule is None:
            self.fail("this op has no lowering on the GPU yet")
        self.row = len(self.rows)
        kind = tensor_type(op.results[0])
        self.rows.append({
            "program": self.phase, "kind": op.mnemonic, "name": f"{self.place}{op.mnemonic}.{self.row}",
            "repetition": 0, "repeat": self.repeat, "operands": [self.makers.get(v, -1) for v in op.operands],
            "shape": list(kind.ints), "flops": 0, "weight_bytes": 0,
        })  # fmt: skip
        self.makers.update(dict.fromkeys(op.results, self.row))
        rule(self, op)

    def view(self, ssa: SSAValue, *forms: str) -> View:
        found = self.views[ssa]
        if forms and found.form not in forms:
            self.fail(f"an operand of form {found.form}, where {' or '.join(forms)} is needed")
        return found

    def fresh(self, width: int, head: int = 0, dtype: str = "f32") -> str:
        self.count += 1
        name = f"v{self.count}"
        self.values[name] = Value(self.height, width, dtype, head)
        return name

    def add(
        self, kind: str, inputs: Sequence[str], out: str, weights: Sequence[Matrix] = (), **attrs: Any
    ) -> str:
        attrs.setdefault("name", kind)
        self.nodes.append(Node(kind, tuple(inputs), out, tuple(weights), attrs, self.row))
        return out

    def vector(self, symbol: str | None, split: str = "") -> dict[str, Any] | None:
        """A weight that is no matrix, held in f32: its slot or symbol, and its length."""
        if symbol is None:
            return None
        weight = self.graph.weights[self.table[symbol][0] if symbol in self.table else symbol]
        self.rows[self.row]["weight_bytes"] += 4 * weight.elements
        return {"symbol": symbol, "length": weight.elements, "split": split}

    def matrix(self, symbol: str, turned: bool, first: int = 0, count: int = 0) -> Matrix:
        """Rows first .. first + count of a weight [n, k]; `turned` where it is stored as [k, n]."""
        weight = self.graph.weights[self.table[symbol][0] if symbol in self.table else symbol]
        n, k = weight.shape[::-1] if turned else weight.shape
        rows = count or n
        made = Matrix(symbol, rows, k, self.form, first=first, of=0 if rows == n else n, turned=turned,
                      low=packed_of(weight, turned))  # fmt: skip
        self.rows[self.row]["weight_bytes"] += int(made.bytes)
        self.rows[self.row]["flops"] += 2 * self.height * rows * k
        return made

    def linear(
        self, x: str, weight: Matrix, bias: Mapping[str, Any] | None, name: str, first: int = 0
    ) -> str:
        block = self.rounding(weight)
        rounding = {"round": block} if block else {}
        out = self.add("linear", [x], self.fresh(weight.n), [weight], name=name, **rounding)
        if bias is None:
            return out
        part = {**bias, "first": first, "length": weight.n}
        return self.add("point", [out], self.fresh(weight.n), fn="bias", vector=part, name="bias")

    def rounding(self, weight: Matrix) -> int:
        """Columns of x that the op rounds to 8 bits together (0: it does not)."""
        block = int(self.op.attr("round_block")) if self.op is not None else 0
        if block and (weight.low is None or weight.low.block != block):
            self.fail(f"activations rounded in blocks of {block} beside weights without such blocks")
        return block

    def constant(self, ssa: SSAValue) -> Any:
        """The array of a constant operand, or None."""
        owner = ssa.owner
        if isinstance(owner, DataflowOp) and owner.mnemonic == "constant":
            kind = tensor_type(owner.results[0])
            return np.frombuffer(owner.attr("value"), numpy_dtype(kind.dtype)).reshape(kind.ints)
        return None


def _keep(found: list[Extracted], logits: str) -> list[Extracted]:
    """Sections whose outputs are what later ones, and the caller, need."""
    kept: list[Extracted] = []
    needed = {logits}
    for e in reversed(found):
        made = {n.output for n in e.section.nodes}
        section = replace(e.section, outputs=e.section.outputs | (needed & made))
        needed |= {v for n in e.section.nodes for v in n.inputs} | {c.initial for c in e.carries}
        kept.append(replace(e, section=section))
    return kept[::-1]


# views ------------------------------------------------------------------------------------------


def _reshape(c: _Extractor, op: DataflowOp) -> None:
    view, to = c.view(op.operands[0]), op.result_shape()
    if view.form in ("vector", "constant"):
        c.views[op.results[0]] = view
        return
    b, s = c.batch, c.tokens
    value = c.values.get(view.name)
    if value is None:
        c.fail("a reshape of what is no activation")
    width = value.width
    if to in ((b, s, width), (b * s, width)) and view.form in ("rows", "heads"):
        c.views[op.results[0]] = View(view.name, "rows")
    elif len(to) == 4 and to[:2] == (b, s) and to[2] * to[3] == width and view.form in ("rows", "heads"):
        c.views[op.results[0]] = _headed(c, view, to[3], "heads")
    elif len(to) == 4 and to[0] == b and to[2] == s == 1 and to[1] * to[3] == width and view.form == "rows":
        c.views[op.results[0]] = _headed(c, view, to[3], "turned")
    elif to in ((b, s, width), (b * s, width)) and view.form == "turned" and s == 1:
        c.views[op.results[0]] = View(view.name, "rows")
    else:
        c.fail(f"reshape to {to} of {view.form} [{b} x {s}, {width}]")


def _headed(c: _Extractor, view: View, head: int, form: str) -> View:
    value = c.values[view.name]
    if value.head not in (0, head):
        c.fail(f"heads of {head} and of {value.head} columns in one value")
    c.values[view.name] = replace(value, head=head)
    return View(view.name, form)


def _transpose(c: _Extractor, op: DataflowOp) -> None:
    view = c.view(op.operands[0], "heads", "turned")
    if op.attr("perm") != (0, 2, 1, 3):
        c.fail(f"transpose by {op.attr('perm')}")
    c.views[op.results[0]] = View(view.name, "turned" if view.form == "heads" else "heads")


def _same(c: _Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = c.view(op.operands[0])


def _constant(c: _Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = View("", "constant", c.constant(op.results[0]))


def _load(c: _Extractor, op: DataflowOp) -> None:
    c.views[op.results[0]] = View(op.attr("weight"), "vector")


_VIEWS: dict[str, Callable[[_Extractor, DataflowOp], None]] = {
    "reshape": _reshape, "transpose": _transpose, "cast": _same, "constant": _constant, "load": _load,
}  # fmt: skip


# rules ------------------------------------------------------------------------------------------


@_rule("embed")
def _embed(c: _Extractor, op: DataflowOp) -> None:
    view = c.view(op.operands[0], "rows")
    width = op.result_shape()[-1]
    symbol = op.attr("table")
    rows = c.graph.weights[c.table[symbol][0] if symbol in c.table else symbol].shape[0]
    c.rows[c.row]["weight_bytes"] = int(width * element_bytes(c.form))
    weight = Matrix(symbol, rows, width, c.form)
    c.views[op.results[0]] = View(c.add("embed", [view.name], c.fresh(width), [weight]), "rows")


@_rule("embed_at")
def _embed_at(c: _Extractor, op: DataflowOp) -> None:
    width, symbol = op.result_shape()[-1], op.attr("table")
    rows = c.graph.weights[c.table[symbol][0] if symbol in c.table else symbol].shape[0]
    c.rows[c.row]["weight_bytes"] = int(width * element_bytes(c.form))
    weight = Matrix(symbol, rows, width, c.form)
    made = c.add("positions", [], c.fresh(width), [weight], offset=op.attr("offset"))
    c.views[op.results[0]] = View(made, "rows")


@_rule("linear", "lm_head")
def _linear(c: _Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "rows")
    symbol, turned = op.attr("weight"), not op.attr("transposed")
    bias = c.vector(op.attr("bias"), "n")
    cut = _pieces(op)
    if cut is None:
        name = "lm_head" if op.mnemonic == "lm_head" else "linear"
        c.views[op.results[0]] = View(c.linear(x.name, c.matrix(symbol, turned), bias, name), "rows")
        return
    c.views[op.results[0]] = View("", "pieces", [
        (first, first + n, c.linear(x.name, c.matrix(symbol, turned, first, n), bias, "linear", first))
        for first, n in cut
    ])  # fmt: skip


def _pieces(op: DataflowOp) -> list[tuple[int, int]] | None:
    """(first column, columns) of what a linear's result is cut into, where all that reads it cuts it."""
    users, width = op.consumers(), op.result_shape()[-1]
    cut: set[tuple[int, int]] = set()
    for user in users:
        rank = len(op.result_shape())
        if user.mnemonic == "split" and user.attr("axis") in (-1, rank - 1):
            at = 0
            for size in user.attr("sizes"):
                cut.add((at, size))
                at += size
        elif user.mnemonic == "slice" and _column_slice(user, rank) is not None:
            first, end = _column_slice(user, rank) or (0, 0)
            cut.add((first, end - first))
        else:
            return None
    parts = sorted(cut)
    ends = [a + n for a, n in parts]
    whole = parts and parts[0][0] == 0 and ends[-1] == width and all(
        e == a for e, (a, _) in zip(ends, parts[1:], strict=False)
    )  # fmt: skip
    return parts if whole else None


def _column_slice(op: DataflowOp, rank: int) -> tuple[int, int] | None:
    starts, ends, steps = op.attr("starts"), op.attr("ends"), op.attr("steps")
    if op.attr("axes") not in ((-1,), (rank - 1,)) or not starts or not ends or (steps and steps != (1,)):
        return None
    if not (starts[0].is_const and ends[0].is_const):
        return None
    width = op.operand_shape(0)[-1]
    first, end = starts[0].value, ends[0].value
    return max(0, first + width if first < 0 else first), min(width, end + width if end < 0 else end)


@_rule("split", "slice")
def _cut(c: _Extractor, op: DataflowOp) -> None:
    view = c.view(op.operands[0], "pieces")
    at = 0
    for result in op.results:
        size = tensor_type(result).ints[-1]
        first = at if op.mnemonic == "split" else (_column_slice(op, len(op.operand_shape(0))) or (0, 0))[0]
        name = next(n for a, b, n in view.data if (a, b) == (first, first + size))
        c.views[result] = View(name, "rows")
        at += size
    c.makers.update(dict.fromkeys(op.results, c.makers.get(op.operands[0], -1)))


@_rule("norm")
def _norm(c: _Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "rows", "heads", "turned")
    value = c.values[x.name]
    attrs = {
        "norm": op.attr("kind"), "eps": op.attr("eps"), "offset": op.attr("weight_offset"),
        "weight": c.vector(op.attr("weight")), "bias": c.vector(op.attr("bias")),
    }  # fmt: skip
    kind = "norm" if x.form == "rows" else "head_norm"
    head = 0 if x.form == "rows" else value.head
    made = c.add(kind, [x.name], c.fresh(value.width, value.head), **attrs, head=head)
    c.views[op.results[0]] = View(made, x.form)


@_rule("rope_at")
def _rope(c: _Extractor, op: DataflowOp) -> None:
    x = c.view(op.operands[0], "turned", "heads")
    if x.form != "turned":
        c.fail("rotates what is not turned to heads")
    value, symbol = c.values[x.name], op.attr("table")
    shape = tuple(c.graph.weights[symbol].shape)
    c.rows[c.row]["weight_bytes"] += 4 * c.tokens * op.attr("rotary_dim")
    made = c.add(
        "rope", [x.name], c.fresh(value.width, value.head), table={"symbol": symbol, "shape": shape},
        style=op.attr("style"), rotary=op.attr("rotary_dim"), head=value.head,
    )  # fmt: skip
    c.views[op.results[0]] = View(made, "turned")


@_rule("cache_append")
def _append(c: _Extractor, op: DataflowOp) -> None:
    cache, new = c.view(op.operands[0], "state"), c.view(op.operands[1], "turned")
    head = c.values[new.name].head
    c.values[f"{cache.name}@"] = c.values[cache.name]
    c.add("append", [new.name], f"{cache.name}@", cache=cache.name, head=head)
    c.views[op.results[0]] = View(cache.name, "state")


@_rule("cached_attention")
def _attention(c: _Extractor, op: DataflowOp) -> None:
    q = c.view(op.operands[0], "turned")
    k, v = (c.view(op.operands[i], "state") for i in (1, 2))
    if op.attr("slopes") is not None:
        c.fail("attention with slopes (ALiBi)")
    b, h, s, d = op.operand_shape(0)
    _, hkv, length, dv = op.operand_shape(2)
    sinks = op.operand("sinks")
    vector = None
    if sinks is not None:
        view = c.view(sinks, "vector")
        vector = c.vector(view.name, "n")
    past = length - s if c.phase == "decode" else 0
    pairs = attended_pairs(op).value if past else sum(
        min(i + 1, op.attr("window") or s) for i in range(s)
    )  # fmt: skip
    c.rows[c.row]["flops"] = 2 * b * h * pairs * (d + dv)
    made = c.add(
        "attention",
        [q.name, f"{k.name}@", f"{v.name}@"],
        c.fresh(h * dv, dv),
        batch=b,
        heads=h,
        kv_heads=hkv,
        dim=d,
        value_dim=dv,
        all_heads=hkv,
        tokens=s,
        past=past,
        length=length,
        pairs=pairs,
        element=element_bytes(c.form),
        engine=COMPUTE[c.form],
        window=op.attr("window"),
        scale=op.attr("scale"),
        softcap=op.attr("softcap"),
        sinks=vector,
        caches=(k.name, v.name),
    )
    c.views[op.results[0]] = View(made, "turned")


@_rule("gated_mlp", "mlp", "packed_mlp")
def _mlp(c: _Extractor, op: DataflowOp) -> None:
    x, act = c.view(op.operands[0], "rows").name, op.attr("act")
    turned = {n: not op.attr(f"{n}_transposed") for n in op.weights() if not n.endswith("bias")}
    if op.mnemonic == "packed_mlp":
        if op.attr("packing") != "halves":
            c.fail("gate and up in alternating columns")
        symbol = op.attr("gate_up")
        whole = c.graph.weights[c.table[symbol][0] if symbol in c.table else symbol]
        half = whole.elements // whole.shape[0 if turned["gate_up"] else 1] // 2
        bias = c.vector(op.attr("gate_up_bias"), "n")
        gate, up = (
            c.linear(x, c.matrix(symbol, turned["gate_up"], first, half), bias, name, first)
            for name, first in (("gate", 0), ("up", half))
        )
        inner = c.add("gate", [gate, up], c.fresh(half), act=act)
    elif op.mnemonic == "gated_mlp":
        gate, up = (
            c.linear(x, c.matrix(op.attr(n), turned[n]), c.vector(op.attr(f"{n}_bias"), "n"), n)
            for n in ("gate", "up")
        )
        inner = c.add("gate", [gate, up], c.fresh(c.values[up].width), act=act)
    else:
        up = c.linear(x, c.matrix(op.attr("up"), turned["up"]), c.vector(op.attr("up_bias"), "n"), "up")
        inner = c.add("point", [up], c.fresh(c.values[up].width), fn=f"act:{act}", name="act")
    down = c.matrix(op.attr("down"), turned["down"])
    made = c.linear(inner, down, c.vector(op.attr("down_bias"), ""), "down")
    c.views[op.results[0]] = View(made, "rows")


@_rule("activation")
def _activation(c: _Extractor, op: DataflowOp) -> None:
    _point(c, op, f"act:{op.attr('kind')}", [op.operands[0]])


@_rule("tanh", "sigmoid", "relu", "exp", "neg", "softplus", "sqrt", "abs")
def _unary(c: _Extractor, op: DataflowOp) -> None:
    _point(c, op, op.mnemonic, [op.operands[0]])


@_rule("add", "sub", "mul", "div")
def _binary(c: _Extractor, op: DataflowOp) -> None:
    _point(c, op, op.mnemonic, list(op.operands))


def _point(c: _Extractor, op: DataflowOp, fn: str, operands: list[SSAValue]) -> None:
    views = [c.view(v) for v in operands]
    found = [v for v in views if v.form in ("rows", "heads", "turned")]
    forms = {v.form for v in found}
    if len(forms) != 1 or len({c.values[v.name].width for v in found}) != 1:
        c.fail("operands of different forms")
    scalar = None
    for i, v in enumerate(views):
        if v.form == "constant":
            if v.data.size != 1:
                c.fail(f"a constant of {v.data.size} elements")
            scalar = (i, float(v.data.reshape(-1)[0]))
        elif v not in found:
            c.fail(f"an operand of form {v.form}")
    value = c.values[found[0].name]
    made = c.add("point", [v.name for v in found], c.fresh(value.width, value.head), fn=fn, scalar=scalar,
                 name=fn.split(":")[0])  # fmt: skip
    c.views[op.results[0]] = View(made, found[0].form)
