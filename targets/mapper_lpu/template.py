"""From a chain to a rigid template: levels, inserted copies, the VXM assignment.

Cycle 0 of a template is the issue of its first VXM level for vector 0.
"""

from __future__ import annotations

from dataclasses import replace

from mapper.errors import LoweringError
from mapper_lpu import calendar
from mapper_lpu.assign import Node, assign
from mapper_lpu.chain import Chain, Gather, Hold, Mem, Mxm, Op, Res, Self
from mapper_lpu.emit import Emitter
from mapper_lpu.instruction import Latencies, Template
from mapper_lpu.isa import F32


def levelled(chain: Chain, latency: int) -> tuple[list[Op], list[int]]:
    """Operations with copies inserted, and their offsets: every inner edge takes exactly `latency` cycles."""
    count = len(chain.ops)
    asap = [0] * count
    for i, op in enumerate(chain.ops):
        for operand in (op.a, op.b):
            if isinstance(operand, Res | Hold):
                asap[i] = max(asap[i], asap[operand.op] + 1)
    level = list(asap)
    for i in reversed(range(count)):
        consumers = [
            level[j]
            for j, op in enumerate(chain.ops)
            if any(isinstance(o, Res | Hold) and o.op == i for o in (op.a, op.b))
        ]
        if consumers:
            level[i] = min(consumers) - 1
    ops = list(chain.ops)
    levels = list(level)
    copies: dict[tuple[int, int], int] = {}

    def at(producer: int, wanted: int) -> int:
        """The operation that has the value of `producer` at level `wanted`."""
        if level[producer] == wanted:
            return producer
        key = (producer, wanted)
        if key not in copies:
            source = at(producer, wanted - 1)
            ops.append(
                Op("vxm.copy", Res(source), None, F32, F32, chain.ops[producer].ir, chain.ops[producer].count)
            )
            levels.append(wanted)
            copies[key] = len(ops) - 1
        return copies[key]

    for i in range(count):
        op = ops[i]
        a, b = op.a, op.b
        if isinstance(a, Res):
            a = Res(at(a.op, levels[i] - 1))
        if isinstance(b, Res):
            b = Res(at(b.op, levels[i] - 1))
        ops[i] = replace(op, a=a, b=b)
    return ops, [n * latency for n in levels]


def _nodes(chain: Chain, ops: list[Op], offsets: list[int], order: list[int], lag: int) -> list[Node]:
    rank = {op: n for n, op in enumerate(order)}
    consumed = {o.op for op in ops for o in (op.a, op.b) if isinstance(o, Res)}
    nodes = []
    for i in order:
        op = ops[i]
        outer, inner = [], []
        hold: int | None = None
        for slot, operand in enumerate((op.a, op.b)):
            if isinstance(operand, Mem | Gather):
                stored = operand.value if isinstance(operand, Mem) else operand.table
                outer.append((slot, 1 - stored.hemisphere))
            elif isinstance(operand, Mxm):
                outer.append((slot, 1 - operand.tile.hemisphere))
            elif isinstance(operand, Res):
                inner.append((slot, rank[operand.op]))
            elif isinstance(operand, Hold):
                hold = rank[operand.op]
        outs = [o for o in chain.outs if o.op == i]
        directions = {o.value.hemisphere for o in outs}
        if len(directions) > 1:
            raise LoweringError(f"{chain.name}: one result is written on both sides")
        accumulates = isinstance(op.b, Self)
        count = op.count or chain.count
        first = max(0, count - lag) if accumulates else 0
        nodes.append(
            Node(
                op.opcode,
                offsets[i],
                count,
                tuple(outer),
                tuple(inner),
                hold,
                directions.pop() if directions else None,
                bool(outs) or i in consumed,
                first,
            )
        )
    return nodes


def _rounded(nodes: list[Node]) -> tuple[Node, ...]:
    """The same problem, or a stricter one, with vector counts rounded up, so that chains of many lengths
    share it.
    """
    return tuple(replace(n, count=1 << (n.count - 1).bit_length(), result_from=0) for n in nodes)


def _active(chain: Chain, ops: list[Op], order: list[int]) -> dict[int, list[int]]:
    """Per operation the vectors whose result is used: those that an output or a consumer needs."""
    needed: dict[int, set[int]] = {i: set() for i in order}
    for output in chain.outs:
        needed[output.op] |= {i for i, row in enumerate(output.rows) if row >= 0}
    for i in reversed(order):
        op = ops[i]
        if isinstance(op.b, Self):  # an accumulation needs all that came before
            needed[i] = set(range(op.count or chain.count))
        for operand in (op.a, op.b):
            if isinstance(operand, Res | Hold):
                needed[operand.op] |= needed[i]
    return {i: sorted(vectors) for i, vectors in needed.items()}


def build(chain: Chain, lat: Latencies, seed: int) -> Template | None:
    """The instructions of a chain with one VXM assignment per seed. None where this seed gives none."""
    ops, offsets = levelled(chain, lat.alu)
    order = sorted(range(len(ops)), key=lambda i: (offsets[i], i))
    nodes = _nodes(chain, ops, offsets, order, lat.alu)
    found = assign(_rounded(nodes), lat.entry, lat.alu, seed) or assign(
        tuple(nodes), lat.entry, lat.alu, seed
    )
    if found is None:
        return None
    builder = Emitter(
        chain, lat, found, nodes, {op: n for n, op in enumerate(order)}, _active(chain, ops, order)
    )
    for number, i in enumerate(order):
        builder.operation(number, i, ops[i], offsets[i], nodes[number])
    uses = calendar.merge(builder.raw)
    if uses is None:
        return None
    builder.template.uses = uses
    return builder.template
