"""A kernel as plain data, for the plan: its ops, operands, tile and grid, and its modelled time.

It holds what a source template needs to write the kernel, and what the checks of cuts and splits read.
"""

from __future__ import annotations

from typing import Any

from mapper_gpu.experts import ExpertTile, Grouped
from mapper_gpu.flash import Attention
from mapper_gpu.kernel import Kernel
from mapper_gpu.nodes import Matrix, Section


def describe(k: Kernel, section: Section, phase: str) -> dict[str, Any]:
    """The kernel's record."""
    nodes = section.nodes
    t = k.timed
    record: dict[str, Any] = {
        "name": k.name,
        "kind": k.kind,
        "nodes": [
            {
                "number": i,
                "kind": nodes[i].kind,
                "inputs": list(nodes[i].inputs),
                "output": nodes[i].output,
                "op": nodes[i].op,
            }
            for i in k.nodes
        ],
        "reads": list(k.reads),
        "stores": list(k.stores),
        "weights": [_weight(w) for w in k.weights],
        "seconds": t.seconds,
        "tasks": t.tasks,
        "merges": t.merges,
        "hbm_bytes": t.far,
        "l2_bytes": t.near,
        "flops": t.flops,
        "limit": t.limit,
    }
    if k.tile is not None:
        record |= _tiles(k, section)
    if k.split is not None and k.attention is not None:
        record["split"] = {"splits": k.split.splits, "keys": k.split.keys, "tokens": k.split.tokens}
        record["attention"] = _attention(k.attention)
    if k.grouped is not None and k.expert_tile is not None:
        record["experts"] = _experts(k.grouped, k.expert_tile)
    if k.collective is not None:
        record["collective"] = {"algorithm": k.collective.algorithm, "bytes": k.collective.bytes}
    return record


def _weight(w: Matrix) -> dict[str, Any]:
    record = {"name": w.label, "n": w.n, "k": w.k, "dtype": w.dtype, "split": w.split}
    if w.low is None:
        return record
    return record | {"stored": w.low.name, "bytes": w.stored, "elements": w.total * w.n * w.k}


def _tiles(k: Kernel, section: Section) -> dict[str, Any]:
    """Tile and lanes of a product."""
    assert k.tile is not None
    first = section.nodes[k.branches[0].linears[0]]
    tile = {
        "m": k.tile.m, "n": k.tile.n, "splits": k.tile.splits, "band": k.tile.band, "engine": k.tile.engine,
        "rows": section.values[first.inputs[0]].rows,
    }  # fmt: skip
    lanes = [
        {
            "n": b.lane.n,
            "mats": b.lane.mats,
            "grain": b.lane.grain,
            "linears": list(b.linears),
            "stores": list(b.stores),
        }
        for b in k.branches
    ]
    return {"tile": tile, "lanes": lanes}


def _attention(a: Attention) -> dict[str, Any]:
    return {
        "batch": a.batch, "heads": a.heads, "kv_heads": a.kv_heads, "dim": a.dim, "value_dim": a.value_dim,
        "tokens": a.tokens, "length": a.length, "past": a.past, "window": a.window, "chunk": a.chunk,
    }  # fmt: skip


def _experts(g: Grouped, tile: ExpertTile) -> dict[str, Any]:
    return {
        "tokens": g.routing.rows, "count": g.routing.count, "chosen": g.routing.chosen,
        "rows": g.routing.tile, "blocks": g.routing.most, "filled": g.routing.blocks,
        "distinct": g.routing.distinct, "owners": g.routing.owners, "fullest": g.routing.fullest,
        "n": g.n, "k": g.k, "mats": g.mats, "element": g.element,
        "tile": {"n": tile.n, "run": tile.run, "engine": tile.engine},
    }  # fmt: skip
