"""Lower bounds on the time of a step of a model on the host, from the IR and the machine alone."""

from __future__ import annotations

from collections.abc import Sequence

from mapper.bounds import Bound
from mapper.ir.graph import Graph
from mapper.ir.op import tensor_type
from mapper.machine import Machine
from mapper_host.work import graph_flops, graph_weight_bytes


def bounds_of(graph: Graph, machine: Machine) -> Sequence[Bound]:
    """Bounds on one run of a static graph.

    Every weight is read at least once, and so is every key and value that the step can see. Of all these
    bytes no more than the last-level cache holds can still be there from the run before; the others come
    from memory.
    """
    weights = graph_weight_bytes(graph)
    names = graph.inputs_with_role("state")
    state = sum(tensor_type(graph.input_values[n]).bytes.value for n in names)
    total, cache = weights + state, machine.value("cache.bytes")
    near, far = machine.value("cache.bandwidth"), machine.value("memory.bandwidth")
    flops, rate = graph_flops(graph), machine.value("rate.vector")
    return (
        Bound("cache bandwidth", total / near, f"{total:.4g} B of weights and state at {near:.4g} B/s"),
        Bound(
            "memory bandwidth",
            max(0.0, total - cache) / far,
            f"{total:.4g} B of weights and state, of which {cache:.4g} B may be cached, at {far:.4g} B/s",
        ),
        Bound("arithmetic", flops / rate, f"{flops:.4g} operations of matrix products at {rate:.4g}/s"),
    )
