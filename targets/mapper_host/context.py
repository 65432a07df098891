"""What a lowering rule sees: values by SSA name, weights, and how to emit a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from xdsl.ir import SSAValue

from mapper.backend import weight_source
from mapper.errors import LoweringError
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.weights import WeightSymbol
from mapper_host.held import native
from mapper_host.opcodes import CODES, ELEMENTWISE, VECTOR
from mapper_host.program import BlockSteps, Slice, Storage, Value, step
from mapper_host.strides import broadcast, collapse
from mapper_kernels.formats import Format
from mapper_kernels.names import ELEMENTWISE as ELEMENTWISE_NUMBERS


@dataclass(frozen=True)
class Form:
    """How a weight is held: element type, and whether its last two dimensions are exchanged; or the part of a
    packed one."""

    dtype: str
    turned: bool = False
    part: str = ""


@dataclass(frozen=True)
class Matrix:
    """A weight [N, K], or a stack [E, N, K], in the format in which the kernels read it."""

    format: Format
    n: int
    k: int
    values: Value
    scales: Value | None = None
    zeros: Value | None = None

    @property
    def operands(self) -> list[Value]:
        """Its operands of a step, in order."""
        return [v for v in (self.values, self.scales, self.zeros) if v is not None]


@dataclass(eq=False)
class Weights:
    """Weights and constants that any program uses: one storage each, with the value expression that fills
    it."""

    values: dict[str, Value] = field(default_factory=dict)
    sources: dict[Storage, Any] = field(default_factory=dict)
    symbols: dict[str, WeightSymbol] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def symbol(self, weight: WeightSymbol, form: Form) -> Value:
        """The weight in another form, converted when it is loaded."""
        if form.part:
            assert weight.packing is not None
            return self.symbol(weight.packing.parts[form.part], Form(form.dtype))
        key = weight.name if weight.dtype == form.dtype else f"{weight.name}:{form.dtype}"
        key += ":transposed" if form.turned else ""
        if key not in self.values:
            stored = weight_source(weight)
            source = stored.expression
            self.symbols.update(stored.files)
            self.arrays.update({n: np.ascontiguousarray(a) for n, a in stored.constants.items()})
            if weight.dtype != form.dtype:
                source = ["cast", source, np.dtype(_numpy(form.dtype)).name]
            if form.turned:
                rank = len(weight.shape)
                source = ["transpose", source, [*range(rank - 2), rank - 1, rank - 2]]
            shape = tuple(weight.shape)
            turned = (*shape[:-2], *shape[:-3:-1])
            self._add(key, turned if form.turned else shape, form.dtype, source)
        return self.values[key]

    def constant(self, array: npt.NDArray[Any], dtype: str) -> Value:
        """An array held in the schedule; equal ones are stored once."""
        import hashlib

        raw = np.ascontiguousarray(array)
        digest = hashlib.sha256(f"{dtype} {raw.shape} ".encode() + raw.tobytes()).hexdigest()
        key = f"constant.{digest[:16]}"
        if key not in self.values:
            self.arrays[key] = raw
            self._add(key, raw.shape, dtype, ["const", key])
        return self.values[key]

    def _add(self, key: str, shape: tuple[int, ...], dtype: str, source: Any) -> None:
        value = Value(Storage(key, 0, "weights"), shape, dtype)
        value.storage.bytes = value.bytes
        self.values[key] = value
        self.sources[value.storage] = source


def _numpy(dtype: str) -> Any:
    from mapper.ir.types import numpy_dtype

    return numpy_dtype(dtype)


HALVES = ("f16", "bf16")
"""Element types that the kernels of transformer ops read and write through float32."""


@dataclass(eq=False)
class Context:
    """The program being lowered: the current block and op, and the value of every SSA value so far.

    `slots` maps a weight slot of the repeat at hand to its symbol (of the first iteration, or of the one at
    hand).
    """

    graph: Graph
    weights: Weights
    block: BlockSteps
    place: str
    values: dict[SSAValue, Value] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)
    used_slots: dict[Storage, tuple[str, Form]] = field(default_factory=dict)
    serving: bool = False
    op: DataflowOp | None = None
    row: int = -1
    narrowed: list[tuple[Value, Value]] = field(default_factory=list)

    def fail(self, reason: str) -> NoReturn:
        """Raise LoweringError naming the op and its place."""
        kind = self.op.mnemonic if self.op is not None else "graph"
        node = f" ({self.op.node})" if self.op is not None and self.op.node else ""
        raise LoweringError(f"host: {self.place}{kind}{node}: {reason}")

    def value(self, ssa: SSAValue) -> Value:
        """The value of an SSA value that is already lowered."""
        return self.values[ssa]

    def operand(self, name: str) -> Value | None:
        """An optional operand of the op at hand."""
        assert self.op is not None
        ssa = self.op.operand(name)
        return None if ssa is None else self.values[ssa]

    def f32(self, ssa: SSAValue) -> Value:
        """The value of an SSA value in float32, widened where it has half the precision."""
        value = self.values[ssa]
        if value.dtype in HALVES:
            wide = self.temporary(value.shape, "f32")
            self.elementwise(ELEMENTWISE_NUMBERS["cast"], [value], wide)
            return wide
        if value.dtype != "f32":
            self.fail(f"computes in f32, not in {value.dtype}")
        return value

    def product(self, attribute: str, transposed: bool) -> Matrix:
        """The matrix that an attribute names as [N, K] or [E, N, K], in its stored format where the kernels
        have it."""
        assert self.op is not None
        name = self.op.attr(attribute)
        if name is None:
            self.fail(f"has no {attribute}")
        symbol = self.graph.weights[self.slots.get(name, name)]
        held = native(symbol, transposed)
        n, k = symbol.shape[-2:] if transposed else symbol.shape[:-3:-1]
        if not held.blocked and not held.scale:
            value = self.weight(attribute, held.name, not transposed)
            assert value is not None
            return Matrix(held, n, k, value)
        assert symbol.packing is not None
        parts = [
            self._part(name, symbol, p) for p in ("values", "scales", "zeros") if p in symbol.packing.parts
        ]
        return Matrix(held, n, k, *parts)

    def _part(self, name: str, symbol: WeightSymbol, part: str) -> Value:
        assert symbol.packing is not None
        form = Form(symbol.packing.parts[part].dtype, False, part)
        value = self.weights.symbol(symbol, form)
        self._note_slot(value.storage, name if name in self.slots else "", form)
        return value

    def weight(self, attribute: str, dtype: str | None = "f32", turned: bool = False) -> Value | None:
        """The weight that an attribute of the op at hand names, as elements of `dtype` (None: as stored)."""
        assert self.op is not None
        name = self.op.attr(attribute)
        if name is None:
            return None
        symbol = self.graph.weights[self.slots.get(name, name)]
        wanted = dtype or symbol.dtype
        if wanted not in CODES:
            self.fail(f"weight {symbol.name} has element type {wanted}")
        form = Form(wanted, turned)
        value = self.weights.symbol(symbol, form)
        self._note_slot(value.storage, name if name in self.slots else "", form)
        return value

    def need(self, attribute: str, dtype: str | None = "f32") -> Value:
        """As `weight`, for one that must be there."""
        value = self.weight(attribute, dtype)
        if value is None:
            self.fail(f"has no {attribute}")
        return value

    def _note_slot(self, storage: Storage, slot: str, form: Form) -> None:
        known = self.used_slots.setdefault(storage, (slot, form))
        if known != (slot, form):
            raise SlotConflict

    def out(self, index: int = 0) -> Value:
        """New storage for a result of the op at hand."""
        assert self.op is not None
        ssa = self.op.results[index]
        kind = tensor_type(ssa)
        if kind.dtype not in CODES:
            self.fail(f"makes element type {kind.dtype}")
        if not kind.is_static:
            self.fail(f"the shape of its result is not known before it runs ({kind.shape})")
        self.values[ssa] = self.temporary(kind.ints, kind.dtype)
        return self.values[ssa]

    def f32_out(self, index: int = 0) -> Value:
        """As `out`, for a kernel that writes float32: a result of half the precision is narrowed after it."""
        y = self.out(index)
        if y.dtype not in HALVES:
            return y
        wide = self.temporary(y.shape, "f32")
        self.narrowed.append((wide, y))
        return wide

    def narrow(self) -> None:
        """Emit the narrowing of the results that the op at hand has made in float32."""
        for wide, y in self.narrowed:
            self.elementwise(ELEMENTWISE_NUMBERS["cast"], [wide], y)
        self.narrowed.clear()

    def temporary(self, shape: Sequence[int], dtype: str) -> Value:
        """New storage for an array of this program."""
        kind = self.op.mnemonic if self.op is not None else "value"
        value = Value(Storage(f"{self.place}{kind}", 0), tuple(shape), dtype)
        value.storage.bytes = value.bytes
        return value

    def alias(self, value: Value, index: int = 0) -> None:
        """The result is the same bytes as `value`, in the result's shape."""
        assert self.op is not None
        ssa = self.op.results[index]
        kind = tensor_type(ssa)
        if not kind.is_static:
            self.fail(f"the shape of its result is not known before it runs ({kind.shape})")
        self.values[ssa] = Value(value.storage, kind.ints, kind.dtype)

    def emit(
        self,
        opcode: int,
        args: Sequence[int],
        operands: Sequence[Value | Slice],
        flops: int,
        writes: int = 1,
        bytes: int = -1,
    ) -> None:
        """Append a step of the op at hand. A step that writes nothing is left out."""
        if any(v.bytes for v in operands[-writes:]):
            self.block.steps.append(step(opcode, args, operands, writes, self.row, flops, bytes))

    def elementwise(self, number: int, inputs: Sequence[Value], out: Value) -> None:
        """Emit one elementwise operation, with broadcasting."""
        walks = [broadcast(v.shape, out.shape) for v in inputs]
        shape, collapsed = collapse(out.shape, [*walks, broadcast(out.shape, out.shape)])
        first, last = ELEMENTWISE_NUMBERS["add"], ELEMENTWISE_NUMBERS["div"]
        plain = all(v.dtype == "f32" for v in (*inputs, out)) and len(shape) == 1 and first <= number <= last
        if plain and out.items > 1 and collapsed[0] == (1,):
            args = [number - first, out.items, int(collapsed[1] == (0,))]
            self.emit(VECTOR, args, [*inputs, out], out.items)
            return
        codes = [*(v.code for v in inputs), 0, 0, 0][:3]
        args = [number, len(inputs), *codes, out.code, len(shape), *shape]
        for walk in collapsed[:-1]:
            args += walk
        self.emit(ELEMENTWISE, args, [*inputs, out], out.items)


class SlotConflict(Exception):
    """One weight stands for two slots of a repeat: the repeat has to be unrolled."""


Rule = Callable[[Context, DataflowOp], None]
RULES: dict[str, Rule] = {}
"""How each op is lowered, by mnemonic."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the lowering of ops."""

    def wrap(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return wrap
