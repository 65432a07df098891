"""Lower bounds on the time of one step, from the IR and the machine alone: no lowering is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mapper.bounds import Bound
from mapper.ir.graph import Graph
from mapper.ir.op import DataflowOp, tensor_type
from mapper.machine import Machine
from mapper.schedule.tables import Phase, Request
from mapper_gpu.capacity import chips_for
from mapper_gpu.degrees import degrees_of
from mapper_gpu.packed import form_of, held_bytes, item_bytes, turned_of

_PRODUCTS = {
    "linear": ("weight",), "lm_head": ("weight",), "mlp": ("up", "down"), "gated_mlp": ("gate", "up", "down"),
    "packed_mlp": ("gate_up", "down"), "cached_latent_attention": ("weight",),
}  # fmt: skip


def bounds_of(
    graphs: Mapping[Phase, Graph], source: Graph, machine: Machine, request: Request, phase: Phase
) -> Sequence[Bound]:
    """Bounds on one run of a phase's serving graph, that of one replica, on all of the request's chips.

    Every matrix is read from HBM once by every replica, but for what L2 may have kept; in decode so is every
    key and value that the step sees. Both at the pins' rate. Of experts those are read that some token
    chooses where all choices are equally likely. Products run at the dense peak of the
    format that they are computed in: with low-bit weights that of the activations, 16 bits."""
    form = form_of(source, request.weights, "tensor.f16" in machine.constants)
    served, item = graphs[phase], item_bytes(form)
    chips = request.chips or chips_for(graphs, machine, item)
    degrees = degrees_of(request.parallel, chips)
    replicas, spread = degrees.data, degrees.spread
    weights = flops = state = 0.0
    for s in served.sections():
        for op in s.ops:
            read, products = _experts(served, op, item, spread)
            weights += s.count * (replicas * _read(served, op, item) + replicas / spread * read)
            flops += s.count * (replicas * _flops(served, op) + replicas / spread * products)
            state += s.count * replicas * _cache(op, item) if phase == "decode" else 0
    form = "f32" if form == "f32" else "bf16"
    rate = max(machine.value(k) for k in (f"tensor.{form}", "vector.f32") if k in machine.constants)
    hbm, kept = machine.value("memory.hbm.bandwidth"), machine.value("memory.l2.capacity")
    total = weights + state
    far = max(0.0, total / chips - kept)
    # in cache, all bytes still pass the SMs' ports
    near = total / chips / (machine.value("sm.count") * machine.value("sm.port") * machine.value("sm.clock"))
    return (
        Bound(
            "HBM bandwidth",
            far / hbm,
            f"{total:.4g} B of weights and cache on {chips} chips at {hbm:.4g} B/s",
        ),
        Bound("L2 to SM", near, f"{total:.4g} B of weights and cache through the ports of all SMs"),
        Bound(
            "arithmetic",
            flops / rate / chips,
            f"{flops:.4g} operations of products at {rate:.4g}/s dense {form}",
        ),
    )


def _weights(graph: Graph, op: DataflowOp) -> int:
    """Elements of the matrices that an op reads whole."""
    found = [graph.weight(op, name) for name in _PRODUCTS.get(op.mnemonic, ())]
    return sum(w.elements for w in found if w is not None)


def _experts(graph: Graph, op: DataflowOp, item: int, replicas: int) -> tuple[float, float]:
    """(bytes that an even routing of `replicas` times the tokens reads, low-bit ones as stored; operations of
    the chosen experts' products)."""
    if op.mnemonic != "moe":
        return 0.0, 0.0
    named = ((graph.weight(op, name), turned_of(op, name)) for name in ("gate", "up", "down"))
    parts = [(w, turned) for w, turned in named if w is not None]
    found = [w for w, _ in parts]
    count, chosen = found[0].shape[0], op.operand_shape(1)[-1]
    tokens = replicas * math.prod(op.operand_shape(0)[:-1])
    each = sum(w.elements for w in found) // count
    size = sum(held_bytes(w, item, turned) for w, turned in parts)
    return size * (1 - (1 - chosen / count) ** tokens), 2.0 * tokens * chosen * each


def _read(graph: Graph, op: DataflowOp, item: int) -> float:
    """Bytes of the matrices that an op reads whole, low-bit ones as stored."""
    found = ((graph.weight(op, n), turned_of(op, n)) for n in _PRODUCTS.get(op.mnemonic, ()))
    return sum(held_bytes(w, item, turned) for w, turned in found if w is not None)


def _flops(graph: Graph, op: DataflowOp) -> int:
    return 2 * math.prod(op.operand_shape(0)[:-1]) * _weights(graph, op) if op.mnemonic in _PRODUCTS else 0


def _cache(op: DataflowOp, item: int) -> int:
    """Bytes of keys and values that an attention sees at a full context."""
    if op.mnemonic not in ("cached_attention", "cached_latent_attention"):
        return 0
    window = op.attr("window")
    total = 0
    for i in (1, 2):
        b, h, length, d = tensor_type(op.operands[i]).ints
        total += b * h * (min(length, window) if window else length) * d * item
    return total
