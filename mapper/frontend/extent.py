"""How large a model is once its functions are inlined, found without inlining them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mapper.errors import ModelError, UnsupportedModelError
from mapper.frontend.proto import FunctionRecord, GraphRecord, ModelRecord, NodeRecord

MAX_NODES = 250_000  # after inlining
MAX_CALLS = 16  # functions inside functions
LARGE = 5_000  # nodes above which a model must look like a transformer
SPARSE = 500  # nodes per matrix product; exported transformers have 5 to 40
OPERANDS = 8  # of a usual node; one with many more costs as much as several
PRODUCTS = ("MatMul", "Gemm", "Einsum", "Attention", "MoE", "Linear", "Conv")


@dataclass(frozen=True)
class Extent:
    """Nodes (those with many operands count more than once) and matrix products among them."""

    nodes: int = 0
    products: int = 0

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.nodes + other.nodes, self.products + other.products)


def check_size(record: ModelRecord) -> None:
    """Raises ModelError for a model of too many nodes, UnsupportedModelError for a large one that is no
    transformer: nearly all of its nodes are no matrix products."""
    found = _Measure(record.functions).nodes(record.graph.nodes, 0)
    if found.nodes > MAX_NODES:
        raise ModelError(f"the graph has more than {MAX_NODES} nodes after inlining")
    if found.nodes > LARGE and found.products * SPARSE < found.nodes:
        few = f"{found.products} matrix products in a graph of {found.nodes} nodes and operands"
        raise UnsupportedModelError(f"{few}: not a transformer")


class _Measure:
    def __init__(self, functions: dict[tuple[str, str, str], FunctionRecord]) -> None:
        self.functions = functions
        self.known: dict[tuple[str, str, str], Extent] = {}

    def nodes(self, nodes: Iterable[NodeRecord], depth: int) -> Extent:
        """The extent of a list of nodes, with what they call and their sub-graphs."""
        count = products = 0
        for node in nodes:
            inner = self._inside(node, depth)
            count += inner.nodes + max(1, len(node.inputs) - OPERANDS, len(node.outputs) - OPERANDS)
            products += inner.products + any(p in node.op for p in PRODUCTS)
        return Extent(count, products)

    def _inside(self, node: NodeRecord, depth: int) -> Extent:
        key = node.domain, node.op, node.overload
        found = Extent()
        if key in self.functions:
            if depth >= MAX_CALLS:
                raise ModelError(f"function {node.op[:40]!r}: functions are nested deeper than {MAX_CALLS}")
            if key not in self.known:
                self.known[key] = self.nodes(self.functions[key].nodes, depth + 1)
            found = self.known[key]
        for attribute in node.attributes.values():
            values = attribute.value if isinstance(attribute.value, list) else [attribute.value]
            for value in values:
                if isinstance(value, GraphRecord):
                    found = found + self.nodes(value.nodes, depth)
        return found
