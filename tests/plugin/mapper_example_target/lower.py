"""Lowering: the serving form of a decoder, without repeats, to one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from xdsl.ir import SSAValue

from mapper.errors import LoweringError, UsageError
from mapper.ir.cost import cost
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.machine import Machine
from mapper.passes.serve import serve
from mapper.passes.unroll import Unroll
from mapper.schedule.tables import (
    OP_SCHEMA,
    STEP_SCHEMA,
    Block,
    ModelRef,
    Phase,
    Port,
    Program,
    Request,
    Schedule,
    StepTable,
)

from .memory import Buffer, place
from .opcodes import ACTIVATIONS, OPCODES, SIZES, bits
from .timing import cycles

Shape = tuple[int, ...]


def serving_form(graph: Graph, phase: Phase, request: Request) -> Graph:
    """The static graph of one phase, with its layers one after the other."""
    return Unroll().apply(serve(graph, phase, request.batch, request.prompt, request.context))


def lower(graph: Graph, machine: Machine, request: Request) -> Schedule:
    """See ScalarBackend.lower."""
    if request.weights not in (None, "f32") or request.chips not in (None, 1):
        raise UsageError("scalar: one chip, weights in f32")
    common = _Common(machine)
    programs: dict[str, Program] = {}
    for phase in ("prefill", "decode"):
        if phase in request.phases:
            programs[phase] = _Lowering(serving_form(graph, phase, request), phase, common).run()
    return Schedule(
        target="scalar",
        machine=machine.name,
        machine_toml=machine.text,
        chips=1,
        request=request,
        model=ModelRef(
            str(graph.path or ""), graph.sha256, dict.fromkeys(common.files(), ""), graph.params, graph.layers
        ),
        clock_hz=machine.value("clock"),
        units=("alu",),
        memories=(("ram", round(machine.value("memory.ram.capacity"))),),
        opcodes=tuple(OPCODES),
        programs=programs,
        buffers=place(common.buffers, round(machine.value("memory.ram.capacity"))),
        ops=pa.Table.from_pylist(common.ops, schema=OP_SCHEMA),
        ports=tuple(common.ports),
        weights=common.weights,
        constants=common.constants,
        roles=graph.roles,
        plan={"commutative": ["add", "mul"], "gather": ["embed", "embed_at"]},
    )


@dataclass(eq=False)
class _Common:
    """What the programs share: buffers, ports, weights, ops."""

    machine: Machine
    buffers: list[Buffer] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    lasting: dict[str, Buffer] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    ops: list[dict[str, Any]] = field(default_factory=list)

    def files(self) -> list[str]:
        """The weight files."""
        return sorted({w["file"] for w in self.weights.values()})

    def buffer(self, value: str, size: int, program: str = "") -> Buffer:
        """A new buffer."""
        self.buffers.append(Buffer(value, size, program, number=len(self.buffers)))
        return self.buffers[-1]

    def lasts(self, name: str, kind: Any, shape: Shape, source: Any) -> Buffer:
        """The buffer of a weight, constant or state, which both programs share."""
        if name not in self.lasting:
            self.lasting[name] = self.buffer(name, 4 * int(np.prod(shape)))
            self.ports.append(Port(name, kind, "float32", shape, (self.lasting[name].number,), None, source))
        return self.lasting[name]

    def weight(self, graph: Graph, name: str) -> Buffer:
        """The buffer of a weight, in float32."""
        symbol = graph.weights[name]
        shape = tuple(symbol.shape)
        if symbol.data is not None:
            self.constants.setdefault(name, np.asarray(symbol.data, np.float32))
            return self.lasts(name, "constant", shape, ["const", name])
        kind = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(symbol.format)
        if kind is None:
            raise LoweringError(f"scalar: weight {name} is {symbol.format}")
        self.weights[name] = {
            "file": symbol.file, "offset": symbol.offset, "bytes": symbol.bytes, "dtype": kind,
            "shape": list(shape),
        }  # fmt: skip
        return self.lasts(name, "weight", shape, ["weight", name])


@dataclass(frozen=True)
class _Value:
    """An array in a buffer, and the op that made it (-1: none)."""

    buffer: Buffer
    shape: Shape
    op: int = -1

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(eq=False)
class _Lowering:
    """One program."""

    graph: Graph
    phase: Phase
    common: _Common
    values: dict[SSAValue, _Value] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    op: int = -1

    def run(self) -> Program:
        """Lower every op; the finished program."""
        self._enter()
        for op in self.graph.top():
            rule = RULES.get(op.mnemonic)
            if rule is None:
                raise LoweringError(f"scalar: {op.mnemonic} at {op.node}: this target has no opcode for it")
            if op.attributes.get("round_block") is not None:
                raise LoweringError(f"scalar: {op.mnemonic} ({op.node}): activations rounded to 8 bits")
            if op.mnemonic not in ("reshape", "squeeze", "unsqueeze", "constant"):
                self._list(op)
            rule(self, op)
        self._leave()
        table = pa.Table.from_pylist(self.rows, schema=STEP_SCHEMA)
        ids = next(kind for name, kind in self.graph.inputs if name == "input_ids")
        return Program(self.phase, (Block("steps", StepTable(table)),), self.now, ids.shape[1].value)

    def _enter(self) -> None:
        for name, value in self.graph.input_values.items():
            kind = tensor_type(value)
            shape = tuple(d.value for d in kind.shape)
            if name.startswith("cache."):
                buffer = self.common.lasts(name, "state", shape, ["zeros", list(shape), "float32"])
            else:
                buffer = self.common.buffer(name, kind.bytes.value, self.phase)
                buffer.last = 0
                row = (buffer.number,)
                self.common.ports.append(Port(name, "input", "int64", shape, row, None, None, (self.phase,)))
            self.values[value] = _Value(buffer, shape)

    def _leave(self) -> None:
        for name, value in self.graph.output_values.items():
            made = self.values[value]
            if name.startswith("cache."):
                if made.buffer is not self.common.lasting[name]:
                    raise LoweringError(f"scalar: {name} is not appended to in place")
                continue
            made.buffer.last = -1
            row = (made.buffer.number,)
            port = Port(name, "output", "float32", made.shape, row, None, None, (self.phase,))
            self.common.ports.append(port)

    def _list(self, op: DataflowOp) -> None:
        """A row of the ops table."""
        work = cost(op, lambda name: self.graph.weights[name].type)
        self.op = len(self.common.ops)
        self.common.ops.append(
            {
                "program": self.phase, "id": self.op, "kind": op.mnemonic, "name": op.node or op.mnemonic,
                "repetition": 0, "repeat": 1, "operands": [self.values[v].op for v in op.operands],
                "shape": list(self.shape(op)), "flops": work.flops.value, "weight_bytes": work.weights.value,
            }
        )  # fmt: skip

    def shape(self, op: DataflowOp) -> Shape:
        """Shape of the first result."""
        return tuple(d.value for d in tensor_type(op.results[0]).shape)

    def args(self, op: DataflowOp) -> list[_Value]:
        """The operands."""
        return [self.values[v] for v in op.operands]

    def weight(self, op: DataflowOp, attribute: str) -> list[_Value]:
        """The weight that an attribute names; none where it is absent."""
        name = op.attr(attribute)
        if name is None:
            return []
        return [_Value(self.common.weight(self.graph, name), tuple(self.graph.weights[name].shape))]

    def step(
        self, opcode: str, args: list[int], reads: list[_Value], shape: Shape, flops: int,
        into: Buffer | None = None, moved: int | None = None,
    ) -> _Value:  # fmt: skip
        """Append a step; its result, in a new temporary or `into`. `moved`: bytes, if not all are read."""
        size = 4 * int(np.prod(shape, dtype=np.int64))
        out = into or self.common.buffer(f"{self.phase}.{opcode}.{len(self.rows)}", size, self.phase)
        slices = [{"buffer": v.buffer.number, "offset": 0, "bytes": v.buffer.bytes} for v in reads]
        write = {"buffer": out.number, "offset": 0, "bytes": out.bytes}
        assert [s["bytes"] for s in (*slices, write)] == SIZES[opcode](args), (opcode, args)
        bytes_ = moved if moved is not None else sum(s["bytes"] for s in (*slices, write))
        taken = int(cycles(np.array(bytes_), np.array(flops), self.common.machine))
        self.rows.append(
            {
                "start": self.now, "duration": taken, "unit": 0, "opcode": list(OPCODES).index(opcode),
                "args": args, "reads": slices, "writes": [write], "op": self.op, "bytes": bytes_,
                "flops": flops,
            }
        )  # fmt: skip
        if out.program and into is None:
            out.first = self.now
        self.now += taken
        for buffer in (out, *(v.buffer for v in reads)):
            if buffer.program:
                buffer.last = self.now - 1
        return _Value(out, shape, self.op)

    def linear(self, x: _Value, weight: list[_Value], bias: list[_Value], transposed: bool) -> _Value:
        """x @ weight + bias."""
        k, n = weight[0].shape[::-1] if transposed else weight[0].shape
        m = x.size // k
        flops = m * n * (2 * k + len(bias))
        args = [m, k, n, int(transposed), len(bias)]
        return self.step("linear", args, [x, *weight, *bias], (*x.shape[:-1], n), flops)

    def activation(self, x: _Value, kind: str) -> _Value:
        """An activation function."""
        if kind not in ACTIVATIONS:
            raise LoweringError(f"scalar: activation {kind!r}")
        return self.step("activation", [x.size, ACTIVATIONS.index(kind)], [x], x.shape, 6 * x.size)

    def elementwise(self, opcode: str, x: _Value, y: _Value) -> _Value:
        """x opcode y, broadcast."""
        shape = np.broadcast_shapes(x.shape, y.shape)
        rank = len(shape)
        pads = [(1,) * (rank - len(v.shape)) + v.shape for v in (x, y)]
        size = int(np.prod(shape))
        return self.step(opcode, [rank, *shape, *pads[0], *pads[1]], [x, y], shape, size)


Rule = Callable[[_Lowering, DataflowOp], None]


def _set(c: _Lowering, op: DataflowOp, value: _Value) -> None:
    c.values[op.results[0]] = value


def _view(c: _Lowering, op: DataflowOp) -> None:
    x = c.args(op)[0]
    _set(c, op, _Value(x.buffer, c.shape(op), x.op))


def _constant(c: _Lowering, op: DataflowOp) -> None:
    kind = tensor_type(op.results[0])
    if kind.dtype != "f32":
        raise LoweringError(f"scalar: constant of {kind.dtype} at {op.node}")
    shape = c.shape(op)
    name = f"constant.{c.phase}.{len(c.common.constants)}"
    c.common.constants[name] = np.frombuffer(op.attr("value"), np.float32).reshape(shape)
    _set(c, op, _Value(c.common.lasts(name, "constant", shape, ["const", name]), shape))


def _embed(c: _Lowering, op: DataflowOp) -> None:
    ids, table = c.args(op)[0], c.weight(op, "table")[0]
    rows, width = table.shape
    moved = ids.size * (8 + 8 * width)
    _set(c, op, c.step("embed", [ids.size, width, rows], [ids, table], c.shape(op), 0, moved=moved))


def _embed_at(c: _Lowering, op: DataflowOp) -> None:
    table = c.weight(op, "table")[0]
    batch, seq, width = c.shape(op)
    args = [batch, seq, width, table.shape[0], op.attr("offset")]
    moved = 8 + 8 * batch * seq * width
    _set(c, op, c.step("embed_at", args, [*c.args(op), table], c.shape(op), 0, moved=moved))


def _norm(c: _Lowering, op: DataflowOp) -> None:
    x, weight, bias = c.args(op)[0], c.weight(op, "weight"), c.weight(op, "bias")
    if not weight:
        raise LoweringError(f"scalar: norm without a weight at {op.node}")
    width = x.shape[-1]
    layer = op.attr("kind") == "layer"
    args = [
        x.size // width,
        width,
        int(layer),
        bits(op.attr("eps")),
        bits(op.attr("weight_offset")),
        len(bias),
    ]
    _set(c, op, c.step("norm", args, [x, *weight, *bias], x.shape, 8 * x.size))


def _linear(c: _Lowering, op: DataflowOp) -> None:
    bias = c.weight(op, "bias")
    _set(c, op, c.linear(c.args(op)[0], c.weight(op, "weight"), bias, op.attr("transposed")))


def _mlp(c: _Lowering, op: DataflowOp) -> None:
    def layer(x: _Value, name: str) -> _Value:
        return c.linear(x, c.weight(op, name), c.weight(op, f"{name}_bias"), op.attr(f"{name}_transposed"))

    x = c.args(op)[0]
    if op.mnemonic == "gated_mlp":
        inner = c.elementwise("mul", c.activation(layer(x, "gate"), op.attr("act")), layer(x, "up"))
    else:
        inner = c.activation(layer(x, "up"), op.attr("act"))
    _set(c, op, layer(inner, "down"))


def _activation(c: _Lowering, op: DataflowOp) -> None:
    _set(c, op, c.activation(c.args(op)[0], op.attr("kind")))


def _elementwise(c: _Lowering, op: DataflowOp) -> None:
    _set(c, op, c.elementwise(op.mnemonic, *c.args(op)))


def _transpose(c: _Lowering, op: DataflowOp) -> None:
    x = c.args(op)[0]
    args = [len(x.shape), *x.shape, *op.attr("perm")]
    _set(c, op, c.step("transpose", args, [x], c.shape(op), 0))


def _slice(c: _Lowering, op: DataflowOp) -> None:
    x, shape = c.args(op)[0], c.shape(op)
    if op.attr("starts") is None or any(s != 1 for s in op.attr("steps") or ()):
        raise LoweringError(f"scalar: slice with computed bounds or steps at {op.node}")
    begins = [0] * len(shape)
    for axis, start in zip(op.attr("axes"), op.attr("starts"), strict=True):
        begins[axis] = start.value if start.value >= 0 else start.value + x.shape[axis]
    ends = [b + n for b, n in zip(begins, shape, strict=True)]
    _set(c, op, c.step("cut", [len(shape), *x.shape, *begins, *ends], [x], shape, 0))


def _rope(c: _Lowering, op: DataflowOp) -> None:
    x, past = c.args(op)
    table = c.weight(op, "table")[0]
    args = [*x.shape, op.attr("rotary_dim"), int(op.attr("style") == "interleaved"), table.shape[1]]
    _set(c, op, c.step("rope_at", args, [x, past, table], x.shape, 3 * x.size))


def _append(c: _Lowering, op: DataflowOp) -> None:
    cache, new, past = c.args(op)
    args = [*new.shape, cache.shape[2]]
    _set(c, op, c.step("cache_append", args, [cache, new, past], cache.shape, 0, into=cache.buffer))


def _attention(c: _Lowering, op: DataflowOp) -> None:
    if op.attr("slopes") is not None or op.attr("chunk") or len(op.operands) > 4:
        raise LoweringError(f"scalar: attention in chunks, with slopes or sinks at {op.node}")
    q, k, v, past = c.args(op)
    b, h, s, d = q.shape
    args = [b, h, k.shape[1], s, d, v.shape[3], k.shape[2]]
    args += [bits(op.attr("scale")), op.attr("window"), bits(op.attr("softcap"))]
    flops = b * h * s * k.shape[2] * (2 * d + 2 * v.shape[3] + 7)
    _set(c, op, c.step("cached_attention", args, [q, k, v, past], (b, h, s, v.shape[3]), flops))


RULES: dict[str, Rule] = {
    "reshape": _view,
    "squeeze": _view,
    "unsqueeze": _view,
    "constant": _constant,
    "embed": _embed,
    "embed_at": _embed_at,
    "norm": _norm,
    "linear": _linear,
    "lm_head": _linear,
    "mlp": _mlp,
    "gated_mlp": _mlp,
    "activation": _activation,
    "add": _elementwise,
    "mul": _elementwise,
    "sub": _elementwise,
    "transpose": _transpose,
    "slice": _slice,
    "rope_at": _rope,
    "cache_append": _append,
    "cached_attention": _attention,
}
"""IR op -> how it becomes steps."""
