"""A graph as backends walk it: plain stretches and repeats, with the slots of a repeat resolved to names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xdsl.ir import SSAValue

from mapper.ir.op import DataflowOp
from mapper.ir.structure import RepeatOp, YieldOp


@dataclass(frozen=True, eq=False)
class Carried:
    """A value handed from layer to layer: first `initial`, `argument` inside, `yielded` at the end, then
    `result`."""

    initial: SSAValue
    argument: SSAValue
    yielded: SSAValue
    result: SSAValue


@dataclass(frozen=True, eq=False)
class Shared:
    """A value that every iteration reads: `value` outside, `argument` inside."""

    value: SSAValue
    argument: SSAValue


@dataclass(frozen=True, eq=False)
class InputSlot:
    """One iterated input: `argument` inside the body, `values` outside (one per iteration), and `names`, the
    graph inputs they are ("" for a value that is no input)."""

    argument: SSAValue
    values: tuple[SSAValue, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class OutputSlot:
    """One iterated output: `yielded` inside the body, `results` outside, and `names`, the graph outputs they
    are."""

    yielded: SSAValue
    results: tuple[SSAValue, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Section:
    """A stretch of ops. For a repeat, `ops` are the body's and `repeat` is the op; else count is 1."""

    ops: tuple[DataflowOp, ...]
    count: int = 1
    repeat: RepeatOp | None = None
    table: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    carried: tuple[Carried, ...] = ()
    shared: tuple[Shared, ...] = ()
    inputs: tuple[InputSlot, ...] = ()
    outputs: tuple[OutputSlot, ...] = ()


def sections_of(
    ops: Sequence[DataflowOp], inputs: Mapping[str, SSAValue], outputs: Mapping[str, SSAValue]
) -> list[Section]:
    """Cuts a graph's ops at its repeats. `inputs` and `outputs` are the graph's, by name."""
    sections: list[Section] = []
    plain: list[DataflowOp] = []
    input_names = {v: n for n, v in inputs.items()}
    output_names = {v: n for n, v in outputs.items()}
    for op in ops:
        if isinstance(op, RepeatOp):
            if plain:
                sections.append(Section(tuple(plain)))
            sections.append(_repeat_section(op, input_names, output_names))
            plain = []
        else:
            plain.append(op)
    return [*sections, Section(tuple(plain))] if plain else sections


def _repeat_section(
    op: RepeatOp, input_names: Mapping[SSAValue, str], output_names: Mapping[SSAValue, str]
) -> Section:
    last = op.block.last_op
    assert isinstance(last, YieldOp)
    n, m = op.attr("carried"), op.attr("shared")
    args, yielded = op.block.args, last.operands
    return Section(
        ops=tuple(op.ops()),
        count=op.attr("count"),
        repeat=op,
        table=op.attr("table"),
        carried=tuple(map(Carried, op.operands[:n], args[:n], yielded[:n], op.results[:n])),
        shared=tuple(map(Shared, op.operands[n : n + m], args[n : n + m])),
        inputs=tuple(
            InputSlot(a, vs, tuple(input_names.get(v, "") for v in vs))
            for a, vs in zip(args[n + m :], op.iterated_operands(), strict=True)
        ),
        outputs=tuple(
            OutputSlot(y, vs, tuple(output_names.get(v, "") for v in vs))
            for y, vs in zip(yielded[n:], op.iterated_results(), strict=True)
        ),
    )
