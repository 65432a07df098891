"""The state of an extraction: views of SSA values, nodes so far, rows of the ops table.

Rules for ops are registered by the modules `extract_*`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from xdsl.ir import SSAValue

from mapper.errors import LoweringError
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.sections import Section as GraphSection
from mapper.ir.types import numpy_dtype
from mapper.ir.weights import WeightSymbol
from mapper_gpu.nodes import Matrix, Node, Pick, Section, Value
from mapper_gpu.packed import packed_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """An SSA value as a named value: `form` says how its axes map to rows and columns ("rows": tokens and
    columns, "heads": batch, tokens, heads, elements; "turned": heads before tokens), or "scalar", "vector",
    "state", "cut" (columns of a linear that is not made yet), "joined" (several values side by side)."""

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
    constants: Mapping[str, WeightSymbol] = field(default_factory=dict)


Rule = Callable[["Extractor", DataflowOp], None]
RULES: dict[str, Rule] = {}
"""Op -> how it becomes nodes."""
VIEWS: dict[str, Rule] = {}
"""Op -> what view of its operand it is, where it computes nothing."""

MAKERS: dict[str, Callable[[Extractor, View], View]] = {}
"""Form of a view that is no value yet -> how it becomes one, where an op needs it."""


def rule(*names: str, table: dict[str, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Register a function for ops."""

    def add(function: Rule) -> Rule:
        table.update(dict.fromkeys(names, function))
        return function

    return add


@dataclass
class Extractor:
    """What is known of a graph while its ops are turned into nodes one by one. `constants` are arrays that no
    file has."""

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
    constants: dict[str, WeightSymbol] = field(default_factory=dict)

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
                       logits.name, self.constants)  # fmt: skip

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
        if op.mnemonic in VIEWS:
            VIEWS[op.mnemonic](self, op)
            if op.operands and op.operands[0] in self.makers:
                self.makers.update(dict.fromkeys(op.results, self.makers[op.operands[0]]))
            return
        rule = RULES.get(op.mnemonic)
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
        if found.form in MAKERS and found.form not in forms:
            found = self.views[ssa] = MAKERS[found.form](self, found)
        if found.form in ("heads", "turned") and found.form not in forms:
            value = self.values[found.name]
            if value.head == value.width:
                # one head: both orders are the same
                found = replace(found, form="turned" if found.form == "heads" else "heads")
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

    def known(self, symbol: str) -> WeightSymbol:
        """A weight by its symbol, or by its slot, whose weights are alike."""
        return self.graph.weights[self.table[symbol][0] if symbol in self.table else symbol]

    def vector(self, symbol: str | None, split: str = "") -> dict[str, Any] | None:
        """A weight that is no matrix, held in f32: its slot or symbol, and its length."""
        if symbol is None:
            return None
        weight = self.known(symbol)
        self.rows[self.row]["weight_bytes"] += 4 * weight.elements
        return {"symbol": symbol, "length": weight.elements, "split": split}

    def matrix(
        self, symbol: str, turned: bool, first: int = 0, count: int = 0, pick: Pick | None = None
    ) -> Matrix:
        """Rows first .. first + count of a weight [n, k], or those picked; `turned` where it is stored as
        [k, n]."""
        weight = self.known(symbol)
        n, k = weight.shape[::-1] if turned else weight.shape
        rows = count or n
        of = 0 if rows == n or pick is not None else n
        made = Matrix(
            symbol, rows, k, self.form, first=first, of=of, turned=turned, pick=pick,
            low=packed_of(weight, turned),
        )  # fmt: skip
        self.rows[self.row]["weight_bytes"] += int(made.bytes)
        self.rows[self.row]["flops"] += 2 * self.height * rows * k
        return made

    def linear(
        self, x: str, weight: Matrix, bias: Mapping[str, Any] | None, name: str, first: int = 0,
        pick: Pick | None = None,
    ) -> str:  # fmt: skip
        block = self.rounding(weight)
        rounding = {"round": block} if block else {}
        out = self.add("linear", [x], self.fresh(weight.n), [weight], name=name, **rounding)
        if bias is None:
            return out
        part = {**bias, "first": first, "length": weight.n} | ({} if pick is None else {"pick": pick})
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
