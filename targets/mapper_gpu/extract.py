"""A serving graph as sections of nodes: heads become columns, views vanish, MLPs come apart into their
products.

Every node keeps what its meaning needs in its attributes (see `programs`), so that nothing later looks at
the graph."""

from __future__ import annotations

from mapper.ir.graph import Graph
from mapper_gpu import extract_latent, extract_moe, extract_rules, extract_views
from mapper_gpu.extractor import Extractor, Program

RULES = (extract_latent, extract_moe, extract_rules, extract_views)
"""Modules that register how ops become nodes when they are imported."""


def extract(graph: Graph, phase: str, batch: int, tokens: int, context: int, form: str) -> Program:
    """The sections of a serving graph with weights in format `form`. Raises LoweringError naming the op."""
    return Extractor(graph, phase, batch, tokens, context, form).run()
