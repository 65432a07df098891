"""Programs of routing and experts. A stack of weights [experts, n, k] is one operand whose slice is all of it
on the task's chip: which expert's columns a task reads is in the block's row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapper_gpu.nodes import Matrix, Node
from mapper_gpu.programs import NODES, Builder, run_nodes, vector_name


def _top_k(b: Builder, node: Node, c: str) -> None:
    logits = b.value(node.inputs[0], b.rows, "all")
    vector = node.attr("correction")
    correction = None if vector is None else b.read(vector_name(vector), "all", "all")
    names = ("scoring", "groups", "top_groups", "group_score", "group_fill", "normalise", "epsilon", "scale")
    b.emit("top_k", b.register(node.output), logits, correction, node.attr("chosen"),
           *(node.attr(n) for n in names))  # fmt: skip


def _sorted(b: Builder, node: Node, c: str) -> None:
    routing = b.value(node.inputs[0], "all", "all")
    owned = node.attr("owned", 0)
    b.emit(node.kind, b.register(node.output), routing,
           *(node.attr(n) for n in ("experts", "chosen", "tile", "blocks")),
           *((b.owner * owned, owned) if owned else ()))  # fmt: skip


def _weighted_sum(b: Builder, node: Node, c: str) -> None:
    made, routing, places = node.inputs
    x = b.read(made, "all", "all")
    how, at = b.value(routing, "m", "all"), b.value(places, "m", "all")
    parts = [True] if node.attr("parts") else []
    b.emit("weighted_sum", b.register(node.output), x, how, at, node.attr("weighted"), *parts)


def _share_bias(b: Builder, node: Node, c: str) -> None:
    x, routing = (b.value(v, "m", "all") for v in node.inputs)
    table = b.read(vector_name(node.attr("biases")), "all", "all")
    b.emit("share_bias", b.register(node.output), x, routing, table, node.attr("weighted"))


NODES |= {
    "top_k": _top_k, "align": _sorted, "places": _sorted, "weighted_sum": _weighted_sum,
    "share_bias": _share_bias,
}  # fmt: skip


def experts_program(b: Builder, node: Node) -> None:
    """Columns n of the experts of a run of blocks: rows gathered or read, products, and for those that enter
    the experts also biases and activation."""
    how = node.attr("routing")
    if node.kind == "expert_down":
        x, blocks = b.read(node.inputs[0], "m", "all"), b.read(node.inputs[1], "blocks", "all")
        b.write(node.output, _product(b, node.output, x, blocks, node.weights[0]))
        return
    dispatched = node.attr("dispatched")
    x = b.read(node.inputs[0], "m" if dispatched else "all", "all")
    blocks = b.read(node.inputs[1], "blocks", "all")
    routing = b.read(node.inputs[2], "all", "all") if len(node.inputs) > 2 else None
    rows = x
    if not dispatched:
        rows = b.register(f"{node.output}.rows")
        b.emit("gather", rows, x, blocks, how.chosen, routing)
    made = []
    for i, w in enumerate(node.weights):
        y = _product(b, f"{node.output}.{i}", rows, blocks, w)
        bias: Mapping[str, Any] | None = node.attr(f"bias{i}")
        if bias is not None:
            table, whole = b.read(vector_name(bias), "all", "n"), y
            y = b.register(f"{node.output}.{i}.biased")
            b.emit("expert_bias", y, whole, blocks, table)
        made.append(y)
    out = b.register(node.output)
    b.emit("expert_gate", out, node.attr("act"), made, node.attr("limit"), node.attr("offset"))
    b.write(node.output, out)


def _product(b: Builder, name: str, x: str, blocks: str, weight: Matrix) -> str:
    stack = _stack(b, weight)
    out = b.register(name)
    b.emit("expert_matmul", out, x, blocks, stack, weight.dtype)
    return out


def _stack(b: Builder, w: Matrix) -> str:
    """A register with the weights of all experts; of low-bit ones the operands that are made when a block is
    worked through."""
    if w.low is None:
        return b.read(w.label, "expert", "all", f"stack:{w.label}")
    parts = {p.name: b.read(f"{w.label}.{p.name}", "expert", "all", f"stack:{w.label}.{p.name}")
             for p in w.low.parts}  # fmt: skip
    made = b.register(f"stack:{w.label}.operand")
    b.dequantise(made, parts, w)
    return made


def exchange_program(b: Builder, node: Node, peers: range) -> None:
    """The routing of all replicas' tokens, replica by replica."""
    parts = [b.read(node.inputs[0], "all", "all", chip=chip) for chip in peers]
    b.emit("rows", b.register(node.output), parts)
    b.write(node.output, b.registers[f"={node.output}"], "all", "all")


def dispatch_program(b: Builder, node: Node, peers: range) -> None:
    """The rows that the chip's blocks name, from the replicas whose tokens they are."""
    parts = [b.read(node.inputs[0], "all", "all", chip=chip) for chip in peers]
    blocks = b.read(node.inputs[1], "all", "all")
    routing = b.read(node.inputs[2], "all", "all") if len(node.inputs) > 2 else None
    tokens, rows = b.register(f"{node.output}.tokens"), b.register(node.output)
    b.emit("rows", tokens, parts)
    b.emit("gather", rows, tokens, blocks, node.attr("routing").chosen, routing)
    b.write(node.output, rows, "all", "all")


def collect_program(
    b: Builder, node: Node, peers: range, epilogue: Sequence[int], stores: Sequence[str]
) -> None:
    """The sum of what the experts of all replicas made of the replica's own tokens: rows n of all tokens."""
    made, routing, places = node.inputs
    how = b.read(routing, "all", "all")
    found = []
    for i, chip in enumerate(peers):
        part = b.register(f"{node.output}.{i}")
        x, at = b.read(made, "all", "all", chip=chip), b.read(places, "n", "all", chip=chip)
        b.emit("weighted_sum", part, x, how, at, node.attr("weighted"), True)
        found.append(part)
    b.emit("sum", b.register(node.output), found)
    run_nodes(b, epilogue, "all")
    for v in stores:
        b.write(v, b.registers[f"={v}"], "m", "all")
