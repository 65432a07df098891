"""NumPy reference semantics: the meaning of every op, for tests, constant folding and recognition's own
checks.

Written for clarity, not speed; shares no code with the kernels of any target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from xdsl.ir import Operation, SSAValue

from mapper.errors import ModelError
from mapper.ir.graph import Graph
from mapper.ir.infer import operands_by_name
from mapper.ir.op import DataflowOp, tensor_type
from mapper.ir.structure import RepeatOp, YieldOp
from mapper.ir.types import Array, TensorType, dtype_name, is_float, numpy_dtype


@dataclass(frozen=True)
class Step:
    """One op being evaluated: its operands as arrays, weights by symbol, values of dimension symbols."""

    op: DataflowOp
    args: Mapping[str, Any]
    weights: Callable[[str], Array]
    symbols: Mapping[str, int]
    precision: str | None = None

    def arg(self, name: str) -> Array:
        """The array of an operand that is there."""
        array: Array = self.args[name]
        return array

    def optional(self, name: str) -> Array | None:
        """The array of an operand, None where absent."""
        return self.args.get(name)

    def attr(self, name: str) -> Any:
        """The attribute as a Python value."""
        return self.op.attr(name)

    def weight(self, name: str) -> Array | None:
        """The array of the weight that attribute `name` points to, None where it is absent."""
        symbol = self.op.attr(name)
        return None if symbol is None else self.cast(self.weights(symbol))

    def need(self, name: str) -> Array:
        """The array of a weight that must be there."""
        array = self.weight(name)
        if array is None:
            raise ModelError(f"{self.op.name} has no {name}")
        return array

    def cast(self, array: Array) -> Array:
        """The array in the precision asked for, where it is floating-point."""
        wanted = result_dtype(dtype_name(array.dtype), self.precision)
        return array if array.dtype == wanted else array.astype(wanted)

    def sizes(self, name: str) -> list[int]:
        """The numbers of a `Dims` attribute."""
        return [d.evaluate(self.symbols) for d in self.op.attr(name)]


Meaning = Callable[[Step], Any]
REGISTERED: dict[str, Meaning] = {}
_M = TypeVar("_M", bound=Meaning)


def meaning(*mnemonics: str) -> Callable[[_M], _M]:
    """Registers the reference semantics of ops."""

    def register(function: _M) -> _M:
        REGISTERED.update(dict.fromkeys(mnemonics, function))
        return function

    return register


def result_dtype(dtype: str, precision: str | None) -> np.dtype[Any]:
    """The NumPy dtype that values of `dtype` are computed in: `precision` for floats where it is given."""
    return numpy_dtype(precision if precision is not None and is_float(dtype) else dtype)


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Array],
    outputs: Sequence[str] | None = None,
    precision: str | None = None,
) -> dict[str, Array]:
    """The outputs by name (all of them, or those named). `precision` "f64" computes every float op in
    float64.

    Raises ModelError where an input is missing or has the wrong shape, WeightsMissingError where weights
    are needed and absent."""
    graph = graph.chosen(inputs)
    names = list(graph.output_values) if outputs is None else list(outputs)
    wanted = [graph.output_values[n] for n in names]
    return dict(zip(names, evaluate_values(graph, inputs, wanted, precision), strict=True))


def evaluate_values(
    graph: Graph, inputs: Mapping[str, Array], values: Sequence[SSAValue], precision: str | None = None
) -> list[Array]:
    """The arrays of some values of the graph's top level, computing only what they need. Inputs that they do
    not need may be left out."""
    known: dict[SSAValue, Array] = {}
    for name, value in graph.input_values.items():
        if name in inputs:
            array = np.asarray(inputs[name])
            known[value] = array.astype(result_dtype(tensor_type(value).dtype, precision))
    run = _Run(graph, bind_symbols(graph.inputs, inputs), precision)
    needed = cone(values)
    for op in graph.top():
        if op in needed:
            run.step(op, known, {})
    missing = [v for v in values if v not in known]
    if missing:
        raise ModelError(f"inputs given are {sorted(inputs)}; a value asked for needs another one")
    return [known[v] for v in values]


def cone(values: Sequence[SSAValue]) -> set[Operation]:
    """All ops that some values depend on."""
    found: set[Operation] = set()
    pending = [v.owner for v in values]
    while pending:
        owner = pending.pop()
        if isinstance(owner, Operation) and owner not in found:
            found.add(owner)
            pending += [v.owner for v in owner.operands]
    return found


def bind_symbols(types: Sequence[tuple[str, TensorType]], inputs: Mapping[str, Array]) -> dict[str, int]:
    """Values of dimension symbols from the inputs' shapes. Raises ModelError on a contradiction."""
    bound: dict[str, int] = {}
    for name, kind in types:
        if name not in inputs:
            continue
        shape = np.shape(inputs[name])
        if len(shape) != kind.rank:
            raise ModelError(f"input {name!r} has shape {list(shape)}, and must have rank {kind.rank}")
        for dim, size in zip(kind.shape, shape, strict=True):
            text = str(dim)
            if not dim.is_const and dim.symbols == {text}:
                if bound.setdefault(text, size) != size:
                    raise ModelError(f"input {name!r}: {text} is {size} here and {bound[text]} elsewhere")
            elif dim.symbols <= set(bound) and dim.evaluate(bound) != size:
                raise ModelError(
                    f"input {name!r} has shape {list(shape)}; {dim} must be {dim.evaluate(bound)}"
                )
    return bound


@dataclass(frozen=True)
class _Run:
    graph: Graph
    symbols: Mapping[str, int]
    precision: str | None

    def step(self, op: DataflowOp, known: dict[SSAValue, Array], slots: Mapping[str, str]) -> None:
        """Evaluates one op into `known`; `slots` maps slot names to symbols."""
        if isinstance(op, RepeatOp):
            self.repeat(op, known)
            return

        def weights(symbol: str) -> Array:
            return self.graph.weights[slots.get(symbol, symbol)].load()

        absent = [v for v in op.operands if v not in known]
        if absent:
            raise ModelError(f"{op.name}: an input that it depends on was not given")
        results = evaluate_op(op, [known[v] for v in op.operands], weights, self.symbols, self.precision)
        known.update(zip(op.results, results, strict=True))

    def repeat(self, op: RepeatOp, known: dict[SSAValue, Array]) -> None:
        n = op.attr("carried") + op.attr("shared")
        last = op.block.last_op
        assert isinstance(last, YieldOp)
        state = [known[v] for v in op.operands[:n]]
        collected: list[list[Array]] = [[] for _ in op.iterated_results()]
        for i in range(op.attr("count")):
            slots = {slot: symbols[i] for slot, symbols in op.attr("table").items()}
            local: dict[SSAValue, Array] = {}
            local.update(
                zip(op.block.args, [*state, *(known[s[i]] for s in op.iterated_operands())], strict=True)
            )
            for inner in op.ops():
                self.step(inner, local, slots)
            yielded = [local[v] for v in last.operands]
            carried = op.attr("carried")
            state = [*yielded[:carried], *state[carried:]]
            for out, value in zip(collected, yielded[carried:], strict=True):
                out.append(value)
        flat = [value for out in collected for value in out]
        known.update(zip(op.results, [*state[: op.attr("carried")], *flat], strict=True))


def evaluate_op(
    op: DataflowOp,
    operands: Sequence[Array],
    weights: Callable[[str], Array],
    symbols: Mapping[str, int],
    precision: str | None = None,
) -> list[Array]:
    """The results of one op on arrays. Raises ModelError naming the op where they do not fit it."""
    from mapper.ir.reference_meanings import MEANINGS

    given = dict(zip(op.operands, operands, strict=True))
    args: dict[str, Any] = {}
    for name, value in operands_by_name(op).items():
        if isinstance(value, Sequence):
            args[name] = [given[v] for v in value]
        else:
            args[name] = None if value is None else given[value]
    step = Step(op, args, weights, symbols, precision)
    try:
        with np.errstate(all="ignore"):
            made = MEANINGS[op.mnemonic](step)
    except (ValueError, IndexError, TypeError) as error:
        place = f" ({op.node})" if op.node else ""
        raise ModelError(f"{op.name}{place}: {error}") from error
    results = made if isinstance(made, tuple) else (made,)
    wanted = [result_dtype(tensor_type(r).dtype, precision) for r in op.results]
    return [np.asarray(r).astype(d, copy=False) for r, d in zip(results, wanted, strict=True)]
