"""Lowering of graphs without a cache: int8 matrix products and elementwise functions between inputs and
outputs.

Recurrent cells and quantised layers are such graphs. Every matrix product takes its K in tiles of 320, four
at a time on the four MXM planes, which meet again in the VXM; what follows it elementwise runs in the same
chain as far as the VXM's 16 ALUs go, the rest by way of MEM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from mapper.errors import LoweringError, UnsupportedModelError
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.machine import Machine
from mapper.schedule.tables import ModelRef, Request, Schedule
from mapper_lpu import tables
from mapper_lpu.calendar import Calendar
from mapper_lpu.chain import Chain, Imm, Mem, Mxm, Operand, Res, Tile
from mapper_lpu.decoder import LOG2E
from mapper_lpu.instruction import Latencies
from mapper_lpu.isa import F32, I8, I16, I32, LANES, TYPE_BYTES
from mapper_lpu.lower import Lowered
from mapper_lpu.placer import Placer, TemplateCache
from mapper_lpu.program import Timed, place
from mapper_lpu.retime import plan_of
from mapper_lpu.storage import Storage, Stored, mem
from mapper_lpu.weights import FIRST_WEIGHT_SLICE, LOAD_GROUPS, tiles_of

MAX_OPS = 13  # of 16 ALUs: copies for values that wait take the rest
TANH_IN, TANH_OUT = 32767.0 / 6.0, 1.0 / 32767.0
_TYPES = {"i8": I8, "f32": F32}


@dataclass(eq=False)
class Value:
    """Columns of a tensor in one tile of lanes: made by `result` of `chain`, or stored, or both."""

    type: int
    chain: Chain | None = None
    result: Res | None = None
    stored: Stored | None = None


@dataclass(eq=False)
class Tensor:
    """A tensor [rows, columns] as tiles; or a number; or the weight symbol `weight`; or int8 parts joined
    along columns.
    """

    tiles: list[Value] = field(default_factory=list)
    number: float | None = None
    weight: str | None = None
    parts: list[tuple[str, int]] = field(default_factory=list)  # (input name, columns) of int8 operands


class Cell:
    """Builds the chains of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.storage = graph, Storage()
        self.rows = graph.outputs[0][1].ints[0]
        self.values: dict[SSAValue, Tensor] = {}
        self.chains: list[Chain] = []
        self.constants: dict[str, np.typing.NDArray[Any]] = {}
        self.inputs: dict[tuple[str, int, int], Stored] = {}
        self.weight_files: dict[str, Any] = {}
        self.turn = 0
        self.number = 0

    def build(self, ids: dict[DataflowOp, int]) -> None:
        """All ops in order, then the outputs."""
        for name, value in self.graph.input_values.items():
            self.values[value] = self._input(name, value)
        for op in self.graph.top():
            if op.mnemonic == "output":
                continue
            self.number = ids[op]
            self.values[op.results[0]] = self._op(op)
        for name, value in self.graph.output_values.items():
            self._output(name, self.values[value], tensor_type(value).ints)

    # -- inputs, outputs, constants -----------------------------------------------------------------------

    def _slices(self, type: int) -> tuple[int, ...]:
        """The next slice group in turn, so that the operands of one chain lie apart."""
        side, number = self.turn % 2, self.turn // 2 % 3
        self.turn += 1
        return mem(side, 4 * number, TYPE_BYTES[type])

    def _input(self, name: str, value: SSAValue) -> Tensor:
        kind = tensor_type(value)
        columns = kind.ints[-1]
        if kind.dtype == "i8":
            return Tensor(parts=[(name, columns)])
        if kind.dtype != "f32":
            raise LoweringError(f"lpu: input {name} is {kind.dtype}; inputs of a cell are i8 or f32")
        tensor = Tensor()
        parts = []
        for t, _ in enumerate(tiles_of(columns)):
            stored = self.storage.store(f"{name}.{t}", F32, self.rows, self._slices(F32))
            tensor.tiles.append(Value(F32, stored=stored))
            parts.append((stored, "f32"))
        self._port(name, "input", kind.ints, parts)
        return tensor

    def _port(self, name: str, kind: Any, shape: Sequence[int], parts: Sequence[tuple[Stored, str]]) -> None:
        layouts = [
            {"layout": {"kind": "rows", "dtype": dtype, "ways": 1}, "buffers": list(stored.buffers)}
            for stored, dtype in parts
        ]
        every = Stored(name, F32, 0, (), (), tuple(b for s, _ in parts for b in s.buffers))
        layout = {"kind": "columns", "parts": layouts, "width": LANES, "row_axes": 1}
        dtype = {"i8": "int8", "f32": "float32"}[parts[0][1]]
        self.storage.port(name, kind, dtype, shape, every, layout)

    def _output(self, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
        parts = []
        for value in tensor.tiles:
            stored = self._stored(value)
            parts.append((stored, "i8" if stored.type == I8 else "f32"))
        self._port(name, "output", shape, parts)

    def _stored(self, value: Value) -> Stored:
        """The value in MEM, written by its chain where it is not yet."""
        if value.stored is None:
            assert value.chain is not None and value.result is not None
            name = f"{value.chain.name}/{value.result.op}"
            value.stored = self.storage.store(
                name, value.type, self.rows, self._slices(value.type), program="decode", temporary=True
            )
            made = value.result
            if any(o.op == made.op for o in value.chain.outs):
                made = value.chain.add("vxm.copy", made)
            value.chain.write(made, value.stored, range(self.rows))
        return value.stored

    def _row(self, symbol: str, t: int) -> Stored:
        """A weight vector's tile t as one row."""
        begin, end = tiles_of(self.graph.weights[symbol].shape[0])[t]
        stored = self.storage.store(f"{symbol}.{t}", F32, 1, self._slices(F32))
        expr = ["reshape", ["slice", self._weight(symbol), 0, begin, end], [1, end - begin]]
        layout = {"kind": "rows", "dtype": "f32", "ways": 1, "axes": None, "row_axes": 1, "take": None}
        kind: Any = "weight" if symbol in self.weight_files else "constant"
        self.storage.port(f"{symbol}.{t}", kind, "float32", (1, end - begin), stored, layout, expr)
        return stored

    def _weight(self, name: str) -> Any:
        symbol = self.graph.weights[name]
        if symbol.packing is not None:
            raise UnsupportedModelError(
                f"weight {name!r}: cells of {symbol.format} weights are not supported"
            )
        if symbol.data is None:
            self.weight_files[name] = symbol
            return ["weight", name]
        self.constants[f"weight/{name}"] = symbol.data
        return ["const", f"weight/{name}"]

    # -- ops ------------------------------------------------------------------------------------------------

    def _op(self, op: DataflowOp) -> Tensor:
        match op.mnemonic:
            case "constant":
                kind = tensor_type(op.results[0])
                if kind.dtype != "f32" or kind.elements.value != 1:
                    raise LoweringError(f"lpu: a constant of a cell is {kind}, not one f32 number")
                return Tensor(number=float(np.frombuffer(op.attr("value"), np.dtype("<f4"))[0]))
            case "load":
                return Tensor(weight=op.attr("weight"))
            case "concat":
                return Tensor(parts=[p for v in op.operands for p in self.values[v].parts])
            case "cast":
                return self._cast(op)
            case "matmul":
                return self._matmul(op)
            case "add" | "sub" | "mul" | "max" | "min":
                return self._binary(op)
            case "sigmoid":
                return self._each(op, _sigmoid)
            case "tanh":
                return self._each(op, _tanh)
        raise LoweringError(f"lpu does not map {op.mnemonic} ({op.node or 'no name'}) outside of a decoder")

    def _cast(self, op: DataflowOp) -> Tensor:
        source, to = self.values[op.operands[0]], op.attr("dtype")
        if source.parts or source.weight is not None:
            return source  # int8 operands of a matrix product
        if to == "f32":
            return self._each(op, lambda c, a: c.cast(a, F32, I32))
        if to == "i8":
            return self._each(op, lambda c, a: c.cast(a, I8, F32), I8)
        raise LoweringError(f"lpu: no cast to {to} in a cell")

    def _matmul(self, op: DataflowOp) -> Tensor:
        left, right = self.values[op.operands[0]], self.values[op.operands[1]]
        if not left.parts or right.weight is None:
            raise LoweringError(f"lpu: {op.node or 'matmul'} is no product of int8 inputs and a weight")
        pieces = []
        offset = 0
        for name, columns in left.parts:
            for begin, end in tiles_of(columns):
                pieces.append((name, begin, end, offset + begin, offset + end))
            offset += columns
        tensor = Tensor()
        for begin, end in tiles_of(tensor_type(op.results[0]).ints[-1]):
            tensor.tiles.append(self._product(right.weight, pieces, begin, end))
        return tensor

    def _product(
        self, weight: str, pieces: Sequence[tuple[str, int, int, int, int]], begin: int, end: int
    ) -> Value:
        """Columns begin..end of a product: up to four K tiles at once, partial sums in i32."""
        partial: Value | None = None
        for first in range(0, len(pieces), 4):
            chain = Chain(f"{weight}.{begin}.{first}", self.rows, ir=self.number)
            self.chains.append(chain)
            sums: list[Operand] = []
            for k, (name, low, high, k0, k1) in enumerate(pieces[first : first + 4], first):
                side, plane = k % 2, k // 2 % 2
                tile = self._tile(weight, side, plane, (begin, end), (k0, k1))
                vector = self._activation(name, low, high, k)
                sums.append(Mxm(tile, plane, vector, tuple(range(self.rows))))
            if partial is not None:
                sums.append(Mem(self._stored(partial), tuple(range(self.rows))))
            while len(sums) > 1:
                sums = [*sums[2:], chain.add("vxm.iadd", sums[0], sums[1], type=I32, out=I32)]
            total = (
                sums[0]
                if isinstance(sums[0], Res)
                else chain.add("vxm.iadd", sums[0], Imm(0.0), type=I32, out=I32)
            )
            partial = Value(I32, chain, total)
        assert partial is not None
        return partial

    def _activation(self, name: str, begin: int, end: int, k: int) -> Stored:
        key = (name, begin, k % 2)
        if key not in self.inputs:
            stored = self.storage.store(f"{name}.{begin}", I8, self.rows, mem(k % 2, 8 + k // 2 % 4, 1))
            self.inputs[key] = stored
        return self.inputs[key]

    def finish_inputs(self) -> None:
        """Ports of the int8 inputs, once it is known where their tiles lie."""
        for name, value in self.graph.input_values.items():
            kind = tensor_type(value)
            if kind.dtype == "i8":
                stored = [
                    next(s for (n, b, _), s in self.inputs.items() if n == name and b == begin)
                    for begin, _ in tiles_of(kind.ints[-1])
                ]
                self._port(name, "input", kind.ints, [(s, "i8") for s in stored])

    def _tile(self, weight: str, side: int, plane: int, n: tuple[int, int], k: tuple[int, int]) -> Tile:
        name = f"{weight}[{k[0]}:{k[1]},{n[0]}:{n[1]}]"
        units = mem(side, FIRST_WEIGHT_SLICE + 16 * plane, 16)
        stored = self.storage.store(name, I8, LANES, units, ways=16)
        expr = ["slice", ["slice", self._weight(weight), 0, k[0], k[1]], 1, n[0], n[1]]
        expr = ["pad", ["transpose", expr, [1, 0]], 0, 0, LANES - (n[1] - n[0])]
        layout = {"kind": "rows", "dtype": "i8", "ways": 16, "axes": None, "row_axes": 1, "take": None}
        kind: Any = "weight" if weight in self.weight_files else "constant"
        self.storage.port(name, kind, "int8", (LANES, k[1] - k[0]), stored, layout, expr)
        loads = tuple(tuple((stored, 16 * g + i, 0) for i in range(16)) for g in range(LOAD_GROUPS))
        return Tile(name, side, loads, self.number, (plane,))

    def _home(self, values: Sequence[Value]) -> Chain:
        """The chain that an elementwise op joins: that of its latest operand, or a new one."""
        chains = [v.chain for v in values if v.chain is not None]
        if chains:
            latest = max(chains, key=self.chains.index)
            if len(latest.ops) < MAX_OPS:
                latest.ir = self.number
                return latest
        chain = Chain(f"elementwise.{len(self.chains)}", self.rows, ir=self.number)
        self.chains.append(chain)
        return chain

    def _operand(self, chain: Chain, value: Value) -> Operand:
        if value.chain is chain and value.result is not None:
            return value.result
        return Mem(self._stored(value), tuple(range(self.rows)))

    def _each(self, op: DataflowOp, make: Callable[[Chain, Operand], Res], type: int = F32) -> Tensor:
        tensor = Tensor()
        for value in self.values[op.operands[0]].tiles:
            chain = self._home([value])
            tensor.tiles.append(Value(type, chain, make(chain, self._operand(chain, value))))
        return tensor

    def _binary(self, op: DataflowOp) -> Tensor:
        a, b = (self.values[v] for v in op.operands)
        count = max(len(a.tiles), len(b.tiles))
        tensor = Tensor()
        for t in range(count):
            values = [x.tiles[t] for x in (a, b) if x.tiles]
            chain = self._home(values)
            operands = [self._side(chain, x, t) for x in (a, b)]
            tensor.tiles.append(Value(F32, chain, chain.add(f"vxm.{op.mnemonic}", *operands)))
        return tensor

    def _side(self, chain: Chain, tensor: Tensor, t: int) -> Operand:
        if tensor.number is not None:
            return Imm(tensor.number)
        if tensor.weight is not None:
            return Mem(self._row(tensor.weight, t), (0,) * self.rows)
        return self._operand(chain, tensor.tiles[t])


def _sigmoid(chain: Chain, a: Operand) -> Res:
    power = chain.add("vxm.exp2", chain.add("vxm.mul", a, Imm(-LOG2E)))
    root = chain.add("vxm.rsqrt", chain.add("vxm.add", power, Imm(1.0)))
    return chain.add("vxm.mul", root, root)


def _tanh(chain: Chain, a: Operand) -> Res:
    whole = chain.cast(chain.add("vxm.mul", a, Imm(TANH_IN)), I16, F32)
    curve = chain.add("vxm.tanh", whole, type=I16, out=I16)
    return chain.add("vxm.mul", chain.cast(curve, F32, I16), Imm(TANH_OUT))


def lower_cell(graph: Graph, machine: Machine) -> Schedule:
    """The schedule of a graph of int8 products and elementwise ops; its one program is called "decode".

    Raises LoweringError for an op that it does not map, CapacityError where the weights do not fit.
    """
    latencies = Latencies.of(machine)
    ids, rows = tables.number_ops({"decode": graph})
    cell = Cell(graph)
    cell.build(ids["decode"])
    cell.finish_inputs()
    placer = Placer(Calendar(), TemplateCache(latencies), floor=0)
    place(placer, cell.chains)
    end = max(p.end for p in placer.placed) + machine.whole("chip.tiles")
    timed = Timed(
        before=placer.instructions, end=end, placed={"before": placer.placed, "body": [], "after": []}
    )
    timed.ends = {"before": [], "body": []}
    lowered = Lowered(cell.storage, {"decode": timed}, {}, cell.constants, cell.weight_files)
    plan = {
        "arithmetic": {"matmul": "int8", "accumulate": "int32"},
        "access_timing": tables.ACCESS_TIMING,
        "exact_time": True,
        "permutes": [],
        **plan_of(lowered),
    }
    table = tables.ops(rows, ids, {"decode": graph})
    request = Request(("decode",), batch=cell.rows, context=1, prompt=1)
    model = ModelRef(graph.name, graph.sha256, {}, graph.params, graph.layers)
    return tables.assemble(graph, machine, request, lowered, table, model, plan)
