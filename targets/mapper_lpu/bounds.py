"""Lower bounds on the time of any schedule on one TSP, from the serving form and the machine alone.

Imports nothing of the lowering. What is assumed of every schedule: matrix products run on the MXM in fp16,
and values are f32 on the VXM in between. Norm factors may be applied late and score maxima left out, so they
count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mapper.bounds import Bound
from mapper.ir.op import DataflowOp
from mapper.ir.sections import Section
from mapper.machine import Machine
from mapper.schedule.tables import Phase, Request
from mapper_lpu.isa import ALUS, LANES, SLICES, mxm_position

if TYPE_CHECKING:
    from mapper.ir.graph import Graph

FP16_BYTES = 2


def _latencies(machine: Machine) -> dict[str, int]:
    """Fewest cycles from an op's operands at the VXM to its result there, by op."""
    alu = machine.whole("vxm.alu")
    # cast to fp16, out to the MXM, through it, back, into the VXM, and the join of the two byte planes
    matmul = 2 * alu + 2 * mxm_position(machine) + machine.whole("mxm.latency") + machine.whole("vxm.entry")
    return {
        "embed": machine.whole("mem.read") + machine.whole("mem.gather") + 1,
        "linear": matmul,
        "lm_head": matmul,
        "rope_at": 2 * alu,  # times cosine, plus the partner times sine
        # scores; subtract and exp2; times value and add; rsqrt, square, times
        "cached_attention": matmul + 7 * alu,
        # gate; times -log2 e, exp2, add 1, rsqrt, square, times gate (up joins there); down
        "gated_mlp": 2 * matmul + 6 * alu,
        "mlp": 2 * matmul + alu,
        "add": alu,
        "mul": alu,
    }


def critical_path(graph: Graph, machine: Machine) -> int:
    """Cycles of the longest chain of dependent ops at minimum latencies; a repeat counts its body `count`
    times.
    """
    latency = _latencies(machine)
    return sum(_longest(s, latency) * s.count for s in graph.sections()) + machine.whole("chip.tiles")


def _longest(section: Section, latency: Mapping[str, int]) -> int:
    done: dict[DataflowOp, int] = {}
    for op in section.ops:
        start = max((done.get(p, 0) for p in op.producers() if p is not None), default=0)
        done[op] = start + latency.get(op.mnemonic, 0)
    return max(done.values(), default=0)


def _weights(graph: Graph) -> int:
    """Elements of all matrices that the graph multiplies by, repeats unrolled."""
    total = 0
    for section in graph.sections():
        for op in section.ops:
            if op.mnemonic in ("linear", "lm_head", "gated_mlp", "mlp"):
                for slot in op.weights().values():
                    for name in section.table.get(slot, (slot,) * section.count):
                        shape = graph.weights[name].shape
                        total += shape[0] * shape[1] if len(shape) == 2 else 0
    return total


def _per_token(graph: Graph, count: Callable[[DataflowOp], int]) -> int:
    return sum(count(op) * s.count for s in graph.sections() for op in s.ops)


def _cache_bytes(op: DataflowOp) -> int:
    """Key and value bytes that attention must read: fp16 at least; in prefill the cache is written in the
    same run.
    """
    if op.mnemonic != "cached_attention" or op.operand_shape(0)[2] > 1:
        return 0
    size = 0
    for index in (1, 2):
        batch, heads, rows, dim = op.operand_shape(index)
        size += batch * heads * rows * dim * FP16_BYTES
    return size


def _exponentials(op: DataflowOp) -> int:
    """Exponentials and roots, one large ALU operation on one lane each, that an op needs."""
    if op.mnemonic == "cached_attention":
        batch, heads, tokens, _ = op.operand_shape(0)
        rows = op.operand_shape(1)[2] if tokens == 1 else (tokens + 1) // 2
        return batch * heads * tokens * rows
    return 0


def _one(graph: Graph, machine: Machine) -> list[Bound]:
    clock = machine.value("chip.clock")
    planes = 2 * machine.whole("mxm.planes")
    weights = _weights(graph)
    load = planes * machine.whole("mxm.load_vectors") * LANES
    tokens = graph.outputs[0][1].ints
    rows = tokens[0] * tokens[1]
    cells = planes // 2 * LANES * LANES
    memory = 2 * SLICES * LANES
    read = weights * FP16_BYTES + _per_token(graph, _cache_bytes)
    exponentials = _per_token(graph, _exponentials)
    path = critical_path(graph, machine)
    large = ALUS // 2
    return [
        Bound("critical path", path / clock, f"{path} cycles of dependent ops at minimum latencies"),
        Bound(
            "weight install",
            weights * FP16_BYTES / load / clock,
            f"{weights * FP16_BYTES} weight bytes through {load} B/cycle into the MXM planes",
        ),
        Bound(
            "mxm",
            rows * weights / cells / clock,
            f"{rows * weights} multiply-adds on {cells} cells per cycle (fp16: two planes per matrix)",
        ),
        Bound("sram", read / memory / clock, f"{read} bytes read at {memory} B/cycle of all slices"),
        Bound(
            "vxm",
            exponentials / (large * LANES) / clock,
            f"{exponentials} exponentials on {large} large ALUs of {LANES} lanes",
        ),
    ]


def bounds(graph: Graph, machine: Machine, request: Request) -> Mapping[Phase, Sequence[Bound]]:
    """Bounds per requested phase."""
    from mapper.passes.serve import serve

    return {
        phase: _one(
            serve(graph, phase=phase, batch=request.batch, prompt=request.prompt, context=request.context),
            machine,
        )
        for phase in request.phases
    }
